"""A picture's own settings, kept inside its PNG file, so that it can be made again."""

import json
import os
import tempfile
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from argen.request import Request

KEY = "argen"  # the PNG text chunk that holds the request as JSON


def open_picture(path: str | Path) -> Image.Image:
    """A picture file, read whole.

    Raises:
        FileNotFoundError, ValueError: there is no such file; it is no picture, cut off, or too large to be one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        picture = Image.open(path)
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} could not be read as a picture ({error}): expected a PNG, JPEG or WebP file"
        ) from error
    return picture


def save_pictures(pictures: list[tuple[Image.Image, Request | None]], paths: list[Path]) -> None:
    """Write PNG files, each with the request that makes it again: all of them, or none."""
    written: list[tuple[Path, Path]] = []
    try:
        for (picture, request), path in zip(pictures, paths, strict=True):
            info = PngInfo()
            if request:
                info.add_text(KEY, json.dumps(request.to_dict()))
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
            written.append((Path(temporary), path))
            with os.fdopen(handle, "wb") as file:
                picture.save(file, "PNG", pnginfo=info)
        for temporary, path in written:
            temporary.chmod(0o644)
            temporary.rename(path)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def read_request(path: str | Path) -> Request:
    """The request inside a PNG file that argen wrote.

    Raises:
        ValueError: the picture holds none, or one that cannot be read.
    """
    text = open_picture(path).info.get(KEY)
    if text is None:
        raise ValueError(
            f"{path} holds no settings of argen: expected a PNG file made by `argen generate` or the web page"
        )
    try:
        return Request.from_dict(json.loads(text))
    except (TypeError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"the settings in {path} cannot be used: {error}") from error
