"""The one reader of images: files, bytes and base64 -> RGB or RGBA of 8 bits, upright (see `tokenizers_img.pixels.normalized`).

Of an animation the first frame is read. Every error names the file, or what was sent.
"""

import base64
import binascii
import re
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

from PIL import Image, ImageOps, UnidentifiedImageError

from tokenizers_img.pixels import normalized, on_white, upright

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI", "DDS", "TGA", "ICO")
SENT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # from another machine
MOST_BYTES, MOST_PIXELS = 32 * 2**20, 25_000_000  # of an image that is sent
PNG_START, TEXT_CHUNKS = b"\x89PNG\r\n\x1a\n", (b"zTXt", b"iTXt", b"iCCP")  # the chunks that are compressed


class TooLarge(ValueError):
    """A body or an image is larger than is taken.

    Attributes:
        param: the field that it was sent in, where it is known.
    """

    param: str | None = None


def open_image(path: str | Path) -> Image.Image:
    """Read an image file.

    Raises:
        FileNotFoundError, ValueError: there is no such file; it is no image, damaged, or too large to be one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image at {path}")
    return decode_image(Path(path).read_bytes(), str(path))


def decode_image(
    data: bytes, name: str, formats: tuple[str, ...] = FORMATS, max_pixels: int | None = None
) -> Image.Image:
    """The bytes of an image file -> RGB or RGBA; its size is looked at before it is decoded.

    Args:
        name: of the file, for errors.
        formats: that are tried, as Pillow names them.
        max_pixels: None for Pillow's own limit.

    Raises:
        TooLarge, ValueError: too many pixels; no image, or a damaged one.
    """
    try:
        try:
            image = _opened(data, name, formats, max_pixels)
        except ValueError as error:
            if isinstance(error, TooLarge) or not data.startswith(PNG_START):
                raise
            image = _opened(without_text(data), name, formats, max_pixels)  # Pillow refuses large compressed texts
        return normalized(image)
    except TooLarge:
        raise
    except Exception as error:  # plugins of Pillow raise almost anything on damaged files
        reason = "its data are damaged or of another kind"
        if not isinstance(error, UnidentifiedImageError) and str(error):
            reason = " ".join(str(error).split())
        raise ValueError(
            f"{name} could not be read as an image ({reason}): expected a PNG, JPEG or WebP file"
        ) from error


def _opened(data: bytes, name: str, formats: tuple[str, ...], max_pixels: int | None) -> Image.Image:
    most = max_pixels or 2 * (Image.MAX_IMAGE_PIXELS or 2**31)
    refusal = f"{name} has too many pixels: expected at most {most // 10**6} million"
    try:
        image = Image.open(BytesIO(data), formats=formats)
        if image.width * image.height > most:
            raise TooLarge(refusal)
        image.load()
    except Image.DecompressionBombError as error:
        raise TooLarge(refusal) from error
    return image


def without_text(data: bytes) -> bytes:
    """A PNG file without its compressed texts and colour profile."""
    chunks, at = [PNG_START], len(PNG_START)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] not in TEXT_CHUNKS:
            chunks.append(data[at:end])
        at = end
    return b"".join(chunks)


def read_image(data: bytes, name: str = "the image") -> Image.Image:
    """An image that was sent. Raises as `decode_image` does, and `TooLarge` above `MOST_BYTES` or `MOST_PIXELS`."""
    if len(data) > MOST_BYTES:
        raise TooLarge(f"{name} is larger than {MOST_BYTES // 2**20} MB: send a smaller one")
    return decode_image(data, name, SENT_FORMATS, MOST_PIXELS)


def from_base64(text: str, name: str = "the image") -> Image.Image:
    """An image in base64 of either alphabet, wrapped or not, padded or not, with "data:image/png;base64," before it or
    without. Raises as `read_image` does.
    """
    try:
        if text.lstrip().lower().startswith("data:"):
            text = unquote(text.partition(",")[2])
        digits = re.sub(r"\s+", "", text).rstrip("=").translate(str.maketrans("-_", "+/"))
        data = base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
        if not data:
            raise ValueError("it is empty")
    except (AttributeError, binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is not base64: expected that of a PNG, JPEG or WebP file") from error
    return read_image(data, name)


def fitted(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """An image scaled into a size that a client wants; one of another shape is padded with white. None keeps it."""
    if size is None or size == image.size:
        return image
    return ImageOps.pad(on_white(upright(image)), size, Image.Resampling.LANCZOS, color="white")


def fitted_box(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where `fitted` puts an image of `image_size` inside one of `size`: left, top, right, bottom."""
    (width, height), (most_wide, most_high) = image_size, size
    if width * most_high > most_wide * height:
        wide, high = most_wide, round(height / width * most_wide)
    else:
        wide, high = round(width / height * most_high), most_high
    left, top = round((most_wide - wide) / 2), round((most_high - high) / 2)
    return left, top, left + wide, top + high
