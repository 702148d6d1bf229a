"""The EAGLE drafter and speculative decoding of a LlamaGen against LANTERN's code."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import published_keys, shapes
from safetensors.torch import load_file

from argen.models.drafter import Drafter, DraftSession
from argen.models.llamagen import SIZES, LlamaGen, converted
from argen.models.session import LlamaGenSession
from argen.pipelines.llamagen import left_padded
from samplers.lantern import Lantern, table_of
from samplers.logits import Gumbel, Recorded, Sampling, keep_top_k, keep_top_p, keys_of
from samplers.speculative import Speculative
from samplers.steps import Origin, Sequential
from samplers.trees import Distribution, DynamicTree, StaticTree
from tokenizers_img.checkpoint import load_strict

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@dataclass(frozen=True)
class AuthorsSampling(Sampling):
    """Temperature, then top-p, then top-k."""

    def filter(self, logits):
        return keep_top_k(keep_top_p(logits.float() / (self.temperature or 1.0), self.top_p), self.top_k)


@pytest.fixture(scope="module")
def case():
    from conftest import Case

    return Case("lantern/llamagen_t2i")


@pytest.fixture(scope="module")
def target(case):
    base = case.config["base"]
    model = LlamaGen(
        n_embed=base["vocab_size"],
        grid=16,
        caption_dim=base["caption_dim"],
        dim=base["hidden_size"],
        depth=base["num_hidden_layers"],
        heads=base["num_attention_heads"],
        multiple_of=32,
    )
    hidden = base["intermediate_size"]
    for layer in model.layers:
        for name, shape in (("w1", (hidden, 48)), ("w3", (hidden, 48)), ("w2", (48, hidden))):
            getattr(layer.feed_forward, name).weight = torch.nn.Parameter(torch.empty(shape))
    return load_strict(model, converted(case.weights), source="golden")


@pytest.fixture(scope="module")
def drafter(case):
    state = load_file(case.folder / "drafter.safetensors")
    config = case.config["drafter"]
    return load_strict(Drafter(64, 16, 48, 4, config["intermediate_size"]), state, source="golden")


@torch.no_grad()
def session(case, target, drafter=None) -> LlamaGenSession:
    features, mask = left_padded(case.io["t5_features"], case.io["t5_mask"])
    embedded = target.cls_embedding(torch.cat([features, target.unconditional(features)]))
    return LlamaGenSession(
        target, embedded, torch.cat([mask, mask]), guided=True, drafter=drafter, codebook=case.io["codebook"]
    )


@torch.no_grad()
def test_the_targets_hidden_states_and_logits(case, target):
    io, opened = case.io, session(case, target)
    torch.testing.assert_close(opened.prefix, io["prefill_hidden"], **CLOSE)
    ids = io["ar_greedy/ids"].long()
    read = torch.cat([torch.full((1, 1), -1), ids[:, :40]], dim=1)
    logits = torch.cat(opened.forward(read, torch.arange(-1, 40)))
    torch.testing.assert_close(logits, io["base_logits_first41"], **CLOSE)


@torch.no_grad()
def test_training_of_the_drafter(case, target, drafter):
    io = case.io
    ids, noised, clean = io["train/image_ids"].long(), io["train/hidden_noised"], io["train/hidden_clean"]
    # position 119 + c leads to token c
    guessed = drafter(noised[:, :120], noised[:, 119:-1], ids)
    torch.testing.assert_close(guessed, io["train/predicted_hidden"][:, 119:-1], **CLOSE)
    expected = clean[:, 120:]
    value = F.smooth_l1_loss(guessed[:, 1:], expected[:, 1:], reduction="none").mean(dim=-1).mean()
    torch.testing.assert_close(value, io["train/vloss"], **CLOSE)
    probs, guess = target.output(expected[:, 1:]).softmax(-1), target.output(guessed[:, 1:]).log_softmax(-1)
    torch.testing.assert_close(-(probs * guess).sum(-1).mean(), io["train/ploss"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["greedy", "top40"])
def test_drafted_trees(case, target, drafter, name):
    io, config = case.io, case.config
    sampling = AuthorsSampling(temperature=0) if name == "greedy" else AuthorsSampling(top_k=40)
    opened = session(case, target)
    root, cell = io["ar_greedy/ids"][:, 0].long(), torch.tensor([0])
    opened.forward(torch.tensor([[-1]]), torch.tensor([-1]))
    for shape in (DynamicTree(), StaticTree(tuple(map(tuple, config["static_tree"]["tree_choices"])), 10)):
        drafting = DraftSession(drafter, opened)
        hidden = drafting.read(root[:, None], cell[:, None], torch.tensor([[0]]), torch.tensor([1]))
        torch.testing.assert_close(hidden[:, 0], io["draft/prefill_hidden"][:, -1], **CLOSE)
        kind = "dynamic" if isinstance(shape, DynamicTree) else "static"
        stream = iter(io[f"draft/static_{name}/uniforms"].tolist()) if (kind, name) == ("static", "top40") else iter(())
        (draft,) = shape.grow(drafting, hidden, cell, root, Distribution(sampling, config["cfg_scale"]), [stream])
        if kind == "dynamic":
            assert draft.tokens == io[f"draft/dynamic_{name}/tokens"][0].tolist()
            assert torch.equal(draft.tree.depths, io[f"draft/dynamic_{name}/depth"])
            assert torch.equal(draft.tree.mask.float(), io[f"draft/dynamic_{name}/tree_mask"][0, 0])
            continue
        expanded = [node for node, children in enumerate(draft.tree.children) if children]
        for row, node in enumerate(expanded):
            children = draft.tree.children[node]
            expected = io[f"draft/static_{name}/tokens"][row][: len(children)].tolist()
            assert [draft.tokens[child] for child in children] == expected
        assert torch.equal(draft.tree.mask.float(), io["static_tree/mask"][0, 0])


RUNS = [
    "greedy_dynamic_lossless",
    "greedy_static_lossless",
    "greedy_dynamic_k5_delta0.2",
    "sample_dynamic_lossless",
    "sample_dynamic_k5_delta0.2",
    "sample_static_lossless",
    "sample_static_k5_lambda3",
]


@torch.no_grad()
@pytest.mark.parametrize("run", RUNS)
def test_whole_images(case, target, drafter, run):
    io, settings = case.io, case.config["runs"][run]
    paths = tuple(map(tuple, case.config["static_tree"]["tree_choices"]))
    shape = StaticTree(paths, 10) if settings.get("static_tree") else DynamicTree()
    sampler = Speculative(shape)
    if settings.get("lantern"):
        value = settings["lantern_delta"]
        bound = {"lambda_": value} if value > 1 else {"delta": value}
        sampler = Lantern(settings["lantern_k"], **bound, official=True, tree=shape)
    limits = {key: settings[key] for key in ("temperature", "top_k", "top_p") if key in settings}
    numbers = io.get(f"{run}/uniforms", torch.zeros(0))[None]
    length = settings["max_length"]
    steps, last, origins = [], None, None
    for step in sampler(
        session(case, target, drafter), torch.full((1, 256), -1), AuthorsSampling(**limits), 3.0, Recorded(numbers)
    ):
        steps.append(int((step.tokens >= 0).sum()))
        last, origins = step.tokens, step.origins
        if steps[-1] >= length:
            break
    assert torch.equal(last[:, :length].int(), io[f"{run}/ids"])
    lengths = [b - a - 1 for a, b in zip(steps, steps[1:], strict=False)]
    expected = io[f"{run}/accept_lengths"].tolist()
    assert lengths[:-1] == expected[: len(lengths) - 1]
    assert torch.equal(origins[0] != Origin.GIVEN, last[0] >= 0)
    drawn = int((origins == Origin.DRAWN).sum())
    assert drawn in (len(steps), len(steps) - 1)  # one a pass; the last may lie behind the picture
    assert (Origin.RELAXED in origins) is ("delta" in run)  # with lambda none was needed
    if run in ("greedy_dynamic_lossless", "greedy_static_lossless"):
        grid = torch.full((1, 256), -1)
        *_, plain = Sequential()(
            session(case, target), grid, Sampling(temperature=0), 3.0, Recorded(torch.zeros(1, 256))
        )
        assert torch.equal(plain.tokens.int(), io["ar_greedy/ids"])


def test_the_neighbours_are_the_authors(case):
    assert torch.equal(table_of(case.io["codebook"], 20), case.io["neighbours"][:, :20].long())
    assert table_of(case.io["codebook"], 20) is table_of(case.io["codebook"].clone(), 20)  # found once


def run(sampler, opened, temperature=1.0):
    grid, noise = torch.full((1, 256), -1), Gumbel(keys_of([torch.Generator().manual_seed(0)], 256))
    return list(sampler(opened, grid, Sampling(temperature), 3.0, noise))[-1]


@torch.no_grad()
def test_relaxation_without_a_bound_to_spend_is_none(case, target, drafter):
    expected = run(Speculative(), session(case, target, drafter))
    for nothing in (Lantern(0), Lantern(5, delta=0.0), Lantern(5, lambda_=1.0)):
        actual = run(nothing, session(case, target, drafter))
        assert torch.equal(actual.tokens, expected.tokens)
        assert actual.forward_passes == expected.forward_passes
    relaxed = run(Lantern(20, delta=0.5), session(case, target, drafter))
    assert relaxed.forward_passes < expected.forward_passes


def test_what_cannot_be_drafted_is_refused(case, target, drafter):
    with pytest.raises(ValueError, match="the sampler speculative needs a generator with a drafter"):
        run(Speculative(), session(case, target))
    with pytest.raises(ValueError, match="the sampler lantern needs a generator with a drafter"):
        run(Lantern(), session(case, target))
    with pytest.raises(ValueError, match="k is 64: expected 0 to 62, fewer than the codebook's 64 codes"):
        run(Lantern(64), session(case, target, drafter))
    with pytest.raises(ValueError, match="the drafter is 32 wide with 64 codes, the generator 48 with 64"):
        run(Speculative(), session(case, target, Drafter(64, 16, 32, 4, 8)))
    with pytest.raises(ValueError, match="delta is 1.5: expected a number, 0 to 1"):
        Lantern(delta=1.5)
    with pytest.raises(ValueError, match="k is -1: expected a whole number, 0 to"):
        Lantern(-1)
    with pytest.raises(ValueError, match="expected one bound"):
        Lantern(delta=0.1, lambda_=2.0)


@pytest.mark.parametrize(("name", "grid"), [("llamagen_drafter", 16), ("llamagen2_drafter", 32)])
def test_published_keys(name, grid):
    published = published_keys("lantern")
    with torch.device("meta"):
        assert shapes(Drafter(16384, grid, 1280, 20, 3584)) == published[name]


@pytest.mark.parametrize("name", ["LlamaGen-T2I", "LlamaGen-T2I-2"])
def test_published_keys_of_the_converted_targets(name):
    with torch.device("meta"):
        state = converted({key: torch.empty(shape) for key, shape in published_keys("lantern")[name].items()})
        model = LlamaGen(grid=16 if name.endswith("T2I") else 32, **SIZES["XL"])
    assert shapes(model) == {key: list(value.shape) for key, value in state.items()}
