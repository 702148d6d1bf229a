"""Weights without a second copy: tensors that lie where their file does, and networks whose parameters take no memory until they are read.

Each storage of a file is a mapping of its own: its pages are read when they are first needed and given back with the last tensor on them, so that
whoever casts or quantizes a network layer by layer never holds all of the source.
"""

import ctypes
import json
import mmap
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import _TYPES
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Network = TypeVar("Network", bound=nn.Module)
SMALL = 1 << 16  # bytes up to which a storage is read at once
AS_STORED = ContextVar(
    "AS_STORED", default=False
)  # whether `load_strict` leaves numbers in the precision of their file


class _Unfilled(TorchFunctionMode):
    """Makes what `torch.empty` gives, which is what layers make their parameters of, without memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **kwargs | ({"device": "meta"} if func is torch.empty else {}))


def unfilled(make: Callable[..., Network], *args: Any, **kwargs: Any) -> Network:
    """The network that `make` gives, its parameters without memory until `load_strict` assigns them; buffers are computed as ever."""
    with _Unfilled():
        return make(*args, **kwargs)


@contextmanager
def as_stored() -> Iterator[None]:
    """`load_strict` leaves numbers in the precision of their file meanwhile; whoever loads casts them afterwards, layer by layer."""
    token = AS_STORED.set(True)
    try:
        yield
    finally:
        AS_STORED.reset(token)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file.

    Raises:
        SafetensorError: it is none, or is cut off.
    """
    with safe_open(path, "pt"):  # which checks the whole header
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        state = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            dtype: Any = _TYPES[entry["dtype"]]
            storage = _storage(file, 8 + length + start, end - start, dtype.itemsize)
            state[name] = torch.empty(0, dtype=dtype).set_(storage).reshape(entry["shape"])
        return state


def is_plain_zip(path: Path) -> bool:
    """Whether a torch file has its numbers as this machine reads them: in a zip archive, not compressed."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        orders = [archive.read(member) for member in members if member.filename.rpartition("/")[2] == "byteorder"]
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return stored and all(order.decode() == sys.byteorder for order in orders)


def read_zip(path: Path) -> Any:
    """What a torch file holds that `is_plain_zip`; the caller says which classes are safe.

    Raises:
        Exception: as `torch.load` does; ValueError: it is cut off.
    """
    with path.open("rb") as file:
        return _with_numbers(torch.load(file, map_location="meta", weights_only=True), file, {})


def _with_numbers(content: Any, file: BinaryIO, storages: dict[int, torch.UntypedStorage]) -> Any:
    """Containers, and the tensors in them without numbers, -> the same with those of the file.

    Args:
        storages: by their places in the file, those that are there already.
    """
    if isinstance(content, dict):
        for key in content:
            content[key] = _with_numbers(content[key], file, storages)
    elif isinstance(content, list | tuple):
        parts = [_with_numbers(part, file, storages) for part in content]
        return content if all(new is old for new, old in zip(parts, content, strict=True)) else parts
    elif isinstance(content, Tensor) and content.is_meta:
        return _filled(content, file, storages)
    return content


def _filled(tensor: Tensor, file: BinaryIO, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A tensor without numbers -> the same with those of the file; tensors that share a storage go on to do so."""
    meta = tensor.untyped_storage()
    offset: int = meta._checkpoint_offset  # type: ignore[assignment]
    if offset not in storages:
        storages[offset] = _storage(file, offset, meta.nbytes(), tensor.dtype.itemsize)
    value = torch.empty(0, dtype=tensor.dtype).set_(
        storages[offset], tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _storage(file: BinaryIO, offset: int, size: int, itemsize: int) -> torch.UntypedStorage:
    """Bytes of a file, mapped so that writing into them changes no file; few ones, or such as are not aligned, are read."""
    if not size:
        return torch.UntypedStorage(0)
    if size <= SMALL or offset % itemsize:
        file.seek(offset)
        data = bytearray(file.read(size))
        if len(data) < size:
            raise ValueError("the file is cut off")
        return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    mapping = mmap.mmap(file.fileno(), size + offset - start, access=mmap.ACCESS_COPY, offset=start)
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=offset - start).untyped_storage()


def give_back() -> None:
    """Give free memory back to the system, which glibc keeps for later between what is in use: a layer's temporary copies are large."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
