"""Control pictures against what the official extractors make of the same picture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn
from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, ResNetConfig

from argen.cli.main import main
from argen.command import CONTROLS
from argen.models import annotators
from argen.models.annotators import HED, KINDS, LineArt, annotate, as_control, canny, depth_image, resized


def filled(network: nn.Module) -> nn.Module:
    """The weights that the golden case prescribes instead of the published files."""
    for number, (name, value) in enumerate(sorted(network.state_dict().items())):
        index = np.arange(value.numel(), dtype=np.int64)
        u = ((31 * index**2 + 17 * index + 1009 * number) % 65537) / 32768 - 1
        if name == "norm":
            u = 100 + 20 * u
        elif value.ndim > 1:
            u = u * np.sqrt(6 / value[0].numel()) * (0.02 if name.endswith("projection.weight") else 1)
        else:
            u = u * 0.1
        value.copy_(torch.from_numpy(u).reshape(value.shape))
    return network.eval()


@pytest.fixture
def io(golden):
    return golden("controlar/extractors").io


@pytest.fixture
def pixels(io):
    return io["image_rgb_uint8"].permute(2, 0, 1)[None].float()


@torch.no_grad()
def test_hed(io, pixels):
    edges = filled(HED())(pixels)[0]
    torch.testing.assert_close(edges, io["hed_0_255"], atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(as_control(edges)[None], io["control_hed"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_line_art(io, pixels):
    network = filled(LineArt())
    drawing = network(pixels)
    torch.testing.assert_close(drawing, io["lineart_0_1"], atol=1e-4, rtol=0)
    torch.testing.assert_close(network(pixels / 255), io["lineart_from_0_1_input"], atol=1e-4, rtol=0)
    black = as_control(255 * drawing[0])[None]
    torch.testing.assert_close(black, io["control_lineart_black_on_white"], atol=2e-4, rtol=0)
    torch.testing.assert_close(-black, io["control_lineart_white_on_black"], atol=2e-4, rtol=0)


def test_canny(io):
    image = io["image_rgb_uint8"].numpy()
    assert np.array_equal(canny(image), io["canny_100_200"].numpy())
    assert np.array_equal(canny(image, 50, 100), io["canny_50_100"].numpy())
    control = as_control(torch.from_numpy(canny(image))[None])[None]
    torch.testing.assert_close(control, io["control_canny"], atol=1e-6, rtol=0)


def test_depth(io):
    for recipe in ("dpt", "midas"):
        control = as_control(depth_image(io["raw_depth"], recipe))[None]
        torch.testing.assert_close(control, io[f"control_depth_{recipe}"], atol=1e-4, rtol=0)


def test_every_kind_makes_a_control_image(io, monkeypatch):
    image = Image.fromarray(io["image_rgb_uint8"].numpy())
    monkeypatch.setattr(annotators, "_network", lambda cls, *where: filled(cls()))
    monkeypatch.setattr(annotators, "_pretrained", lambda cls, repo: Depth())
    monkeypatch.setitem(KINDS, "segments", KINDS["map"])  # has a test of its own
    torch.testing.assert_close(annotate(image, "hed"), io["hed_0_255"], atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(annotate(image, "lineart") / 255, io["lineart_0_1"][0], atol=1e-4, rtol=0)
    for kind in KINDS:
        control = annotate(image, kind)
        assert control.shape in [(1, image.height, image.width), (3, image.height, image.width)], kind
        assert 0 <= control.min() <= control.max() <= 255.001
    assert CONTROLS.replace(" or ", ", ").split(", ") == list(KINDS)
    with pytest.raises(ValueError, match="unknown control type 'pose': expected one of canny, hed"):
        annotate(image, "pose")


def test_segments_have_the_colours_of_coco_stuff(monkeypatch):
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        out_features=[f"stage{i}" for i in range(1, 5)],
    )
    decoder = DetrConfig(d_model=32, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=6)
    decoder.encoder_layers = decoder.decoder_layers = 1
    torch.manual_seed(0)
    config = MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=backbone, decoder_config=decoder
    )
    config.id2label = {0: "tree", 1: "person", 2: "sky-other", 3: "no such thing"}
    network = MaskFormerForInstanceSegmentation(config).eval()
    monkeypatch.setattr(annotators, "_pretrained", lambda cls, repo: network)
    control = annotate(Image.effect_noise((80, 48), 80).convert("RGB"), "segments")
    assert control.shape == (3, 48, 80)
    known = {(64, 160, 192), (0, 192, 64), (64, 224, 64), (0, 0, 0)}
    assert {tuple(colour) for colour in control.flatten(1).T.tolist()} <= known

    def certain(pixel_values):
        """The left half is a person, the rest sky."""
        assert pixel_values.shape == (1, 3, 640, 1056)
        class_logits = torch.full((1, 2, 5), -20.0)
        class_logits[0, 0, 1] = class_logits[0, 1, 2] = 20
        masks = torch.full((1, 2, 12, 20), 9.0)
        masks[0, 0, :, 10:] = masks[0, 1, :, :10] = -9
        return SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=masks)

    certain.config = config
    monkeypatch.setattr(annotators, "_pretrained", lambda cls, repo: certain)
    control = annotate(Image.new("RGB", (80, 48)), "segments")
    assert control[:, 20, 5].tolist() == [0, 192, 64]
    assert control[:, 20, 75].tolist() == [64, 224, 64]


class Depth(nn.Module):
    """Stands for DPT: the depth is the brightness, at half the size."""

    def forward(self, pixel_values):
        self.predicted_depth = 2 + F.avg_pool2d(pixel_values.mean(dim=1), 2)
        return self


def test_images_of_any_mode_come_flat_and_in_size():
    glass = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    assert resized(glass, "canny", (32, 16)).getpixel((5, 5)) == (255, 255, 255)
    assert resized(Image.new("L", (40, 20), 7), "map", (40, 20)).getpixel((0, 0)) == (7, 7, 7)
    segments = Image.new("RGB", (40, 20), "red")
    segments.paste((0, 0, 255), (0, 0, 20, 20))
    colours = resized(segments, "seg", (32, 16)).getcolors()
    assert sorted(colour for _, colour in colours) == [(0, 0, 255), (255, 0, 0)]


def test_the_command_writes_edges(tmp_path, capsys):
    Image.new("RGB", (64, 48), "white").save(tmp_path / "blank.png")
    image = Image.new("RGBA", (64, 48), "white")
    image.paste((0, 0, 0, 255), (16, 16, 48, 32))
    image.save(tmp_path / "box.png")
    out = tmp_path / "edges.png"
    assert main(["control", str(tmp_path / "box.png"), "--type", "canny", "-o", str(out), "--size", "128x96"]) == 0
    edges = np.asarray(Image.open(out))
    assert edges.shape == (96, 128, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert edges[60:68, 40].max() == 255  # the lower side
    assert edges[45:55, 60].max() == 0  # inside
    assert main(["control", str(tmp_path / "blank.png"), "--type", "pose", "-o", str(out)]) == 2
    assert "unknown control type 'pose'" in capsys.readouterr().err


def test_canny_is_opencvs():
    """Bit by bit, on noise, on smooth images and on sharp ones, of any shape."""
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for number in range(45):
        height, width = rng.integers(3, 160, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        if number % 3:
            image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 4))))
        image = np.asarray(image)
        if number % 3 == 2:
            image = np.clip((image.astype(float) - 128) * 8 + 128, 0, 255).astype(np.uint8)
        for low, high in ((100, 200), (30, 90), (0, 10)):
            assert np.array_equal(canny(image, low, high), cv2.Canny(np.ascontiguousarray(image), low, high))
