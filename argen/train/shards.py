"""Folders of what was computed from a set once: one for each key, in shards, resumable, shared by processes, and bounded.

A key is the SHA-256 of the settings that its entries depend on (which network, which size, ...). Its folder ``ROOT/KEY[:16]`` holds
`manifest.json` with the settings in full, and shards. A shard is written whole or not at all: what was stopped resumes at the first one that
is missing. Of many processes number s mod N makes the new shard s.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from argen.files import cache_folder, delete_unfinished, replacing

logger = logging.getLogger(__name__)
FORMAT = 1
MOST_BYTES = 50_000_000_000  # of all keys of a cache
DISK_FULL = errno.ENOSPC, errno.EDQUOT


class ShardedCache:
    """The folder of a key. While an object lives, `prune` leaves its folder alone.

    Args:
        root: folder of all keys; None for `place` under the folder that ARGEN_CACHE names.
        settings: what the entries depend on, plain values; those in `needed`, and more.
        rank, world: of this process, and how many there are.
        barrier: waits for all processes.
        shard: entries of a shard; None for `usual`.

    Attributes:
        kind: what errors call it.
        place: its folder among the caches.
        ending: of the names of shards.

    Raises:
        ValueError: a setting is missing.
    """

    kind: str
    place: str
    ending: str
    needed: tuple[str, ...]
    usual: int

    def __init__(
        self,
        root: str | Path | None,
        settings: dict[str, Any],
        *,
        rank: int = 0,
        world: int = 1,
        barrier: Callable[[], None] = lambda: None,
        shard: int | None = None,
    ):
        if missing := [name for name in self.needed if name not in settings]:
            raise ValueError(f"the settings of a {self.kind} cache lack {', '.join(missing)}")
        root = cache_folder(self.place) if root is None else Path(root)
        self._manifest = {"format": FORMAT, **settings}
        text = json.dumps(self._manifest, sort_keys=True, separators=(",", ":"))
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.root, self.folder = root, root / self.key[:16]
        self.rank, self.world, self.barrier, self.shard = rank, world, barrier, shard or self.usual
        self._in_use = _use(self.folder)
        with suppress(FileNotFoundError):
            os.utime(self.folder / "manifest.json")  # when it was used last

    def shards(self) -> list[Path]:
        names = (path for path in self.folder.glob(f"*{self.ending}") if re.fullmatch(r"\w+-\d{5,}", path.stem))
        return sorted(names, key=_number)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone among the runs on this machine: others wait, and find the entries afterwards."""
        lock = filelock.FileLock(self.folder / "writing.lock")
        if self.rank == 0:
            with suppress(filelock.Timeout):
                lock.acquire(timeout=0)
            if not lock.is_locked:
                logger.warning("%s is being written by another run: waiting for it", self.folder)
                lock.acquire()
            delete_unfinished(self.folder)
            if not (manifest := self.folder / "manifest.json").exists():
                with replacing(manifest) as file:
                    file.write(json.dumps(self._manifest, indent=1, sort_keys=True).encode())
        self.barrier()
        try:
            yield
        finally:
            if self.rank == 0:
                lock.release()

    def mine(self, missing: Sequence[Any]) -> list[tuple[int, Sequence[Any]]]:
        """(number of the shard, its entries) of the new shards that this process makes."""
        first = max(map(_number, self.shards()), default=-1) + 1
        size = max(1, min(self.shard, -(-len(missing) // self.world)))  # a small set is shared, too
        parts = [missing[start : start + size] for start in range(0, len(missing), size)]
        return [(s, part) for s, part in enumerate(parts, first) if s % self.world == self.rank]

    @contextmanager
    def new_shard(self, name: str) -> Iterator[Any]:
        """A file that becomes a shard.

        Raises:
            OSError: the disk is full; says so in one line, nothing stays behind.
        """
        try:
            with replacing(self.folder / name) as file:
                yield file
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise OSError(
                f"the disk is full, {self.folder / name} was not written: make room, or set ARGEN_CACHE"
            ) from error


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def prune(root: str | Path, most_bytes: int = MOST_BYTES) -> list[Path]:
    """Delete the folders of keys that were not used for the longest time, until a cache has at most `most_bytes`; returns those deleted.

    A folder that some process uses is left alone.
    """
    folders = {path.parent: path.stat().st_mtime for path in Path(root).glob(f"{'[0-9a-f]' * 16}/manifest.json")}
    sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders}
    deleted = []
    for folder in sorted(folders, key=folders.__getitem__):
        if sum(sizes.values()) <= most_bytes:
            break
        if not _is_used(folder):
            shutil.rmtree(folder, ignore_errors=True)
            del sizes[folder]
            deleted.append(folder)
    return deleted


def _use(folder: Path) -> filelock.BaseFileLock:
    """A lock in the folder of a key, whose file goes when nothing holds the object any more."""
    path = folder / "used" / secrets.token_hex(8)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, thread_local=False)
    lock.acquire()
    weakref.finalize(lock, _unlink, path)
    return lock


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _is_used(folder: Path) -> bool:
    """Whether a process holds a lock in a folder of a key; what ended ones left is deleted."""
    for path in (folder / "used").iterdir():
        lock = filelock.FileLock(path, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            return True
        lock.release()
        _unlink(path)
    return False
