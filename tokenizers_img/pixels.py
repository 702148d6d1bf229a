"""Images to tensors, and back; an image of any mode -> upright, of 8 bits, with or without its alpha."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP


def as_image(image: Image.Image | np.ndarray | Tensor, what: str = "the image") -> Image.Image:
    """An image as diffusers takes it -> of Pillow: one of Pillow; an array [H, W] or [H, W, C]; a tensor [H, W] or [C, H, W]; both with or
    without a batch of 1 before, bool, uint8 or floats in [0, 1].

    Raises:
        ValueError: something else, or another shape or range.
    """
    if isinstance(image, Image.Image):
        return image
    expected = "an image of Pillow, an array [H, W, C] or a tensor [C, H, W] of bytes or of numbers from 0 to 1"
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(f"{what} is a {type(image).__name__}: expected {expected}")
    values = (
        image.detach().cpu().float().numpy()
        if isinstance(image, Tensor) and image.is_floating_point()
        else np.asarray(image)
    )
    values = values[0] if values.ndim == 4 and len(values) == 1 else values
    if values.ndim == 3 and (isinstance(image, Tensor) or values.shape[0] == 1 != values.shape[2]):
        values = np.moveaxis(values, 0, 2)
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or not values.size:
        raise ValueError(f"{what} has the shape {list(image.shape)}: expected {expected}")
    is_8_bit = values.dtype.kind in "iu" and values.dtype != np.uint8 and values.min() >= 0 and values.max() <= 255
    if values.dtype.kind == "b" or (values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1):
        values = np.rint(255 * values.astype(np.float64))
    elif values.dtype != np.uint8 and not is_8_bit:
        raise ValueError(f"{what} holds {values.dtype} out of range: expected {expected}")
    return Image.fromarray(values.astype(np.uint8))


def normalized(image: Image.Image) -> Image.Image:
    """An image of any mode -> RGB, or RGBA where it has transparency; turned by EXIF, scaled to 8 bits, its `info` kept.

    Raises:
        ValueError: its colours cannot be converted, e.g. those of LAB.
    """
    image = eight_bit(turned(image))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def turned(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says it is seen; as it is stored where its EXIF cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises almost anything on damaged EXIF
        return image


def eight_bit(image: Image.Image) -> Image.Image:
    """Scale a 16-bit, 32-bit or float image to "L"; images of other modes stay.

    16-bit values are divided by 257. 32-bit and float values depend on the range they lie in: floats within [0, 1] are
    multiplied by 255, whole numbers within [0, 255] stay, other integers within [0, 65535] are divided by 257; of all others the
    smallest becomes 0 and the largest 255. What is not finite becomes 0, or 255 for +infinity.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        scaled = (values.astype(np.uint32) + 127) // 257
    else:
        scaled = _by_range(values.astype(np.float64), floats=image.mode == "F")
    grey = Image.fromarray(scaled.astype(np.uint8))
    transparent = image.info.get("transparency")  # of a 16-bit PNG: the value that is
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    grey.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return grey


def _by_range(values: np.ndarray, floats: bool) -> np.ndarray:
    """Numbers [H, W] of any range -> 0 to 255, see `eight_bit`."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, neginf=low, posinf=high)
    if floats and low >= 0 and high <= 1:
        return np.rint(255 * values)
    if low >= 0 and high <= 255 and (values == np.rint(values)).all():
        return values
    if not floats and low >= 0 and high <= 65535:
        return (values + 127) // 257
    return np.rint((values - low) * (255 / max(high - low, np.finfo(float).tiny)))


def upright(image: Image.Image) -> Image.Image:
    """An image of any mode -> RGBA, turned and scaled as `normalized` does."""
    image = normalized(image)
    return image if image.mode == "RGBA" else image.convert("RGBA")


def on_white(image: Image.Image) -> Image.Image:
    """RGBA -> RGB, laid on white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def opaque(image: Image.Image) -> Image.Image:
    """An image of any mode -> RGB, upright; transparency is dropped, so that the colour under it is seen."""
    image = normalized(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_mask(image: Image.Image) -> Image.Image:
    """A mask of any mode -> "L", upright: white is chosen, what is transparent is not, whatever its colour."""
    image = upright(image)
    return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("L")


def from_pil(image: Image.Image, size: int) -> Tensor:
    """A picture of any size and mode -> pixels [3, size, size] in [0, 1]: padded to a square and laid on white."""
    image = upright(image)
    if image.size != (size, size):
        image = ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color=(255, 255, 255, 0))
    return torch.from_numpy(np.array(on_white(image))).permute(2, 0, 1).float() / 255


def from_uint8(images: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 -> pixels [B, 3, H, W] in [0, 1]; the memory stays channels last."""
    return images.permute(0, 3, 1, 2).float() / 255


def to_pil(pixels: Tensor) -> Image.Image:
    """Pixels [3, H, W] -> RGB; values are clamped to [0, 1]."""
    pixels = pixels.detach().clamp(0, 1)
    return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).cpu().numpy())
