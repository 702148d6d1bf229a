"""Features of prompts on disk, so that a large text encoder is read once for many runs.

They lie in ``prompts`` under the folder that ARGEN_CACHE names, else ``argen`` under XDG_CACHE_HOME or ``~/.cache``; at most `MAX_BYTES` of them, of
which those that were not used for the longest time go first. A folder that cannot be written keeps nothing.
"""

import hashlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from argen.files import cache_folder, replacing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_BYTES = 1_000_000_000  # about 2,000 prompts of T5-XL
SAMPLES, SAMPLE = 32, 4096  # of a file of weights: how many, and bytes of each


def folder() -> Path:
    """Where the features are kept."""
    return cache_folder("prompts")


def key(encoder: "PreTrainedModel", device: torch.device, ids: Tensor, mask: Tensor) -> str | None:
    """Name of the features of a prompt: of its text tokens and the padding behind them, and of all that they depend on. None where the files of the encoder
    are not known."""
    weights = _folder_of(str(getattr(encoder.config, "_name_or_path", "")))
    digest = None if weights is None else _digest_of(weights)
    if digest is None:
        return None
    facts = digest, str(encoder.dtype), torch.device(device).type, torch.__version__, ids.tolist(), mask.tolist()
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def read(name: str | None) -> Tensor | None:
    """The features [T, C] called `name`; None where there are none, or the file is damaged."""
    if name is None:
        return None
    path = folder() / f"{name}.safetensors"
    try:
        states = load_file(path)["states"]
        path.touch()
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return states


def write(name: str | None, states: Tensor) -> None:
    """Keep features [T, C]; the oldest others go if there are too many."""
    if name is None:
        return
    with suppress(OSError):
        path = folder() / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(save({"states": states.contiguous()}))
        kept = sorted(path.parent.glob("*.safetensors"), key=lambda old: old.stat().st_mtime, reverse=True)
        total = 0
        for old in kept:
            total += old.stat().st_size
            if total > MAX_BYTES and old != path:
                old.unlink(missing_ok=True)


def _folder_of(name: str) -> Path | None:
    """The folder of a network's files, which its settings name; None where they are not here."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    with suppress(ValueError, OSError):  # no name of a repository
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
        return Path(cached).parent if isinstance(cached, str) else None
    return None


def _digest_of(weights: Path) -> str | None:
    """A digest of the settings and the weights of a network, of which samples are read; None where there are no weights."""
    files = sorted(weights.glob("*.safetensors")) or sorted(weights.glob("*.bin"))
    facts = tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in [*files, weights / "config.json"])
    return _sampled(facts) if files else None


@lru_cache
def _sampled(facts: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in facts:
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for index in range(SAMPLES):
                file.seek(max(0, size - SAMPLE) * index // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
