"""FlexAR against the official code's numbers."""

import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file

from argen.models.flexar import FlexAR, FlexARSession, sizes_of
from argen.models.layers import causal_mask
from samplers.logits import Sampling
from samplers.steps import Plain
from tokenizers_img.checkpoint import load_strict

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


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
    read, places = F.pad(ids[:, :-1], (1, 0), value=-1), torch.arange(-1, n - 1)
    projected = model.project_text(encoded[:2])
    embedded = model.embed(read, places, projected)
    torch.testing.assert_close(embedded, io["input_embeddings"], **CLOSE)
    hidden = model.hidden(embedded, causal_mask(n, n, ids.device), projected, mask[:2])
    torch.testing.assert_close(hidden, io["trunk_out"], **CLOSE)
    logits = model(encoded[:2], mask[:2], ids)
    torch.testing.assert_close(logits, io["logits"], **CLOSE)
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), ids.flatten()), io["loss"].squeeze(), **CLOSE)
    if "logits_uncond" in io:
        torch.testing.assert_close(model(encoded[2:], mask[2:], ids), io["logits_uncond"], **CLOSE)


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
    *_, last = Plain()(session, grid, sampling, scale, Races(case.io["draws"]))
    return last.tokens


def test_generation(case):
    own, greedy = case.config["_fixture"], Sampling(temperature=0)
    sampling = Sampling(own["temperature"], own["top_k"], own["top_p"])
    scale, io = own["cfg_factor"], case.io
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
    *_, last = Plain()(
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
    encoded, mask = condition(model, case)
    torch.testing.assert_close(model(encoded[:2], mask[:2], case.io["ids"]), case.io["logits"], **CLOSE)
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
