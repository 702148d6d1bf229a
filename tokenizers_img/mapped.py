"""Weights without a second copy: tensors that lie where their file does, and networks whose parameters take no memory until they are read.

Each storage of a file is a mapping of its own: its pages are read when they are first needed and given back with the last tensor on them, so that
whoever casts or quantizes a network layer by layer never holds all of the source.
"""

import ctypes
import json
import mmap
import os
import struct
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
        ValueError: it is cut off.
        SafetensorError: it is none.
    """
    _refuse_cut(path)
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


def _refuse_cut(path: Path) -> None:
    """Raises:
    ValueError: a ``.safetensors`` file is shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length <= size else {}
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # which safetensors explains
            return
    if size < whole:
        raise ValueError(f"the file is cut off, it has {size:,} of {whole:,} bytes or more")


def is_plain_zip(path: Path) -> bool:
    """Whether a torch file has its numbers as this machine reads them: in a zip archive, not compressed.

    Raises:
        ValueError: it is cut off.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("the file is cut off, the directory at its end is missing")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        orders = [archive.read(member) for member in members if member.filename.rpartition("/")[2] == "byteorder"]
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return stored and all(order.decode() == sys.byteorder for order in orders)


def read_zip(path: Path) -> Any:
    """What a torch file holds that `is_plain_zip`; the caller says which classes are safe.

    Raises:
        Exception: as `torch.load` does; ValueError: it is cut off, or holds tensors of another kind.
    """
    with path.open("rb") as file:
        reader = _ZipNumbers(file, _members(path))
        return reader.with_numbers(torch.load(file, map_location="meta", weights_only=True))


def _members(path: Path) -> dict[int, int]:
    """Where the content of each member of a zip archive begins, and how many bytes it has."""
    sizes = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            sizes[member.header_offset + 30 + name + extra] = member.file_size
    return sizes


class _ZipNumbers:
    """Gives the tensors that `torch.load` made without numbers those of their file.

    Args:
        sizes: from `_members`: what torch says of a storage's size is made to fit its tensors.
    """

    def __init__(self, file: BinaryIO, sizes: dict[int, int]):
        self.file, self.sizes = file, sizes
        self.storages: dict[int, torch.UntypedStorage] = {}  # by their places in the file

    def with_numbers(self, content: Any) -> Any:
        """Containers and the tensors in them -> the same with numbers."""
        if isinstance(content, dict):
            for key in content:
                content[key] = self.with_numbers(content[key])
        elif isinstance(content, list | tuple):
            parts = [self.with_numbers(part) for part in content]
            return content if all(new is old for new, old in zip(parts, content, strict=True)) else parts
        elif isinstance(content, Tensor) and content.is_meta:
            return self._filled(content)
        return content

    def _filled(self, tensor: Tensor) -> Tensor:
        """Tensors that share a storage go on to do so, but for those that are stored negated or conjugated."""
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "a quantized tensor" if tensor.is_quantized else f"a tensor of layout {tensor.layout}"
            raise ValueError(f"it holds {kind}, expected dense ones")
        meta = tensor.untyped_storage()
        offset = getattr(meta, "_checkpoint_offset", None)
        if offset is None:
            raise ValueError("it holds a tensor without numbers")
        if meta.nbytes() > self.sizes.get(offset, 0):
            raise ValueError("a tensor is larger than what is stored of it")
        if offset not in self.storages:
            self.storages[offset] = _storage(self.file, offset, meta.nbytes(), tensor.dtype.itemsize)
        value = torch.empty(0, dtype=tensor.dtype).set_(
            self.storages[offset], tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        value = torch._neg_view(value) if tensor.is_neg() else value
        value = (value.conj() if tensor.is_conj() else value).resolve_neg().resolve_conj()
        return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _storage(file: BinaryIO, offset: int, size: int, itemsize: int) -> torch.UntypedStorage:
    """Bytes of a file, mapped so that writing into them changes no file; few ones, or such as are not aligned, are read."""
    if not size:
        return torch.UntypedStorage(0)
    if offset + size > os.fstat(file.fileno()).st_size:  # or reading the pages behind its end kills the program
        raise ValueError("the file is cut off")
    if size <= SMALL or offset % itemsize:
        file.seek(offset)
        return torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8).untyped_storage()
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    mapping = mmap.mmap(file.fileno(), size + offset - start, access=mmap.ACCESS_COPY, offset=start)
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=offset - start).untyped_storage()


def give_back() -> None:
    """Give free memory back to the system, which glibc keeps for later between what is in use: a layer's temporary copies are large."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
