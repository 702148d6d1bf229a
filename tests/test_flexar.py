"""FlexAR against the official code's numbers."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file

import argen
from argen.models.flexar import FlexAR, FlexARSession, sizes_of
from argen.models.layers import causal_mask
from argen.pipelines.base import UNDECIDED
from argen.pipelines.flexar import FlexARPipeline
from argen.request import Request
from samplers.logits import Sampling
from samplers.steps import Sequential
from tokenizers_img.checkpoint import load_strict
from tokenizers_img.flextok.checkpoint import vae_network
from tokenizers_img.flextok.network import FlexTok

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
ATTENTIONS = ("self_attn", "cross_attn")


@pytest.fixture(params=["ar_c2i", "ar_t2i"])
def case(request, golden):
    return golden(f"flextok/{request.param}")


def tiny(case) -> FlexAR:
    return load_strict(FlexAR(**sizes_of(case.config)), case.weights, source="golden")


def condition(model, case) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoded condition, then "none" as often; mask."""
    if "classes" in case.io:
        ids = case.io["classes"]
        encoded = model.encode_class(torch.cat([ids, torch.full_like(ids, -1)]))
        return encoded, torch.ones(len(encoded), 1, dtype=torch.bool)
    encoded = model.encode_text(case.io["t5_hidden"])
    torch.testing.assert_close(encoded, case.io["text_embeddings"], **CLOSE)
    return encoded, case.io["t5_attention_mask"].bool()


@torch.no_grad()
def test_teacher_forcing(case):
    model, io = tiny(case), case.io
    encoded, mask = condition(model, case)
    ids, n = io["ids"], io["ids"].shape[1]
    read, positions = F.pad(ids[:, :-1], (1, 0), value=-1), torch.arange(-1, n - 1)
    projected = model.project_text(encoded[:2])
    embedded = model.embed(read, positions, projected)
    torch.testing.assert_close(embedded, io["input_embeddings"], **CLOSE)
    hidden = model.hidden(embedded, causal_mask(n, n, ids.device), projected, mask[:2])
    torch.testing.assert_close(hidden, io["trunk_out"], **CLOSE)
    labels = io["classes"] if "classes" in io else io["t5_hidden"][:2]
    logits = model(labels, mask[:2], ids)
    torch.testing.assert_close(logits, io["logits"], **CLOSE)
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), ids.flatten()), io["loss"].squeeze(), **CLOSE)
    if "logits_uncond" in io:
        torch.testing.assert_close(model(torch.full_like(labels, -1), mask[2:], ids), io["logits_uncond"], **CLOSE)


class Races:
    """What torch.multinomial does with exponential draws [N, B, K]: the largest of probability over draw wins."""

    def __init__(self, draws):
        self.draws = draws

    def draw(self, logits, cells):
        return (logits.softmax(dim=-1) / self.draws[cells].transpose(0, 1)).argmax(dim=-1)


@torch.no_grad()
def written(case, sampling, scale, official_null=False, begun=0) -> torch.Tensor:
    model = tiny(case)
    encoded, mask = condition(model, case)
    rows = slice(None) if scale != 1 else slice(2)
    session = FlexARSession(model, encoded[rows], mask[rows], scale != 1, official_null=official_null)
    grid = torch.full((2, model.length), -1)
    grid[:, :begun] = case.io["ids"][:, :begun]
    *_, last = Sequential()(session, grid, sampling, scale, Races(case.io["draws"]))
    return last.tokens


def test_generation(case):
    settings, greedy = case.config["_fixture"], Sampling(temperature=0)
    sampling = Sampling(settings["temperature"], settings["top_k"], settings["top_p"])
    scale, io = settings["cfg_factor"], case.io
    assert torch.equal(written(case, greedy, scale, official_null=True), io["greedy_ids"])
    assert torch.equal(written(case, sampling, scale, official_null=True), io["sampled_ids"])
    if "classes" in io:
        assert torch.equal(written(case, greedy, scale), io["greedy_ids_fixed_null"])
        assert torch.equal(written(case, sampling, scale), io["sampled_ids_fixed_null"])
        assert torch.equal(written(case, greedy, 1.0), io["greedy_ids_nocfg"])
    else:
        assert torch.equal(written(case, greedy, scale, begun=3), io["continued_ids"])


@torch.no_grad()
def test_fewer_tokens_are_the_first_ones(case):
    model = tiny(case)
    encoded, mask = condition(model, case)
    session = FlexARSession(model, encoded, mask, guided=True, length=4)
    *_, last = Sequential()(
        session, torch.full((2, 4), -1), Sampling(temperature=0), case.config["_fixture"]["cfg_factor"], None
    )
    key = "greedy_ids_fixed_null" if "classes" in case.io else "greedy_ids"
    assert torch.equal(last.tokens, case.io[key][:, :4])


