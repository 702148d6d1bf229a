"""Control pictures against what the official extractors make of the same picture."""

import numpy as np
import pytest
import torch
from torch import nn

from argen.models.annotators import HED, LineArt, as_control, canny, depth_picture


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
    picture = io["image_rgb_uint8"].numpy()
    assert np.array_equal(canny(picture), io["canny_100_200"].numpy())
    assert np.array_equal(canny(picture, 50, 100), io["canny_50_100"].numpy())
    control = as_control(torch.from_numpy(canny(picture))[None])[None]
    torch.testing.assert_close(control, io["control_canny"], atol=1e-6, rtol=0)


def test_depth(io):
    for recipe in ("dpt", "midas"):
        control = as_control(depth_picture(io["raw_depth"], recipe))[None]
        torch.testing.assert_close(control, io[f"control_depth_{recipe}"], atol=1e-4, rtol=0)
