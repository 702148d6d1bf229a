"""ControlAR against the official code's numbers and the published key lists."""

import pytest
import torch
import torch.nn.functional as F
from conftest import published_keys, shapes
from test_llamagen import condition, sizes

from argen.models.controlar import ENCODERS, ControlAR, converted
from argen.models.llamagen import SIZES, LlamaGenSession
from samplers.logits import Sampling
from samplers.steps import Plain
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
def test_what_the_control_picture_adds(case):
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
    embedded, none, mask = condition(model, case)
    control = model.control(io["control_image"])
    for suffix in ("", "_sample0_dropped"):
        if suffix:  # the condition and its control are dropped together
            embedded = torch.cat([none[:1], embedded[1:]])
            control = torch.cat([torch.zeros_like(control[:, :1]), control[:, 1:]], dim=1)
        logits = model(embedded, mask, io["image_ids"], control)
        torch.testing.assert_close(logits, io[f"train_logits{suffix}"], **CLOSE)
        loss = F.cross_entropy(logits.flatten(0, 1), io["image_ids"].flatten())
        torch.testing.assert_close(loss, io[f"train_loss{suffix}"], **CLOSE)


@torch.no_grad()
def written(model, case, pictures, scale: float, strength: float = 1.0) -> torch.Tensor:
    embedded, none, mask = condition(model, case)
    control = model.control(pictures, strength)
    if scale != 1:
        embedded, mask = torch.cat([embedded, none]), torch.cat([mask, mask])
        control = torch.cat([control, torch.zeros_like(control)], dim=1)
    session = LlamaGenSession(model, embedded, mask, scale != 1, control)
    grid = torch.full((len(pictures), session.length), -1)
    *_, last = Plain()(session, grid, Sampling(temperature=0), scale, torch.zeros(grid.shape))
    return last.tokens


def test_greedy_ids(case):
    model, io = tiny(case), case.io
    pictures = io["control_image"]
    assert torch.equal(written(model, case, pictures, 1.0), io["ids_greedy_cfg1"])
    assert torch.equal(written(model, case, pictures, 4.0), io["ids_greedy_cfg4"])
    if "ids_greedy_cfg4_strength06" in io:
        assert torch.equal(written(model, case, pictures, 4.0, 0.6), io["ids_greedy_cfg4_strength06"])


@torch.no_grad()
def test_strength_works_without_guidance_and_nothing_leaks_from_call_to_call(golden):
    case = golden("controlar/t2i_canny_square")
    model, pictures = tiny(case), case.io["control_image"]
    plain = written(model, case, torch.zeros_like(pictures), 1.0, 0.0)
    assert torch.equal(written(model, case, pictures, 1.0, 0.0), plain)  # strength 0 is no control
    assert not torch.equal(written(model, case, pictures, 1.0), plain)
    embedded, _, mask = condition(model, case)
    session = LlamaGenSession(model, embedded, mask, guided=False)
    grid = torch.full((2, 16), -1)
    *_, last = Plain()(session, grid, Sampling(temperature=0), 1.0, torch.zeros(2, 16))
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
