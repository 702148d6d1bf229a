"""Where the files of a user's images lie: a folder, a zip, WebDataset shards or parquet tables; one file is read at a time.

A container is asked for bytes by name and holds no image. Its objects may be used from many threads and from forked processes.
"""

import os
import posixpath
import tarfile
import unicodedata
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from argen.eval.images import files_under, is_litter

if TYPE_CHECKING:
    from datasets import Dataset

MOST_BYTES = 256 * 2**20  # of a file in a .zip, unpacked
BOMB = (
    2**30,
    100,
)  # bytes of all files in a .zip, unpacked, and how many times its own size: images are compressed already
Stamp = tuple[int, int]  # size in bytes, and when it was changed (or a checksum): another stamp is another file


class Container(ABC):
    """Files by name.

    Attributes:
        path: of the folder or file that holds them.
        stamps: name -> stamp of all files; names have "/" between folders.
    """

    path: Path
    stamps: dict[str, Stamp]

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a file."""

    def stamp(self, name: str) -> Stamp:
        return self.stamps[name]

    def place(self, name: str) -> str:
        """The name of a file on this machine."""
        return f"{self.path.resolve()}::{name}"

    def find(self, name: str, base: str = "") -> str | None:
        """The name here of a file that a table calls `name`, relative to the folder `base` or to the container; None where there is none.

        Backslashes and other forms of accented letters (macOS) are understood.
        """
        for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
            for start in dict.fromkeys((base, "")):
                path = posixpath.normpath(posixpath.join(start, spelling))
                if found := self._by_normal_form.get(unicodedata.normalize("NFC", path)):
                    return found
        return None

    @cached_property
    def _by_normal_form(self) -> dict[str, str]:
        return {unicodedata.normalize("NFC", name): name for name in self.stamps}


class Folder(Container):
    """The files under a folder.

    Args:
        walk: look for all files now; else only those that `find` was asked for are known.
    """

    def __init__(self, path: Path, walk: bool = True):
        self.path, self.stamps = path, {}
        for file in files_under(path) if walk else ():
            name = file.relative_to(path).as_posix()
            if not is_litter(name):
                self.stamps[name] = _stamp(file)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def place(self, name: str) -> str:
        return os.path.abspath(self.path / name)

    def find(self, name: str, base: str = "") -> str | None:
        """As that of every container; a file that lies elsewhere on the disk is found, too."""
        name, base = self._inside(name), self._inside(base)
        if (found := super().find(name, base)) is not None:
            return found
        for start in (base, ""):
            file = posixpath.normpath(posixpath.join(start, name.replace("\\", "/")))
            if (self.path / file).is_file():
                self.stamps[file] = _stamp(self.path / file)
                return file
        return None

    def _inside(self, path: str) -> str:
        """A path that lies in the folder, relative to it; others stay."""
        root = self.path.absolute().as_posix()
        return "" if path == root else path.removeprefix(f"{root}/")


class Zip(Container):
    """The files in a ``.zip``.

    Raises:
        ValueError: it is damaged, or far larger unpacked than images are.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            members = _open_zip(path, os.getpid()).infolist()
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path} cannot be read as a .zip ({error}): make or fetch it again") from error
        size, (most, times) = sum(member.file_size for member in members), BOMB
        if size > max(most, times * path.stat().st_size):
            raise ValueError(
                f"{path} unpacks to {size / 1e9:,.1f} GB, more than {times} times its size: expected a .zip of images"
            )
        self.stamps = {
            m.filename: (m.file_size, m.CRC) for m in members if not m.is_dir() and not is_litter(m.filename)
        }

    def read(self, name: str) -> bytes:
        """See `Container.read`.

        Raises:
            ValueError: it has more than `MOST_BYTES`, of which no more are unpacked.
        """
        with _open_zip(self.path, os.getpid()).open(name) as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"{name} in {self.path} unpacks to more than {MOST_BYTES // 2**20} MB: expected an image")
        return data


@lru_cache(8)
def _open_zip(path: Path, process: int) -> zipfile.ZipFile:
    """A zip, opened once in each process: forked ones would share their place in the file."""
    return zipfile.ZipFile(path)


class Tars(Container):
    """The files in ``.tar`` shards as WebDataset writes them; a name begins with that of its shard.

    Raises:
        ValueError: a shard is damaged, or compressed.
    """

    def __init__(self, path: Path, shards: Sequence[Path]):
        self.path, self.shards = path, list(shards)
        self.stamps, self._where = {}, {}
        for index, shard in enumerate(self.shards):
            changed, shard_name = shard.stat().st_mtime_ns, relative(shard, path)
            try:
                with tarfile.open(shard, "r:") as tar:
                    while member := tar.next():
                        tar.members = []  # it would keep them all
                        if member.isfile() and not is_litter(member.name):
                            name = f"{shard_name}/{posixpath.normpath(member.name)}"
                            self._where[name] = index, member.offset_data, member.size
                            self.stamps[name] = member.size, changed
            except (tarfile.TarError, EOFError) as error:
                raise ValueError(
                    f"{shard} cannot be read as a .tar that is not compressed ({error}): make or fetch it again"
                ) from error

    def shard(self, name: str) -> str:
        """Name of the shard of a file."""
        return relative(self.shards[self._where[name][0]], self.path)

    def read(self, name: str) -> bytes:
        index, offset, size = self._where[name]
        with self.shards[index].open("rb") as file:
            file.seek(offset)
            return file.read(size)


class Parquets(Container):
    """The images in columns of parquet files, as Hugging Face `datasets` writes them (bytes or paths); a name is FILE#ROW#COLUMN.

    `datasets` maps them from a copy in its own cache, so that single rows can be read.

    Raises:
        ValueError: a file is damaged.
    """

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path = path
        self.tables = {relative(file, path): _table(file) for file in files}
        self._files = {relative(file, path): (file, _stamp(file)) for file in files}
        self.stamps = {}  # too many names: they are made by `name`
        self._columns: dict[tuple[str, str], Dataset] = {}  # with one column, so that others are not read along

    @staticmethod
    def name(file: str, row: int, column: str) -> str:
        return f"{file}#{row}#{column}"

    def read(self, name: str) -> bytes:
        file, row, column = name.rsplit("#", 2)
        if (file, column) not in self._columns:
            self._columns[file, column] = self.tables[file].select_columns(column)
        value = self._columns[file, column][int(row)][column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return (self._files[file][0].parent / value).read_bytes()
        if not isinstance(value, bytes):
            raise ValueError(f"{name} holds no image: expected its bytes, or the path of a file")
        return value

    def stamp(self, name: str) -> Stamp:
        return self._files[name.rsplit("#", 2)[0]][1]


def _table(file: Path) -> "Dataset":
    """A parquet file, mapped; its images stay bytes or paths."""
    import logging

    from datasets import Dataset, Image, disable_progress_bars

    disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it raises, too
    try:
        table = Dataset.from_parquet(str(file))
        for column, feature in table.features.items():
            if isinstance(feature, Image):
                table = table.cast_column(column, Image(decode=False))
    except Exception as error:  # it raises its own, pyarrow's and the system's
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as a .parquet table ({reason}): make or fetch it again") from error
    return table


def relative(file: Path, path: Path) -> str:
    """The name of a file at or below `path`."""
    return file.relative_to(path).as_posix() if file != path else file.name


def _stamp(file: Path) -> Stamp:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
