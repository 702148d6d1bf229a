"""The EAGLE drafter and speculative decoding of a LlamaGen against LANTERN's code."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import published_keys, shapes
from safetensors.torch import load_file

from argen.models.draft import Drafter, DraftSession
from argen.models.llamagen import SIZES, LlamaGen, LlamaGenSession, converted
from argen.pipelines.llamagen import left_padded
from samplers.lantern import Relaxed
from samplers.logits import Recorded, Sampling, keep_top_k, keep_top_p
from samplers.speculative import DynamicTree, Law, Lossless, Speculative, StaticTree
from samplers.steps import Plain
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
def session(case, target) -> LlamaGenSession:
    features, mask = left_padded(case.io["t5_features"], case.io["t5_mask"])
    both = torch.cat([features, target.unconditional(features)])
    return LlamaGenSession(target, target.cls_embedding(both), torch.cat([mask, mask]), guided=True)


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
    wanted = clean[:, 120:]
    value = F.smooth_l1_loss(guessed[:, 1:], wanted[:, 1:], reduction="none").mean(dim=-1).mean()
    torch.testing.assert_close(value, io["train/vloss"], **CLOSE)
    law, guess = target.output(wanted[:, 1:]).softmax(-1), target.output(guessed[:, 1:]).log_softmax(-1)
    torch.testing.assert_close(-(law * guess).sum(-1).mean(), io["train/ploss"], **CLOSE)


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
        hidden = drafting.guess(root[:, None], cell[:, None], opened.hidden)
        torch.testing.assert_close(hidden[:, 0], io["draft/prefill_hidden"][:, -1], **CLOSE)
        kind = "dynamic" if isinstance(shape, DynamicTree) else "static"
        stream = iter(io[f"draft/static_{name}/uniforms"].tolist()) if (kind, name) == ("static", "top40") else iter(())
        (draft,) = shape.grow(drafting, hidden, cell, root, Law(sampling, config["cfg_scale"]), [stream])
        if kind == "dynamic":
            assert draft.tokens == io[f"draft/dynamic_{name}/tokens"][0].tolist()
            assert torch.equal(draft.tree.depths, io[f"draft/dynamic_{name}/depth"])
            assert torch.equal(draft.tree.mask.float(), io[f"draft/dynamic_{name}/tree_mask"][0, 0])
            continue
        expanded = [node for node, children in enumerate(draft.tree.children) if children]
        for row, node in enumerate(expanded):
            children = draft.tree.children[node]
            wanted = io[f"draft/static_{name}/tokens"][row][: len(children)].tolist()
            assert [draft.tokens[child] for child in children] == wanted
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
def test_whole_pictures(case, target, drafter, run):
    io, settings = case.io, case.config["runs"][run]
    rule = Lossless()
    if settings.get("lantern"):
        value = settings["lantern_delta"]
        bound = {"lambda_": value} if value > 1 else {"delta": value}
        rule = Relaxed(io["neighbours"].long(), settings["lantern_k"], official=True, **bound)
    paths = tuple(map(tuple, case.config["static_tree"]["tree_choices"]))
    shape = StaticTree(paths, 10) if settings.get("static_tree") else DynamicTree()
    sampler = Speculative(lambda opened: DraftSession(drafter, opened), shape, rule)
    limits = {key: settings[key] for key in ("temperature", "top_k", "top_p") if key in settings}
    numbers = io.get(f"{run}/uniforms", torch.zeros(0))[None]
    length = settings["max_length"]
    steps, last = [], None
    for step in sampler(
        session(case, target), torch.full((1, 256), -1), AuthorsSampling(**limits), 3.0, Recorded(numbers)
    ):
        steps.append(int((step.tokens >= 0).sum()))
        last = step.tokens
        if steps[-1] >= length:
            break
    assert torch.equal(last[:, :length].int(), io[f"{run}/ids"])
    lengths = [b - a - 1 for a, b in zip(steps, steps[1:], strict=False)]
    wanted = io[f"{run}/accept_lengths"].tolist()
    assert lengths[:-1] == wanted[: len(lengths) - 1]
    if run in ("greedy_dynamic_lossless", "greedy_static_lossless"):
        grid = torch.full((1, 256), -1)
        *_, plain = Plain()(session(case, target), grid, Sampling(temperature=0), 3.0, Recorded(torch.zeros(1, 256)))
        assert torch.equal(plain.tokens.int(), io["ar_greedy/ids"])


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
