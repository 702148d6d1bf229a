"""The checking pass before a training: every image is read once, hashed and measured; what was found is kept for the next start."""

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from argen.files import cache_folder
from argen.images import decode_image
from argen.train.containers import Container
from tokenizers_img.pixels import on_white

CHUNK = 512  # images between two writes of what is known
MOST_BYTES = 500_000_000  # of the file of what is known: about 2 million images
TABLE = (
    "create table if not exists checked (place text primary key, size int, stamp int, sha blob, width int, height int)"
)
FIND = "select size, stamp, sha, width, height from checked where place = ?"


class Checked(NamedTuple):
    """What is known of an image file: SHA-256 of its bytes, and its size upright, in pixels; or why it cannot be read."""

    sha: bytes = b""
    width: int = 0
    height: int = 0
    error: str = ""


def read_rgb(data: bytes, name: str) -> Image.Image:
    """The bytes of an image file -> RGB, upright, what is transparent over white. Raises as `decode_image` does."""
    image = decode_image(data, name)
    return on_white(image) if image.mode == "RGBA" else image


def check_images(container: Container, names: Sequence[str]) -> list[Checked]:
    """Read image files in threads, those alone that are not known yet by place, size and time; broken ones are always read.

    Raises:
        ValueError: see `Container.read`, of what is no fault of a file.
    """
    checked: list[Checked] = []
    path = cache_folder("sources") / "checked.sqlite"
    with (
        _Known(path) as known,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(names), desc="checking images", unit="image", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            results = known.find(container, chunk)
            new = [name for name in dict.fromkeys(chunk) if name not in results]
            fresh = dict(zip(new, pool.map(lambda name: _check(container, name), new), strict=True))
            known.add(container, {name: result for name, result in fresh.items() if not result.error})
            results |= fresh
            checked += [results[name] for name in chunk]
            bar.update(len(chunk))
    return checked


def _check(container: Container, name: str) -> Checked:
    try:
        data = container.read(name)
        size = decode_image(data, name).size
    except Exception as error:  # zips, tars and Pillow raise almost anything on damaged files
        return Checked(error=" ".join(str(error).split()) or type(error).__name__)
    return Checked(hashlib.sha256(data).digest(), *size)


class _Known:
    """What earlier passes found, in an SQLite file; nothing is known, and nothing kept, where it cannot be read or written."""

    def __init__(self, path: Path):
        self.db = None
        with suppress(OSError, sqlite3.Error):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > MOST_BYTES:
                path.unlink()
            self.db = sqlite3.connect(path, timeout=30)
            self.db.execute(TABLE)

    def __enter__(self) -> "_Known":
        return self

    def __exit__(self, *error: object) -> None:
        if self.db is not None:
            with suppress(sqlite3.Error), closing(self.db):
                self.db.commit()

    def find(self, container: Container, names: Iterable[str]) -> dict[str, Checked]:
        found: dict[str, Checked] = {}
        if self.db is None:
            return found
        with suppress(sqlite3.Error):
            for name in names:
                row = self.db.execute(FIND, (container.place(name),)).fetchone()
                if row is not None and row[:2] == container.stamp(name):
                    found[name] = Checked(*row[2:])
        return found

    def add(self, container: Container, results: dict[str, Checked]) -> None:
        if self.db is None or not results:
            return
        rows = [(container.place(name), *container.stamp(name), *result[:3]) for name, result in results.items()]
        with suppress(sqlite3.Error):
            self.db.executemany("insert or replace into checked values (?, ?, ?, ?, ?, ?)", rows)
            self.db.commit()
