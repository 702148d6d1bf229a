"""Files: where those that ship lie, where those that can be made again are kept, and how files are written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

WEIGHTS = Path(__file__).parent / "weights"  # what ships


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
        with work.open("wb") as file:
            yield file
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def delete_unfinished(folder: Path) -> None:
    """Delete what `replacing` left in a folder when its program was killed; nobody else may be writing there."""
    for path in folder.glob(f".{'[0-9a-f]' * 16}.part"):
        path.unlink(missing_ok=True)
