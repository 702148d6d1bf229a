"""DALL-E mini / mega and its detokenizer against the official code's numbers and the published key lists."""

import json

import pytest
import torch
from conftest import GOLDEN, published_keys, shapes

from argen.models.dalle_mini import SIZES, DalleMiniDecoder, DalleMiniEncoder, text_tokenizer, tokenize
from argen.models.layers import causal_mask
from argen.models.session import DecoderSession
from samplers.logits import Recorded, Sampling
from samplers.steps import Sequential
from tokenizers_img.checkpoint import load_strict, to_diffusers
from tokenizers_img.vqgan import VQGANDetokenizer


@pytest.fixture
def case(golden):
    return golden("min_dalle/tiny")


def networks(case, weights=None):
    config = case.config
    size = {"dim": config["dim"], "depth": config["layers"], "heads": config["heads"], "mlp_dim": config["glu"]}
    encoder = DalleMiniEncoder(**size, vocab_size=config["text_vocab"], max_length=config["text_tokens"])
    decoder = DalleMiniDecoder(
        **size, image_vocab=config["image_vocab"], codes=config["image_vocab"], length=config["image_tokens"]
    )
    for prefix, module in (("encoder.", encoder), ("decoder.", decoder)):
        state = {k.removeprefix(prefix): v for k, v in (weights or case.weights).items() if k.startswith(prefix)}
        load_strict(module, state, source="golden")
    return encoder, decoder


def session(case, encoder, decoder, images):
    """Guided session of `pictures` pictures of the golden prompt."""
    text = case.io["text_ids"].flip(0).repeat_interleave(images, dim=0)  # the prompt first, then the empty one
    return DecoderSession(decoder, encoder(text), text != 1, guided=True)


@torch.no_grad()
def test_networks_give_the_official_numbers(case):
    io, (encoder, decoder) = case.io, networks(case)
    states = encoder(io["text_ids"])
    torch.testing.assert_close(states, io["encoder_state"], atol=1e-4, rtol=1e-4)

    read = io["decoder_input_ids"].clone()
    images, length = read.shape
    read[:, 0] = -1
    rows = [0] * images + [1] * images
    logits = decoder.decode(
        read.repeat(2, 1),
        torch.arange(-1, length - 1),
        causal_mask(length, length, read.device),
        decoder.project_text(states[rows]),
        (io["text_ids"] != 1)[rows],
    )
    torch.testing.assert_close(logits, io["decoder_logits"][..., : decoder.codes], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_wrong_weight_is_noticed(case):
    weights = case.weights
    weights["encoder.layers.0.glu.fc1.weight"] = weights["encoder.layers.0.glu.fc1.weight"] + 0.05
    encoder, _ = networks(case, weights)
    assert (encoder(case.io["text_ids"]) - case.io["encoder_state"]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@torch.no_grad()
def test_sampling_gives_the_official_ids(case, kind):
    io, config = case.io, case.config
    expected = io[f"ids_{kind}"]
    sampled = session(case, *networks(case), images=len(expected))
    sampling = Sampling(**config["sampled"]) if kind == "sampled" else Sampling(temperature=0)
    grid = torch.full_like(expected, -1)
    *_, last = Sequential()(sampled, grid, sampling, config["supercondition"], Recorded(io["uniform_draws"]))
    assert torch.equal(last.tokens, expected)


@pytest.mark.parametrize("size", SIZES)
def test_published_keys(size):
    sizes, published = SIZES[size], published_keys("min_dalle")
    common = {key: sizes[key] for key in ("dim", "depth", "heads", "mlp_dim")}
    with torch.device("meta"):
        encoder = DalleMiniEncoder(**common, vocab_size=sizes["text_vocab"])
        decoder = DalleMiniDecoder(**common, image_vocab=sizes["image_vocab"])
    assert shapes(encoder) == published[f"dalle-{size}-encoder"]
    assert shapes(decoder) == published[f"dalle-{size}-decoder"]


def test_detokenizer_published_keys():
    keys = published_keys("min_dalle")["vqgan-f16-16384-detokenizer"]
    with torch.device("meta"):
        model = VQGANDetokenizer()
        state = {key: torch.empty(shape) for key, shape in keys.items()}
    assert {key: list(value.shape) for key, value in to_diffusers(state, 5).items()} == shapes(model)


@torch.no_grad()
def test_detokenizer_gives_the_official_pixels(tmp_path, golden):
    """The published size with weights drawn in the order of the published keys; pixels of the official decoder."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in published_keys("min_dalle")["vqgan-f16-16384-detokenizer"].items():
        value = torch.randn(shape, generator=generator)
        scale = 1.0 if key == "embedding.weight" else 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
        state[key] = value * scale + (1 if "norm" in key and key.endswith("weight") else 0)
    torch.save(state, tmp_path / "detoker.pt")
    model, io = VQGANDetokenizer.from_original(tmp_path / "detoker.pt"), golden("vqgan_detokenizer").io
    pixels = model.decode(io["ids"])[0].clamp(0, 1).permute(1, 2, 0)
    torch.testing.assert_close(pixels[3::8, 5::8], io["pixels_strided"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pixels.mean((0, 1)), io["pixels_mean"], atol=1e-4, rtol=1e-4)


def test_text_tokenizer_gives_the_official_ids():
    folder = GOLDEN / "min_dalle_text"
    tokenizer = text_tokenizer(folder / "vocab.json", folder / "merges.txt")
    for case in json.loads((folder / "expected.json").read_text()):
        ids = tokenize(tokenizer, [case["prompt"]])[0]
        assert ids[: len(case["ids"])].tolist() == case["ids"], case["prompt"]
        assert (ids[len(case["ids"]) :] == 1).all()


@torch.no_grad()
def test_the_text_encoder_keeps_one_copy_of_its_weights(case, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *args: pytest.fail("packed"))
    encoder, _ = networks(case)
    assert encoder(case.io["text_ids"]).isfinite().all()
