"""Published checkpoint files: opened safely, their names changed into a library's, and loaded strictly."""

import errno
import json
import logging
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path, PosixPath, WindowsPath
from typing import Any, TypeVar

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor, nn

from tokenizers_img.mapped import AS_STORED, is_plain_zip, read_safetensors, read_zip

Network = TypeVar("Network", bound=nn.Module)

logger = logging.getLogger(__name__)
NAMES = ("model", "module", "net", "network", "generator", "params")  # of a network, in files and in wrappers
AVERAGES = (  # where training scripts put averages of the weights
    *("model_ema", "ema", "ema_state_dict", "state_dict_ema"),
    *(pattern.format(name) for pattern in ("{}_ema", "ema_{}") for name in NAMES),
    *(
        pattern.format(name)
        for pattern in ("ema_{}_state_dict", "{}_ema_state_dict", "{}_state_dict_ema")
        for name in NAMES
    ),
)
WRAPPERS = ("state_dict", *NAMES, *(f"{name}_state_dict" for name in NAMES))  # and the weights
PREFIXES = ("module.", "model.", "net.", "network.", "generator.", "online_model.")
AVERAGED_PREFIXES = ("ema_model.", "model_ema.", "ema.", "module_ema.", "ema_net.", "net_ema.")
BESIDE = re.compile(r"loss\.|(n_averaged|initted|step|decay|num_updates)$")  # the network, in files of training
TRAINING = re.compile(  # files beside the weights
    r".*_optim_states|(optimi[sz]er|optim|(lr_)?scheduler|scaler|sampler|dl_state|random_states|rng_state|training_args|trainer_state|custom_checkpoint)"
    r"([_.-]|$)"
)
FOREIGN = {  # first bytes -> what a file is that no reader of torch knows
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"7z\xbc\xaf": "an archive of 7-Zip",
    b"Rar!": "an archive of RAR",
    b"\x93NUMPY": "an array of NumPy",
    b"\x89HDF": "a file of HDF5",
    b"GGUF": "a file of llama.cpp",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}
