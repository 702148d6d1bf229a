"""Files: where those that ship lie, where those that can be made again are kept, and how files are written whole or not at all."""

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

WEIGHTS = Path(__file__).parent / "weights"  # what ships
FULL = {  # error numbers where there is no room -> what to do
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "delete files of yours, or write elsewhere",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or write elsewhere",
}
NO_NUMBER = re.compile(  # what torch's and numpy's writers say when they stop, mostly since the disk is full
    r"PytorchStreamWriter failed|unexpected pos \d+|^\d+ requested and \d+ written$"
)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Meanwhile errors because there is no room name `path`, also those of safetensors and torch.

    Raises:
        OSError: in their place.
    """
    try:
        yield
    except Exception as error:
        if (number := no_room(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def removed_if_cut(folder: Path) -> Iterator[None]:
    """Where what writes a new folder fails, it is removed again; one that was there before is left as it is."""
    before = folder.exists()
    try:
        yield
    except BaseException:
        if not before:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def no_room(error: BaseException) -> int | None:
    """The number, of `FULL`, of an error of writing a file; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if type(error).__name__ == "SafetensorError" and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    if isinstance(error, RuntimeError | OSError) and NO_NUMBER.search(str(error)):
        number = errno.ENOSPC
    return number if number in FULL else None


def cache_folder(name: str) -> Path:
    """Where files of a kind are kept that can be made again: in the folder that ARGEN_CACHE names, else in ``argen`` under XDG_CACHE_HOME
    or ``~/.cache``."""
    own = os.environ.get("ARGEN_CACHE")
    above = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "argen"
    return above / name


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, beside `path`; it becomes `path` if all went well, and nothing stays behind if not."""
    work = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with naming(path):
            with work.open("wb") as file:
                yield file
            work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def delete_unfinished(folder: Path) -> None:
    """Delete what `replacing` left in a folder when its program was killed; nobody else may be writing there."""
    for path in folder.glob(f".{'[0-9a-f]' * 16}.part"):
        path.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """The name of a folder to make, beside `path`, which it becomes if all went well; nothing stays behind if not. What programs that were
    killed left there is deleted.

    Raises:
        ValueError: there is something at `path`, be it since then.
    """
    folder = path.resolve()
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        with naming(path):
            folder.parent.mkdir(parents=True, exist_ok=True)
            delete_unfinished_folders(folder.parent)
            with tempfile.TemporaryDirectory(prefix=f".argen-{os.getpid()}-", dir=folder.parent) as work:
                yield (new := Path(work) / folder.name)
                _move(new, folder, path)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # somebody else writes there
                parent.rmdir()
        raise


def _move(new: Path, folder: Path, name: Path) -> None:
    try:
        if folder.exists():
            raise FileExistsError
        new.rename(folder)
    except OSError as error:
        if not isinstance(error, FileExistsError) and error.errno not in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise ValueError(f"{name} is there already: choose another folder") from error


def delete_unfinished_folders(parent: Path) -> None:
    """Delete what `new_folder` left in a folder when its program was killed: its name has that program's id."""
    import psutil

    for work in parent.glob(".argen-*"):
        match = re.fullmatch(r"\.argen-(\d+)-[a-z0-9_]{8}", work.name)
        if match and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(work, ignore_errors=True)
