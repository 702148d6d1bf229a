"""What a tokenizer of pictures keeps."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.utils import numpy_to_pil
from PIL import Image
from torch import Tensor

from argen.eval.images import ImageArray, ImageSet, cropped, digest
from argen.eval.metrics import psnr, ssim
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.pixels import from_pil, from_uint8
from tokenizers_img.seed.tokenizer import SeedTokenizer

MAX_LATENTS = 512  # rows or columns


@torch.no_grad()
def reconstruct(tokenizer: ImageTokenizer, images: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images [B, H, W, 3] uint8 -> reconstructions [B, 3, H, W] in [0, 1], and their ids [B, N] or latents [B, C, h, w]; both on
    the CPU. With `count`, from the first `count` ids alone."""
    reconstructed, encoded = [], []
    for part in images.split(64):
        encoded.append(tokenizer.encode(from_uint8(part).to(tokenizer.device, tokenizer.dtype))[:, :count])
        reconstructed.append(decoded(tokenizer, encoded[-1], from_uint8(part)).cpu())
    return torch.cat(reconstructed), torch.cat(encoded).cpu()


def check_count(tokenizer: ImageTokenizer, count: int | None, present: int | None = None) -> None:
    """Raises:
    ValueError: the tokenizer can make nothing of the first `count` tokens alone, or of so many of those `present`; None is all.
    """
    if count is None:
        return
    most = tokenizer.config.get("tokens")
    if most is None:
        raise ValueError(
            f"tokens is {count}, but this tokenizer needs all of them: leave it out (FlexTok takes any number)"
        )
    if not 1 <= count <= (present or most):
        raise ValueError(f"tokens is {count}: expected 1 to {present or most}")


def evaluate(tokenizer: ImageTokenizer, images: Tensor) -> dict[str, float]:
    """PSNR in dB, mean of the pictures [B, H, W, 3] uint8; of a tokenizer with codes, the share of them that they use."""
    reconstructed, encoded = reconstruct(tokenizer, images)
    scores = {"psnr": psnr(reconstructed, from_uint8(images)).mean().item()}
    if "n_embed" in tokenizer.config:
        scores["codes_used"] = encoded.unique().numel() / tokenizer.config.n_embed
    return scores


@torch.no_grad()
def encoded(tokenizer: ImageTokenizer, image: Image.Image) -> tuple[Tensor, Tensor]:
    """A picture as the tokenizer takes it, [1, 3, S, S] in [0, 1], and its ids [1, N] or latents [1, C, h, w]."""
    squashed = isinstance(tokenizer, SeedTokenizer)
    pixels = tokenizer.prepare(image) if squashed else from_pil(image, tokenizer.config.image_size)
    pixels = pixels[None].to(tokenizer.device)
    return pixels, tokenizer.encode(pixels)


@torch.no_grad()
def decoded(tokenizer: ImageTokenizer, tokens: Tensor, like: Tensor | None = None) -> Tensor:
    """Decode ids or latents to pixels [B, 3, H, W] in [0, 1]; resized to the size of the pixels `like`, if given.

    Raises:
        ValueError: tokens of another kind or shape than the tokenizer makes.
    """
    tokens = _checked(tokenizer, tokens)
    pixels = tokenizer.decode(tokens).float().clamp(0, 1)
    if like is None or pixels.shape == like.shape:
        return pixels
    return F.interpolate(pixels, like.shape[2:], mode="bilinear", antialias=True, align_corners=False)


def _checked(tokenizer: ImageTokenizer, tokens: Tensor) -> Tensor:
    """Ids [B, N] as int64, latents [B, C, h, w] in the tokenizer's own precision."""
    shape = list(tokens.shape[1:])
    if "n_embed" in tokenizer.config:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"the tokens are {tokens.dtype} of the shape {shape}: expected a row of whole numbers")
        return tokens.long()
    channels = tokenizer.config.latent_channels
    if (
        tokens.ndim != 4
        or shape[0] != channels
        or min(shape) < 1
        or max(shape) > MAX_LATENTS
        or not tokens.isfinite().all()
    ):
        raise ValueError(
            f"the tokens are of the shape {shape}: expected finite latents of {channels} channels, rows and columns"
        )
    return tokens.to(tokenizer.dtype)


class Fitted(ImageSet):
    """Pictures cropped, then padded to a tokenizer's square: what goes in, and what its output is compared with."""

    def __init__(self, images: ImageSet, size: int, crop: str | None):
        self.images, self.size, self.crop = images, size, crop
        self.identity = digest([images.identity, size, crop])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageArray:
        pixels = from_pil(Image.fromarray(cropped(self.images[index], self.crop)), self.size)
        return (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def reconstructor(
    tokenizer: ImageTokenizer, images: ImageSet, count: int | None
) -> Callable[[range], list[Image.Image]]:
    """Numbers of pictures -> what the tokenizer makes of them, or of their first `count` tokens."""

    def make(rows: range) -> list[Image.Image]:
        real = torch.stack([torch.tensor(images[index]) for index in rows])
        reconstructed, _ = reconstruct(tokenizer, real, count)
        return numpy_to_pil(reconstructed.permute(0, 2, 3, 1).numpy())

    return make


def compare(tokenizer: ImageTokenizer, reconstructed: ImageSet, real: ImageSet) -> dict[str, dict]:
    """PSNR and SSIM of the 8-bit pictures and, of a tokenizer with codes, the share of them that the real ones use."""
    sums, used = {"PSNR (dB)": 0.0, "SSIM": 0.0}, set()
    for first in range(0, len(real), 64):
        rows = range(first, min(first + 64, len(real)))
        pair = [torch.stack([torch.tensor(side[index]) for index in rows]) for side in (reconstructed, real)]
        for name, metric in (("PSNR (dB)", psnr), ("SSIM", ssim)):
            sums[name] += metric(*(from_uint8(side) for side in pair)).sum().item()
        if "n_embed" in tokenizer.config:
            ids = tokenizer.encode(from_uint8(pair[1]).to(tokenizer.device, tokenizer.dtype))
            used |= set(ids.unique().tolist())
    scores = {name: total / len(real) for name, total in sums.items()}
    if used:
        scores["codes used"] = len(used) / tokenizer.config.n_embed
    return {name: {"value": value, "n": len(real)} for name, value in scores.items()}
