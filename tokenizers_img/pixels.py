"""Pictures to tensors, and back."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP


def upright(picture: Image.Image) -> Image.Image:
    """A picture of any mode -> RGBA, turned as its camera says."""
    return ImageOps.exif_transpose(picture).convert("RGBA")


def on_white(picture: Image.Image) -> Image.Image:
    """RGBA -> RGB, laid on white."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def from_pil(picture: Image.Image, size: int) -> Tensor:
    """A picture of any size and mode -> pixels [3, size, size] in [0, 1]: padded to a square and laid on white."""
    picture = upright(picture)
    if picture.size != (size, size):
        picture = ImageOps.pad(picture, (size, size), Image.Resampling.LANCZOS, color=(255, 255, 255, 0))
    return torch.from_numpy(np.array(on_white(picture))).permute(2, 0, 1).float() / 255


def from_uint8(pictures: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 -> pixels [B, 3, H, W] in [0, 1]; the memory stays channels last."""
    return pictures.permute(0, 3, 1, 2).float() / 255


def to_pil(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> a picture."""
    return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).cpu().numpy())
