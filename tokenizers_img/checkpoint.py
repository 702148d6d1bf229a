"""Published checkpoint files: fetched from the hub, opened safely and loaded strictly."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


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


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a torch file, out of a ``state_dict``, ``model`` or ``module`` wrapper.

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
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} could not be read as a checkpoint ({error}): fetch it again") from error
    for wrapper in ("state_dict", "model", "module"):
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