TORCH_PICKLES = tuple(b"\x80" + bytes([protocol]) + b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" for protocol in (2, 3, 4, 5))
INNER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")
NUMPY_PARTS = (multiarray.scalar, multiarray._reconstruct)
SETTINGS: list[
    Callable[..., Any] | tuple[Callable[..., Any], str]
] = [  # what else training scripts leave in their files: arguments, paths, numbers of numpy
    Namespace,
    PosixPath,
    WindowsPath,
    np.dtype,
    np.ndarray,
    *{type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"},
    *((part, f"numpy.{core}.multiarray.{part.__name__}") for core in ("core", "_core") for part in NUMPY_PARTS),
]
CONVOLUTIONAL = [  # names of taming-transformers and latent diffusion, and of LlamaGen -> of diffusers
    (r"\bdown\.(\d+)\.", r"down_blocks.\1."),
    (r"\bup\.(\d+)\.", r"up_blocks.\1."),
    (r"\bencoder\.conv_blocks\.", "encoder.down_blocks."),
    (r"\bdecoder\.conv_blocks\.", "decoder.up_blocks."),
    (r"(_blocks\.\d+)\.(block|res)\.", r"\1.resnets."),
    (r"(_blocks\.\d+)\.attn\.", r"\1.attentions."),
    (r"(_blocks\.\d+)\.(down|up)sample\.", r"\1.\2samplers.0."),
    (r"\bmid\.(block_1|0)\.", "mid_block.resnets.0."),
    (r"\bmid\.(attn_1|1)\.", "mid_block.attentions.0."),
    (r"\bmid\.(block_2|2)\.", "mid_block.resnets.1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\bnorm_out\.", "conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]


def read_state_dict(path: str | Path, averaged: bool = True) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, out of the wrappers and without the prefixes that training puts around them.

    Args:
        path: a torch file of any age or a ``.safetensors`` file, whatever its name; the ``.index.json`` of one in shards; or the
            folder that holds either.
        averaged: an exponential moving average of the weights is preferred to the weights, where the file has both.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        ValueError: the file is no checkpoint, is cut off, or holds more than plain tensors, containers and settings.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(Path(path)):
        state |= _tensors(read_file(file), file, averaged)
    return without_prefixes(state, averaged, path)


def weight_files(path: Path) -> list[Path]:
    """The files that make up the checkpoint at `path`, see `read_state_dict`."""
    if path.is_dir():
        indices = sorted(path.glob("*.index.json"))
        indices = [file for file in indices if ".safetensors." in file.name] or indices
        files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and not TRAINING.match(file.name)]
        unsharded = [file for file in files if not SHARD.search(file.name)]
        shards = [file for file in files if SHARD.search(file.name)]
        shards = [file for file in shards if file.suffix == ".safetensors"] or shards
        safe = [file for file in unsharded if file.suffix == ".safetensors"]  # beside the same weights as a torch file
        if len(indices) == 1 and not safe:
            path = indices[0]
        elif len(safe or unsharded) == 1:
            return safe or unsharded
        elif shards and not unsharded:
            return _all_shards(shards)
        else:
            file_names = ", ".join(file.name for file in unsharded[:5]) or "none"
            raise ValueError(
                f"{path} is a folder: expected a checkpoint file, or a folder with one; it holds {file_names}"
            )
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        files = [path.with_name(Path(name).name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of a checkpoint in shards: fetch it again") from error
    _refuse_missing(files)
    return files


def _all_shards(shards: list[Path]) -> list[Path]:
    """Those of one checkpoint, ``NAME-00001-of-00003.safetensors`` or ``.bin`` and so on."""
    start, count, _ = SHARD.split(shards[0].name)
    files = [
        shards[0].with_name(f"{start}-{number:05}-of-{count}{shards[0].suffix}") for number in range(1, int(count) + 1)
    ]
    _refuse_missing(files)
    return files


def _refuse_missing(files: list[Path]) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(f"{files[0].parent} lacks the shards {', '.join(missing[:3])}{more}: fetch them")


def read_file(path: Path) -> Any:
    """What one file holds, be it a torch file or of safetensors.

    Raises:
        ValueError: neither; it is cut off, or holds objects.
    """
    refuse_placeholder(path)
    with path.open("rb") as file:
        start = file.read(9)
    try:
        if _is_safetensors(start) or (path.suffix == ".safetensors" and start[:1] not in b"P\x80"):
            return read_safetensors(path)
        with torch.serialization.safe_globals(SETTINGS), path.open("rb") as file:
            if start.startswith(b"PK") and is_plain_zip(path):
                return read_zip(path)
            return torch.load(file, map_location="cpu", weights_only=True)  # of before torch 1.6, or compressed
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise
        match = re.search(r"GLOBAL (\S+)", str(error))
        if match:
            raise ValueError(
                f"{path} could not be read as a checkpoint (it holds a {match[1]}, which could run code): save its tensors alone"
            ) from error
        lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()
        reason = re.split(r"(?<=\w)[.:;] ", " ".join(lines))[0][:120] or type(error).__name__
        raise ValueError(f"{path} could not be read as a checkpoint ({reason}): fetch it again") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The arguments of the training script that a torch file holds beside its tensors; none in other files."""
    if not path.is_file() or path.name.endswith(".json"):
        return {}
    content = read_file(path)
    settings = content.get("args", content.get("config")) if isinstance(content, dict) else None
    settings = vars(settings) if isinstance(settings, Namespace) else settings
    return settings if isinstance(settings, dict) else {}


def _is_safetensors(start: bytes) -> bool:
    """Whether a file begins with the length of a header, and with the header."""
    return start[5:9] == b"\0\0\0{"


def refuse_placeholder(path: Path) -> None:
    """Refuse what downloads leave in place of a checkpoint, known by its first bytes.

    Raises:
        ValueError: the file is empty, a pointer of Git LFS, a page of a web server or another text, compressed, or of another program.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path} is empty: fetch it again")
    text = start.decode("utf-8", "replace").strip("\ufeff \t\r\n")
    if text.startswith("version https://git-lfs"):
        raise ValueError(
            f"{path} is a pointer of Git LFS, not the checkpoint: run `git lfs pull`, or fetch the file itself from the hub"
        )
    if text.lower().startswith(("<!doctype", "<html", "<head", "<body", "<?xml", "<!--")):
        raise ValueError(f"{path} is a web page (HTML), not a checkpoint: fetch the file itself")
    if kind := _foreign(path, start):
        raise ValueError(f"{path} is {kind}, not a checkpoint: expected a file of torch or of safetensors")
    if not _is_safetensors(start) and all(letter.isprintable() or letter in "\t\r\n" for letter in text[:-1]):
        raise ValueError(f"{path} is a text, not a checkpoint: fetch the file itself")  # which may be anybody's


def _foreign(path: Path, start: bytes) -> str | None:
    """What a file is that holds no tensors of torch, by its first bytes; None where it may."""
    if _is_safetensors(start):
        return None
    if start[257:262] == b"ustar":
        return "an archive of tar"
    if start[:1] == b"\x80" and not any(start.startswith(prefix[: len(start)]) for prefix in TORCH_PICKLES):
        return "a pickle that torch did not write"
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
        if "constants.pkl" in names:
            return "a program of TorchScript"
        if "data.pkl" not in names:
            return "arrays of NumPy" if any(name.endswith(".npy") for name in names) else "a zip archive of other files"
    return next((kind for magic, kind in FOREIGN.items() if start.startswith(magic)), None)


def _tensors(content: Any, path: Path, averaged: bool) -> dict[str, Tensor]:
    """The tensors of the innermost wrapper; which one is logged where the file holds averaged weights, too."""
    wrappers = (*AVERAGES, *WRAPPERS) if averaged else (*WRAPPERS, *AVERAGES)
    names = []
    while isinstance(content, dict) and (inside := [name for name in wrappers if _holds_tensors(content.get(name))]):
        names += inside[:1]
        if len(inside) > 1 and set(inside) & set(AVERAGES):
            logger.warning("%s: the weights under %r are taken, not those under %r", path, inside[0], inside[1])
        content = content[inside[0]]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict, but a {type(content).__name__}")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor) and isinstance(key, str)}
    if not tensors:
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise ValueError(f"{path} holds no state dict: expected tensors by their names, found {keys}")
    return tensors


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(v, Tensor) or _holds_tensors(v) for v in content.values())


def without_prefixes(state: dict[str, Tensor], averaged: bool = True, source: str | Path = "") -> dict[str, Tensor]:
    """Take away what wrappers of training put before the names: ``module.``, ``_orig_mod.`` and their like wherever nearly all names
    begin so; what stands in the middle of a name, too, where it can be nothing else. Of weights and averages of them, both under
    prefixes, one is taken; what few names stand beside the network, as those of metrics, are left out."""
    state = {INNER.sub("", key): value for key, value in state.items()}
    order = (*AVERAGED_PREFIXES, *PREFIXES) if averaged else (*PREFIXES, *AVERAGED_PREFIXES)
    while True:
        under = {prefix: {key.removeprefix(prefix) for key in state if key.startswith(prefix)} for prefix in order}
        wrapper = next((prefix for prefix in order if under[prefix] and _is_wrapper(prefix, under, state)), None)
        if wrapper is None:
            return state
        other = next((prefix for prefix in order if prefix != wrapper and under[prefix] & under[wrapper]), None)
        if other:
            logger.warning("%s: the weights under %r are taken, not those under %r", source, wrapper, other)
        state = {
            key.removeprefix(wrapper): value
            for key, value in state.items()
            if key.startswith(wrapper) or key.startswith("loss.")
        }


def _is_wrapper(prefix: str, under: dict[str, set[str]], state: dict[str, Tensor]) -> bool:
    """Whether the names under a prefix are those of a network, and few beside them, of which none is a part of it."""
    same = tuple(other for other in under if under[other] and len(under[other] & under[prefix]) > len(under[other]) / 2)
    beside = [key for key in state if not key.startswith(same) and not BESIDE.match(key)]
    return 3 * len(beside) < len(under[prefix]) and not any("head" in key for key in beside) if beside else True


def load_strict(model: Network, state: dict[str, Tensor], source: str | Path) -> Network:
    """Load every tensor of `state` into `model`, all names and shapes equal, in the precision of `model`; return it in eval mode. Tensors
    that need no cast stay where they lie, so that of a network from `unfilled` there is one copy, or that of the file.

    Where nothing is missing of what stands under a prefix of `PREFIXES`, that is taken, and what stands beside it is left out.

    Raises:
        ValueError: names what is missing, left over or of another shape.
    """
    expected = model.state_dict()
    state = {key: value for key, value in state.items() if key in expected or not BESIDE.match(key)}
    for prefix in PREFIXES:
        under = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if under.keys() == expected.keys() != state.keys():
            state = under
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} has shape {list(state[key].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}")
    keep = AS_STORED.get()
    for key in list(state):
        value, dtype = state[key], expected[key].dtype
        state[key] = value if keep and value.is_floating_point() and dtype.is_floating_point else value.to(dtype)
    model.load_state_dict(state, assign=True)
    return model.eval()


def to_diffusers(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Tensors of a convolutional autoencoder (taming-transformers, latent diffusion, LlamaGen) -> under the names, and of the
    shapes, of diffusers' `Encoder` and `Decoder`. `levels` of the decoder: `up.N` counts them from the picture's end."""
    converted = {}
    for key, value in state.items():
        key = re.sub(r"\bup\.(\d+)", lambda level: f"up.{levels - 1 - int(level[1])}", key)
        for published, ours in CONVOLUTIONAL:
            key = re.sub(published, ours, key)
        linear = ".attentions." in key and value.ndim == 4  # 1 x 1 convolutions are matrices there
        converted[key] = value[:, :, 0, 0] if linear else value
    return converted
