"""What is kept inside files: a picture's own settings in its PNG, so that it can be made again; the tokens of a picture."""

import base64
import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from argen import __version__
from argen.device import DTYPES
from argen.files import replacing
from argen.images import fitted, open_image
from argen.request import Grid, Request, check_grid
from argen.words import cut

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# PNG texts, as JSON: the request, the grid, the version of argen and a digest of the weights
KEY, TOKENS, MADE_BY = "argen", "argen tokens", "argen version"
COMMAND = "argen command"  # the same of a command that is no request: its name and its settings
OTHER_WEIGHTS = "other weights of the model (or quantized in another way)"
PARAMETERS = "parameters"  # of A1111's text


def save_images(
    images: list[tuple[Image.Image, Request | None]],
    paths: list[Path],
    grids: Sequence[Grid | None] | None = None,
    size: tuple[int, int] | None = None,
) -> None:
    """Write PNG files, each with the request that makes it again, as JSON and as programs read it that know A1111's text, and with
    the tokens that it was made of: all of them, or none.

    Args:
        size: they are scaled to, see `argen.images.fitted`; None for their own.
    """
    with ExitStack() as stack:
        for (image, request), path, grid in zip(images, paths, grids or [None] * len(paths), strict=True):
            image = _scaled(image, size)
            image.save(stack.enter_context(replacing(path)), "PNG", pnginfo=_info(image, request, grid))


def save_made(
    images: Sequence[Image.Image],
    paths: Sequence[Path],
    command: str,
    settings: Mapping[str, Any],
    model: "DiffusionPipeline | torch.nn.Module | None" = None,
) -> None:
    """Write PNG files of a command other than `argen generate`, each with what made it.

    Args:
        settings: of the command, by their names; None is left out.
        model: the network or the pipeline that drew them.
    """
    texts = {
        key: str(value) if isinstance(value, Path) else value for key, value in settings.items() if value is not None
    }
    maker = {"argen": __version__} if model is None else made_by(model)
    for image in images:
        image.info |= {COMMAND: json.dumps({"command": command} | texts), MADE_BY: json.dumps(maker)}
    save_images([(image, None) for image in images], list(paths))


def encoded(
    image: Image.Image,
    request: Request | None = None,
    size: tuple[int, int] | None = None,
    form: str = "png",
    quality: int = 100,
) -> str:
    """An image as a file, in base64.

    Args:
        request: makes the image again; it goes into a PNG file.
        size: it is scaled to, see `argen.images.fitted`; None for its own.
        form: "png", "jpeg" or "webp".
        quality: of the last two, 0 to 100.
    """
    buffer = BytesIO()
    image = _scaled(image, size)
    how = {"pnginfo": _info(image, request)} if form == "png" else {"quality": quality}
    image.save(buffer, form.upper(), **how)
    return base64.b64encode(buffer.getvalue()).decode()


