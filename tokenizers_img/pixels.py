"""Pictures to tensors."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def from_pil(picture: Image.Image, size: int) -> Tensor:
    """A picture of any size and mode -> pixels [3, size, size] in [0, 1]: padded to a square and laid on white."""
    picture = ImageOps.exif_transpose(picture).convert("RGBA")
    if picture.size != (size, size):
        picture = ImageOps.pad(picture, (size, size), Image.Resampling.LANCZOS, color=(255, 255, 255, 0))
    ground = Image.new("RGBA", (size, size), "white")
    array = np.asarray(Image.alpha_composite(ground, picture).convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255


def from_uint8(pictures: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 -> pixels [B, 3, H, W] in [0, 1]; the memory stays channels last."""
    return pictures.permute(0, 3, 1, 2).float() / 255
