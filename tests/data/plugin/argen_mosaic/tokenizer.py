"""A tokenizer without training: a token is the colour of a square."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


class Mosaic(ModelMixin, ConfigMixin):
    """Pixels <-> a square grid of ids, one of `n_embed` colours each.

    Args:
        image_size: side of the square images, in pixels.
        patch_size: side of the square that one token stands for, in pixels.
        n_embed: number of colours, a cube.
    """

    @register_to_config
    def __init__(self, image_size: int = 64, patch_size: int = 8, n_embed: int = 64):
        super().__init__()
        self.grid = image_size // patch_size
        shades = torch.linspace(0, 1, round(n_embed ** (1 / 3)))
        self.register_buffer("palette", torch.cartesian_prod(shades, shades, shades))  # [K, 3]

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> ids [B, N] int64."""
        colours = F.avg_pool2d(pixels, self.config.patch_size).flatten(2).mT  # [B, N, 3]
        return torch.cdist(colours, self.palette.expand(len(pixels), -1, -1)).argmin(dim=-1)

    def decode(self, ids: Tensor) -> Tensor:
        """Ids [B, N] -> pixels [B, 3, H, W] in [0, 1]."""
        colours = self.palette[ids].mT.unflatten(2, (self.grid, self.grid))
        return F.interpolate(colours, scale_factor=self.config.patch_size)


def read_mosaic(folder: Path) -> Mosaic:
    """The tokenizer that a card names; it has no weights, so nothing is read from the folder."""
    return Mosaic()