def _scaled(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """An image in another size, with what it says of how it was made."""
    info: dict[Any, Any] = {name: image.info[name] for name in (TOKENS, MADE_BY, PARAMETERS) if name in image.info}
    image = fitted(image, size)
    image.info |= info
    return image


def _info(image: Image.Image, request: Request | None, grid: Grid | None = None) -> PngInfo:
    info = PngInfo()
    if request is None:
        if PARAMETERS in image.info:  # of an image that was not finished
            info.add_itxt(PARAMETERS, image.info[PARAMETERS])
        for name in (COMMAND, MADE_BY) if COMMAND in image.info else ():
            info.add_text(name, image.info[name])
        return info
    info.add_text(KEY, json.dumps(request.to_dict()))
    info.add_itxt(PARAMETERS, infotext(request, image.size))
    if tokens := json.dumps(grid) if grid else image.info.get(TOKENS):
        info.add_text(TOKENS, tokens)
    if MADE_BY in image.info:
        info.add_text(MADE_BY, image.info[MADE_BY])
    return info


def fingerprint(model: "DiffusionPipeline | torch.nn.Module") -> str:
    """A digest of the weights of a pipeline or a network: of names, shapes and some values of each tensor, so that it costs milliseconds. A T5,
    which may be on disk, is left out."""
    digest = hashlib.sha256()
    for name, part in sorted(getattr(model, "components", {"": model}).items()):
        counts = isinstance(part, torch.nn.Module) and type(part).__name__ not in ("T5EncoderModel", "OffloadedT5")
        for key, tensor in part.state_dict().items() if counts else ():
            flat = tensor.detach().flatten()
            last = flat.numel() - 1
            places = torch.linspace(0, last, min(16, flat.numel()), device=flat.device).long()
            some = flat[places.clamp(max=last)]  # float32 rounds large places up
            rounded = some.cpu().bfloat16().double()  # the same in every precision
            digest.update(f"{name}.{key} {list(tensor.shape)}".encode() + rounded.numpy().tobytes())
    return digest.hexdigest()[:16]


def made_by(model: "DiffusionPipeline | torch.nn.Module") -> dict[str, str]:
    """What draws an image: the version of argen, `fingerprint`, and of the network that writes the tokens the precision, and how it is quantized."""
    network = getattr(model, "transformer", model)
    texts = {"argen": __version__, "weights": fingerprint(model)}
    dtype, quantization = getattr(network, "dtype", None), getattr(network, "quantization", None)
    texts |= {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    return texts | ({} if quantization is None else {"quantize": f"int{quantization['bits']}"})


def changes(path: str | Path, now: Mapping[str, str]) -> list[str]:
    """What was another when the image in a file was made, in words, e.g. "dtype bf16, not fp32"; nothing where the file does not say it.

    Args:
        now: from `made_by`.
    """
    try:
        then = dict(read_json(open_image(path), MADE_BY))
    except (KeyError, TypeError, ValueError):
        return []
    others = {name: (then[name], value) for name, value in now.items() if name in then and then[name] != value}
    quantized = then.get("quantize", "none"), now.get("quantize", "none")
    if "weights" in others and quantized[0] != quantized[1]:
        others["quantize"] = quantized
        del others["weights"]
    options = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}  # as they are asked for
    words = {
        name: f"{name} {options.get(old, cut(old))}, not {options.get(new, new)}" for name, (old, new) in others.items()
    }
    return [OTHER_WEIGHTS if name == "weights" else text for name, text in words.items()]


def differences(path: str | Path, pipe: "DiffusionPipeline") -> str | None:
    """`changes`, for who makes the image again; None if nothing is known to be another."""
    others = changes(path, made_by(pipe))
    return f"{path} was made by {' and '.join(others)}: the image may differ" if others else None


def infotext(request: Request, size: tuple[int, int]) -> str:
    """The settings of a picture as A1111 writes them."""
    settings = {
        "Steps": request.steps,
        "Sampler": request.sampler_text,
        "CFG scale": request.guidance_scale,
        "Seed": request.seed,
    }
    settings |= {
        "Size": f"{size[0]}x{size[1]}",
        "Model": request.model,
        "Temperature": request.temperature,
        "Top-k": request.top_k,
    }
    text = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items() if value is not None)
    return f"{request.prompt}\n{text}"


def _quoted(value: str) -> str:
    """A value as A1111 writes it: in quotation marks where programs would cut it at a comma or a colon."""
    return json.dumps(value, ensure_ascii=False) if set(',:"\n') & set(value) else value


def save_tokens(path: Path, tokenizer: str, tokens: np.ndarray) -> None:
    """Write an ``.npz`` file: the id of a tokenizer and what it made of one picture, ids [N] or latents [C, h, w]."""
    with replacing(path) as file:
        np.savez(file, tokenizer=tokenizer, tokens=tokens)


def read_tokens(path: str | Path) -> tuple[str, np.ndarray]:
    """Read a file of `save_tokens`.

    Raises:
        FileNotFoundError, ValueError: there is no such file; it is none of ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of tokens at {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            tokenizer, tokens = file["tokenizer"], file["tokens"]
        if tokenizer.shape or tokenizer.dtype.kind != "U" or tokens.dtype.kind not in "if" or not 1 <= tokens.ndim <= 3:
            raise ValueError("it holds something else")
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(
            f"{path} holds no tokens ({reason}): expected an .npz file made by `argen tokenize`"
        ) from error
    return str(tokenizer), tokens


def read_json(image: Image.Image, name: str):
    """What a text of a PNG file holds as JSON.

    Raises:
        KeyError, ValueError: there is no such text; it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(image.info[name])
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the text {name!r} is no JSON that can be read ({type(error).__name__})") from error


def read_grid(image: Image.Image) -> Grid | None:
    """The tokens inside a picture that argen wrote; None where there are none, or none that can be read."""
    try:
        grid = tuple(map(tuple, read_json(image, TOKENS)))
        check_grid(grid)
    except (KeyError, TypeError, ValueError):
        return None
    return grid


def read_request(path: str | Path) -> Request:
    """The request inside a PNG file that argen wrote.

    Raises:
        ValueError: the picture holds none, or one that cannot be read.
    """
    image = open_image(path)
    if COMMAND in image.info and KEY not in image.info:
        raise ValueError(_not_generated(path, image))
    if KEY not in image.info:
        raise ValueError(
            f"{path} holds no settings of argen: expected a PNG file made by `argen generate` or the web page"
        )
    try:
        return Request.from_dict(read_json(image, KEY))
    except (TypeError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the settings in {path} cannot be used: {reason}") from error


def _not_generated(path: str | Path, image: Image.Image) -> str:
    """Why an image that another command of argen made cannot be made again from its file."""
    try:
        command = str(read_json(image, COMMAND)["command"])
    except (TypeError, ValueError, KeyError):
        command = "another command"
    return (
        f"{path} was made by `argen {cut(command)}`, which generate cannot repeat: run that command again, with the settings in its text "
        f"{COMMAND!r}"
    )