@torch.no_grad()
def test_a_released_file_loads_by_its_configuration(case, tmp_path):
    ignored = {"models.image_tokenizer.vae.weight": torch.zeros(2), "models.text_encoder.t5_embedder.w": torch.zeros(2)}
    save_file(case.weights | ignored, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no configuration at .*config\.yaml: put the model's config\.yaml"):
        FlexAR.from_original(tmp_path / "model.safetensors")
    config = json.loads(json.dumps({key: value for key, value in case.config.items() if key != "_fixture"}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    model = FlexAR.from_original(tmp_path / "model.safetensors")
    labels = case.io["classes"] if "classes" in case.io else case.io["t5_hidden"][:2]
    mask = condition(model, case)[1][:2]
    torch.testing.assert_close(model(labels, mask, case.io["ids"]), case.io["logits"], **CLOSE)
    trunk = config["model"]["meta_model"]["models"]["ar_image_model"]["trunk"]
    trunk["ffn_target"]["_target_"] = "l3m.model.layers.ffn.MixtureOfExperts"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        ValueError, match=r"the feed-forward layer l3m\.model\.layers\.ffn\.MixtureOfExperts: argen knows MLP"
    ):
        FlexAR.from_original(tmp_path / "model.safetensors")
    del trunk["embed_dim"]
    trunk["ffn_target"]["_target_"] = "l3m.model.layers.ffn.MLP"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="the configuration lacks 'embed_dim': expected that of a FlexAR"):
        FlexAR.from_original(tmp_path / "model.safetensors")


@pytest.fixture
def pipe():
    """A small one of classes; untrained, because only the mechanics are looked at."""
    torch.manual_seed(0)
    model = FlexAR(200, 12, 32, 2, 2, classes=1000, text_dim=None, hidden=64)
    flextok = FlexTok((8, 5, 5), 12, 32, 1, 16, 32, 1, 16, patch=1, grid=4)
    vae = vae_network(channels=(4, 8, 8, 8), norm_num_groups=2)
    pipe = FlexARPipeline(model.eval(), flextok.eval(), vae.eval(), steps=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_an_image_of_any_number_of_tokens(pipe):
    whole = pipe("class:1", generator=generators(3))
    part = pipe("class:1", generator=generators(3), num_tokens=5, sampler="jacobi")
    assert whole.tokens.shape == (1, 12)
    assert torch.equal(part.tokens, whole.tokens[:, :5])
    assert part.images[0].size == whole.images[0].size == (32, 32)
    assert part.images[0].tobytes() != whole.images[0].tobytes()
    assert pipe.images(whole.tokens[:, :5])[0].tobytes() == part.images[0].tobytes()
    for wrong in (0, 13):
        with pytest.raises(ValueError, match=f"num_tokens is {wrong}: expected 1 to 12"):
            pipe("class:1", num_tokens=wrong)


def test_what_is_not_yet_written_shows_as_the_image_so_far(pipe):
    request = Request("class:7", "a model", num_images=2, num_tokens=6, sampler="sequential")
    previews = []
    for job in pipe.run(request):
        assert job.tokens.shape == (2, 1, 6)
        previews.append(pipe.images(job.tokens, "pt"))
    assert job.progress == 1
    assert len(job.images) == 2
    assert not torch.equal(previews[0], previews[-1])
    torch.testing.assert_close(pipe.images(torch.full((1, 1, 6), -1), "pt").unique(), torch.tensor([UNDECIDED]))
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_the_token_number_is_refused_where_it_is_fixed():
    with pytest.raises(ValueError, match="this model's images have 64 tokens, leave it out"):
        argen.load("argen/emoji-parti")("a red apple", num_tokens=5)


def test_a_generator_of_another_tokenizer_is_refused(pipe):
    other = FlexTok((8, 5), 12, 32, 1, 16, 32, 1, 16)
    with pytest.raises(ValueError, match="writes 12 tokens of 200, the image tokenizer knows 12 of 40"):
        FlexARPipeline(pipe.transformer, other, pipe.vae)


def test_a_saved_pipeline_comes_back(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = argen.load(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.config.steps == 2
    images = [one("class:1", generator=generators(1)).images[0].tobytes() for one in (pipe, again)]
    assert images[0] == images[1]


def test_a_search_keeps_what_fits_best(pipe, monkeypatch):
    """Scored by how dark they are, prefixes are drawn towards the dark."""
    seen = []

    def dark(prompt, images):
        seen.append(len(images))
        return [-float(np.asarray(image).mean()) for image in images]

    monkeypatch.setattr(pipe, "rank", dark)
    monkeypatch.setattr(pipe, "check_ranking", lambda: None)  # of an encoder, which `dark` needs not
    stages = list(pipe.search("class:1", num_beams=2, num_candidates=8, num_tokens=6, generator=generators(1)[0]))
    assert seen == [8, 8, 8, 8]
    assert [tuple(stage.tokens.shape) for stage in stages] == [(2, 1), (2, 2), (2, 4), (1, 6)]
    for before, after in zip(stages, stages[1:], strict=False):
        begun = {tuple(row) for row in before.tokens.tolist()}
        assert all(tuple(row[: before.decided]) in begun for row in after.tokens.tolist())
    (score,) = stages[-1].scores
    sequential = pipe("class:1", 8, generator=generators(1)[0], num_tokens=6)
    assert score > np.mean(dark("", sequential.images))
    assert score == pytest.approx(dark("", pipe.images(stages[-1].tokens[:, None]))[0])
    with pytest.raises(ValueError, match="num_beams is 3 and num_candidates 8"):
        next(pipe.search("class:1", num_beams=3, num_candidates=8))

    request = Request("class:1", num_images=2, seed=1, num_beams=2, num_candidates=8, num_tokens=6)
    seen = [(job, job.decided, job.forward_passes) for job in pipe.run(request)]
    assert [after for _, *after in seen] == [[1, 1], [2, 2], [4, 4], [6, 6], [6, 6]]
    job = seen[-1][0]
    assert len(job.images) == len(job.scores) == 2
    for request, image in zip(job.requests, job.images, strict=True):  # each comes alone from what its file says
        (alone,) = list(pipe.run(request))[-1].images
        assert alone.tobytes() == image.tobytes()


def test_a_search_says_what_is_wrong(pipe):
    with pytest.raises(ValueError, match="num_beams is 3 and num_candidates 4: expected a multiple"):
        Request("class:1", num_beams=3, num_candidates=4)
    with pytest.raises(ValueError, match="no image encoder to rank"):
        list(pipe.run(Request("class:1", num_beams=2)))
    with pytest.raises(ValueError, match="only images of ordered tokens can be searched for"):
        next(argen.load("argen/emoji-parti").run(Request("a red apple", num_beams=2)))


@pytest.mark.parametrize(("target", "eps"), [("LayerNormFP32", 1e-5), ("LayerNormFP32", 1e-3), ("RMSNorm", None)])
@torch.no_grad()
def test_norms_of_queries_and_keys_are_read_and_equal(golden, tmp_path, target, eps):
    """Those of self- and of cross-attention, against the formulas of the authors' code."""
    case = golden("flextok/ar_t2i")
    config = json.loads(json.dumps({key: value for key, value in case.config.items() if key != "_fixture"}))
    trunk = config["model"]["meta_model"]["models"]["ar_image_model"]["trunk"]
    norm = {"_target_": f"l3m.model.layers.normalization.{target}", "_partial_": True} | ({"eps": eps} if eps else {})
    trunk["self_attn_target"]["qk_norm"] = trunk["cross_attn_target"]["qk_norm"] = norm
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    heads = trunk["self_attn_target"]["num_heads"]
    dim, generator = trunk["embed_dim"] // heads, torch.Generator().manual_seed(0)
    names = [
        f"models.ar_image_model.trunk.blocks.{i}.{part}" for i in range(trunk["num_blocks"]) for part in ATTENTIONS
    ]
    state = {key: value for key, value in case.weights.items() if ".q_norm." not in key and ".k_norm." not in key}
    for name in names:
        for kind in ("weight", "bias") if target == "LayerNormFP32" else ("weight",):
            for side in ("q_norm", "k_norm"):
                state[f"{name}.{side}.{kind}"] = torch.randn(dim, generator=generator)
    save_file(state, tmp_path / "model.safetensors")
    model = FlexAR.from_original(tmp_path / "model.safetensors")
    assert model.config.cross_qk_norm == (eps or 1e-6)

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        if target == "RMSNorm":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]
        return torch.nn.functional.layer_norm(x, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    self_attention, cross = (model.get_submodule(name) for name in names[:2])
    x, text = torch.randn(2, 5, heads * dim, generator=generator), torch.randn(2, 7, heads * dim, generator=generator)
    rows = [part.unflatten(-1, (heads, dim)).transpose(1, 2) for part in self_attention.qkv(x).chunk(3, dim=-1)]
    out = F.scaled_dot_product_attention(
        normed(rows[0], f"{names[0]}.q_norm"), normed(rows[1], f"{names[0]}.k_norm"), rows[2], is_causal=True
    )
    expected = self_attention.proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(self_attention(x, causal_mask(5, 5, x.device), None, 0), expected, **CLOSE)
    parts = (cross.Wq(x), cross.Wk(text), cross.Wv(text))
    rows = [part.unflatten(-1, (heads, dim)).transpose(1, 2) for part in parts]
    out = F.scaled_dot_product_attention(
        normed(rows[0], f"{names[1]}.q_norm"), normed(rows[1], f"{names[1]}.k_norm"), rows[2]
    )
    expected = cross.proj(out.transpose(1, 2).flatten(2))
    everything = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    torch.testing.assert_close(cross(x, *cross.keys_values(text), everything), expected, **CLOSE)
