"""ControlAR against the official code's numbers and the published key lists."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import published_keys, shapes
from PIL import Image
from safetensors.torch import save_file
from test_llamagen import condition, sizes

import argen
from argen.metadata import read_request, save_images
from argen.models.annotators import as_control, canny
from argen.models.controlar import ENCODERS, ControlAR, converted
from argen.models.llamagen import SIZES
from argen.models.session import LlamaGenSession
from argen.pipelines import controlar
from argen.pipelines.controlar import ControlARPipeline
from argen.request import Control, Request
from samplers.logits import Recorded, Sampling
from samplers.steps import Sequential
from tokenizers_img import llamagen_vq
from tokenizers_img.checkpoint import load_strict

CASES = ["c2i_canny", "t2i_canny_square", "t2i_depth_wide", "t2i_lineart_tall"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(params=CASES)
def case(request, golden):
    return golden(f"controlar/{request.param}")


def tiny(case) -> ControlAR:
    config = case.config
    encoder = {k: v for k, v in config["encoder"].items() if k not in ("type", "key_layout", "layer_norm_eps")}
    model = ControlAR(
        encoder=config["encoder"]["type"],
        encoder_sizes=encoder,
        resize="nearest" if config["condition_type"] in ("canny", "seg") else "bicubic",
        **sizes(config),
    )
    return load_strict(model, converted(case.weights, config["encoder"]["type"]), source="golden")


@torch.no_grad()
def test_what_the_control_image_adds(case):
    model, io = tiny(case), case.io
    torch.testing.assert_close(model.adapter(io["control_image"]), io["control_features"], **CLOSE)
    torch.testing.assert_close(model.adapter_mlp(io["control_features"]), io["control_tokens"], **CLOSE)
    if "injected_0" in io:
        control = model.control(io["control_image"])
        torch.testing.assert_close(control, torch.stack([io[f"injected_{j}"] for j in range(3)]), **CLOSE)


@torch.no_grad()
def test_training_logits_and_loss(case):
    if "train_logits" not in case.io:
        pytest.skip("this case has none")
    model, io = tiny(case), case.io
    labels = io["class_ids" if "class_ids" in io else "caption_features"]
    dropped = torch.zeros(len(labels), dtype=torch.bool)
    for suffix in ("", "_sample0_dropped"):
        if suffix:  # the condition and its control are dropped together
            labels, dropped = torch.cat([model.unconditional(labels)[:1], labels[1:]]), torch.arange(len(labels)) == 0
        logits = model(labels, condition(model, case)[2], io["image_ids"], io["control_image"], dropped)
        torch.testing.assert_close(logits, io[f"train_logits{suffix}"], **CLOSE)
        loss = F.cross_entropy(logits.flatten(0, 1), io["image_ids"].flatten())
        torch.testing.assert_close(loss, io[f"train_loss{suffix}"], **CLOSE)


@torch.no_grad()
def written(model, case, images, scale: float, strength: float = 1.0) -> torch.Tensor:
    embedded, none, mask = condition(model, case)
    control = model.control(images, strength)
    if scale != 1:
        embedded, mask = torch.cat([embedded, none]), torch.cat([mask, mask])
        control = torch.cat([control, torch.zeros_like(control)], dim=1)
    session = LlamaGenSession(model, embedded, mask, scale != 1, control)
    grid = torch.full((len(images), session.length), -1)
    *_, last = Sequential()(session, grid, Sampling(temperature=0), scale, Recorded(torch.zeros(grid.shape)))
    return last.tokens


def test_greedy_ids(case):
    model, io = tiny(case), case.io
    images = io["control_image"]
    assert torch.equal(written(model, case, images, 1.0), io["ids_greedy_cfg1"])
    assert torch.equal(written(model, case, images, 4.0), io["ids_greedy_cfg4"])
    if "ids_greedy_cfg4_strength06" in io:
        assert torch.equal(written(model, case, images, 4.0, 0.6), io["ids_greedy_cfg4_strength06"])


@torch.no_grad()
def test_strength_works_without_guidance_and_nothing_leaks_from_call_to_call(golden):
    case = golden("controlar/t2i_canny_square")
    model, images = tiny(case), case.io["control_image"]
    plain = written(model, case, torch.zeros_like(images), 1.0, 0.0)
    assert torch.equal(written(model, case, images, 1.0, 0.0), plain)  # strength 0 is no control
    assert not torch.equal(written(model, case, images, 1.0), plain)
    embedded, _, mask = condition(model, case)
    session = LlamaGenSession(model, embedded, mask, guided=False)
    grid = torch.full((2, 16), -1)
    *_, last = Sequential()(session, grid, Sampling(temperature=0), 1.0, Recorded(torch.zeros(2, 16)))
    assert torch.equal(last.tokens, plain)


@torch.no_grad()
def test_sizes_that_do_not_fit(golden):
    model = tiny(golden("controlar/t2i_canny_square"))
    with pytest.raises(ValueError, match="is 40 x 64: expected multiples of 16"):
        model.control(torch.zeros(1, 3, 64, 40))
    with pytest.raises(ValueError, match="at most 16 cells"):
        model.control(torch.zeros(1, 3, 64, 96))
    with pytest.raises(ValueError, match="expected a multiple of 3"):
        ControlAR(depth=4)


PUBLISHED = {
    "canny_MR": ("dinov2-small", 48, "XL"),
    "depth_MR": ("dinov2-small", 48, "XL"),
    "hed": ("dinov2-small", 32, "XL"),
    "seg_cocostuff": ("dinov2-small", 32, "XL"),
    "edge_base": ("dinov2-base", 32, "XL"),
    "depth_base": ("dinov2-base", 32, "XL"),
    "c2i_B_layout_only": ("vit-small", 16, "B"),
    "c2i_L_layout_only": ("vit-small", 16, "L"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_key_and_shape_has_its_place(name):
    encoder, grid, size = PUBLISHED[name]
    kind = encoder.partition("-")[0]
    with torch.device("meta"):
        classes = 1000 if name.startswith("c2i") else None
        model = ControlAR(kind, ENCODERS[encoder], grid=grid, classes=classes, **SIZES[size])
        published = {key: torch.empty(shape) for key, shape in published_keys("controlar")[name].items()}
    assert shapes(model) == {key: list(value.shape) for key, value in converted(published, kind).items()}


def code(width: int, height: int) -> Image.Image:
    """A picture with edges."""
    image = Image.new("RGB", (width, height), "white")
    image.paste((200, 30, 30), (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    return image


def piped(case, any_size: bool = True) -> ControlARPipeline:
    """A tiny model of classes, with a picture tokenizer of its 16-pixel cells."""
    codes = case.config["vocab_size"]
    vq = llamagen_vq.network((1, 1, 1, 1, 1), width=32, latent_channels=32, codes=codes, code_width=8).eval()
    pipe = ControlARPipeline(tiny(case), vq, any_size=any_size)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pipeline_follows_the_image_and_keeps_its_shape(golden, tmp_path):
    torch.manual_seed(0)
    pipe = piped(golden("controlar/c2i_canny"))
    side = pipe.transformer.config.grid * 16
    call = {"guidance_scale": 4.0, "temperature": 0, "control_type": "canny"}
    out = pipe(["class:1", "class:2"], control_image=code(side, side), **call)
    assert out.images[0].size == (side, side)
    edges = torch.from_numpy(canny(np.asarray(code(side, side))))[None]
    added = pipe.transformer.control(as_control(edges)[None])
    embed, ids = pipe.transformer.cls_embedding, torch.tensor([1, 2])
    none = torch.full_like(ids, pipe.transformer.config.classes)
    session = LlamaGenSession(
        pipe.transformer,
        torch.cat([embed(ids), embed(none)]),
        torch.ones(4, 1, dtype=torch.bool),
        True,
        torch.cat([added, added, torch.zeros_like(added).repeat(1, 2, 1, 1)], dim=1),
    )
    grid = torch.full((2, session.length), -1)
    *_, last = Sequential()(session, grid, Sampling(temperature=0), 4.0, Recorded(torch.zeros(grid.shape)))
    assert torch.equal(out.tokens, last.tokens)

    wide = pipe("class:1", control_image=code(side, side // 2), size=(side, side // 2), **call)
    assert wide.images[0].size == (side, side // 2)
    assert wide.tokens.shape == (1, pipe.length // 2)
    free = pipe("class:1", control_image=code(400, 100), **call)
    assert free.images[0].width > 3 * free.images[0].height

    pipe.save_pretrained(tmp_path)
    again = argen.load(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.config.any_size
    same = again(["class:1", "class:2"], control_image=[code(side, side)] * 2, **call)
    assert torch.equal(same.tokens, out.tokens)


def test_a_request_with_a_control_is_made_again_from_its_image(golden, tmp_path):
    torch.manual_seed(0)
    pipe = piped(golden("controlar/c2i_canny"))
    grey = code(300, 300).convert("LA")
    request = Request("class:1", seed=3, num_images=2, control=Control(grey, "canny", 0.5))
    *_, job = pipe.run(request)
    save_images(list(zip(job.images, job.requests, strict=True)), [tmp_path / "1.png", tmp_path / "2.png"])
    saved = read_request(tmp_path / "2.png")
    assert (saved.seed, saved.control.kind, saved.control.strength) == (4, "canny", 0.5)
    assert saved.control.size == saved.control.image.size == job.images[0].size
    *_, again = pipe.run(saved)
    assert torch.equal(again.tokens[0], job.tokens[1])


def test_control_images_that_do_not_fit_are_refused_in_one_line(golden):
    pipe = piped(golden("controlar/c2i_canny"), any_size=False)
    side = pipe.transformer.config.grid * 16

    def refused(match: str, image: Image.Image, **more):
        with pytest.raises(ValueError, match=match):
            pipe("class:1", control_image=image, **more)

    refused(f"300 x 100, of another shape than the image asked for, {side} x {side}: crop it$", code(300, 100))
    refused("1 x 1: expected at least 16 x 16", code(1, 1))
    refused("unknown control type 'pose'", code(64, 64), control_type="pose")
    refused("control_strength is -1", code(64, 64), control_strength=-1)
    refused(f"makes images of {side} x {side} only", code(64, 32), size=(32, 16))
    pipe = piped(golden("controlar/c2i_canny"))
    refused("crop it or ask for the size", code(300, 100), size=(side, side))
    refused("expected multiples of 16", code(64, 64), size=(40, 40))
    refused("too long and thin", code(3000, 16))
    with pytest.raises(ValueError, match="got 2 control images for 1 prompt: expected one for each"):
        pipe("class:1", control_image=[code(64, 64)] * 2)


def test_a_model_without_control_says_so(pipe):
    with pytest.raises(ValueError, match="takes no control image"):
        pipe("a red apple", control_image=code(128, 128))


def test_released_files_are_read_where_they_lie(golden, monkeypatch, tmp_path):
    encoder = ENCODERS["dinov2-small"] | {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}
    monkeypatch.setitem(ENCODERS, "dinov2-small", encoder)
    monkeypatch.setitem(SIZES, "XL", {"dim": 48, "depth": 3, "heads": 4})
    monkeypatch.setattr(llamagen_vq, "MULTIPLIERS", {16: (1, 1, 1, 1, 1)})
    monkeypatch.setattr(llamagen_vq, "network", partial(llamagen_vq.network, width=32, latent_channels=32, codes=64))
    monkeypatch.setattr(controlar, "read_t5", lambda: (None, None))
    model = ControlAR("dinov2", encoder, grid=48, **SIZES["XL"])
    published = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(published | {"condition_embeddings.weight": torch.zeros(2, 48)}, tmp_path / "canny_MR.safetensors")
    torch.save({"model": golden("llamagen_vq/f16").weights}, tmp_path / "vq_ds16_t2i.pt")
    pipe = argen.load(tmp_path / "canny_MR.safetensors")
    assert (pipe.length, pipe.config.any_size, pipe.transformer.adapter.resize) == (2304, True, "nearest")
    assert (pipe.defaults.guidance_scale, pipe.defaults.top_k) == (4.0, 2000)
    save_file(
        {key: value for key, value in published.items() if "adapter_mlp" not in key}, tmp_path / "hed.safetensors"
    )
    with pytest.raises(ValueError, match="missing adapter_mlp.fc1.weight"):
        argen.load(tmp_path / "hed.safetensors")
