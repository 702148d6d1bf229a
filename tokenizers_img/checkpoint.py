"""Published checkpoint files: fetched from the hub, opened safely, their names changed into a library's, and loaded strictly."""

import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

WRAPPERS = ("model_ema", "state_dict", "model", "module")
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


def hub_folder(repo: str, files: Sequence[str]) -> Path:
    """The folder of a hub repository with `files` (names or glob patterns), out of the hub's cache or fetched into it.

    Raises:
        ConnectionError: they are not here and cannot be fetched.
    """
    try:
        return Path(snapshot_download(repo, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConnectionError(
            f"{', '.join(files)} of {repo} is not on this machine and could not be fetched from the hub: connect to the "
            "network, or put it into the hub's cache"
        ) from error


def hub_file(repo: str, name: str) -> Path:
    """One file of a hub repository, see `hub_folder`."""
    path = hub_folder(repo, [name]) / name
    if not path.is_file():  # the cache has the repository, without it
        raise ConnectionError(f"{name} of {repo} is not in the hub's cache: connect to the network to fetch it")
    return path


def download(url: str, path: Path, refusal: str, sha256: str | None = None) -> Path:
    """Fetch one file that lies outside the hub to `path`: all of it, or nothing.

    Args:
        sha256: how its digest begins.

    Raises:
        ConnectionError: `refusal`, where it cannot be fetched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(refusal) from error
    return path


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a torch file, out of a wrapper: the first there is of `WRAPPERS`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is cut off, or holds more than plain tensors and containers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):  # the settings that training scripts leave in their files
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} could not be read as a checkpoint ({error}): fetch it again") from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict")
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def load_strict(model: Network, state: dict[str, Tensor], source: str | Path) -> Network:
    """Load every tensor of `state` into `model`, all names and shapes equal, and return it in eval mode.

    Raises:
        ValueError: names what is missing, left over or of another shape.
    """
    expected = model.state_dict()
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
