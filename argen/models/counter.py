"""A small network that counts: how densely an emoji picture is filled with things, differentiably.

Letters in shape comments: B images.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

SIDE, DENSITY = 112, 28  # pixels on a side of what is looked at, cells on a side of the answer


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layers = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()
    return nn.Sequential(*layers, nn.Conv2d(outputs, outputs, 3, 1, 1), nn.GroupNorm(8, outputs), nn.SiLU())


class Counter(ModelMixin, ConfigMixin):
    """Pictures [B, 3, H, W] in [0, 1] -> densities [B, 28, 28], which sum up to the number of things.

    What one thing is takes a view of the whole picture: a large icon may have as many parts as a scene has icons.

    Args:
        widths: channels at 56, 28, 14 and 7 cells on a side.
    """

    @register_to_config
    def __init__(self, widths: tuple[int, ...] = (16, 32, 48, 64)):
        super().__init__()
        self.down = nn.ModuleList(block(*pair, stride=2) for pair in zip((3, *widths), widths, strict=False))
        up = list(reversed(widths[1:]))
        self.up = nn.ModuleList(block(deep + flat, flat) for deep, flat in zip(up, up[1:], strict=False))
        self.head = nn.Conv2d(up[-1], 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x, skips = 2 * F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False) - 1, []
        for layers in self.down:
            x = layers(x)
            skips.append(x)
        for layers, skip in zip(self.up, reversed(skips[1:-1]), strict=True):
            x = layers(torch.cat([F.interpolate(x, skip.shape[2:], mode="nearest"), skip], dim=1))
        return F.softplus(self.head(x) - 4)[:, 0]
