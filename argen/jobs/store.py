"""What the studio keeps: jobs and finished pictures, in SQLite, beside the PNG files in one folder.

Pictures and jobs are named by ids that the store gives; a path never comes from outside.
"""

import json
import secrets
import shutil
import sqlite3
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import filelock
from PIL import Image

from argen.files import delete_unfinished, replacing
from argen.images import decode_image, open_image
from argen.metadata import save_images
from argen.request import Grid, Request, check_grid
from tokenizers_img.pixels import opaque

THUMBNAIL = 256  # side in pixels, at most
MISSING = (160, 160, 160)  # colour that stands for an image whose file is not there any more
EXPORTED_FOR = 86400.0  # seconds
WAITING, RUNNING, DONE, CANCELLED, FAILED = "waiting", "running", "done", "cancelled", "failed"
OVER = {DONE, CANCELLED, FAILED}
Value = TypeVar("Value")
SCHEMA = """
create table if not exists jobs (
    id text primary key, owner text not null, request text not null, state text not null, place real not null,
    created real not null, finished real, seconds real not null default 0, decided integer not null default 0,
    cells integer not null default 0, passes integer not null default 0, error text not null default '');
create index if not exists jobs_by_state on jobs (state, place);
create table if not exists pictures (
    id text primary key, job text not null, owner text not null, number integer not null, request text not null,
    prompt text not null, model text not null, tokens text, origins text, score real, created real not null,
    favourite integer not null default 0);
create index if not exists pictures_by_time on pictures (created);
create index if not exists pictures_by_job on pictures (job, number);
create table if not exists presets (owner text, name text, settings text not null, primary key (owner, name));
create table if not exists grids (owner text primary key, axes text not null, jobs text not null);
"""


@dataclass(frozen=True)
class Saved:
    """A finished picture.

    Attributes:
        id: of the picture, which names its files, too.
        job: id of the job that made it.
        request: makes it again, alone.
        tokens: rows of its grid; None where it has none.
        origins: how each cell came by its token (`samplers.steps.Origin`); None where all were drawn.
        score: cosine to the prompt, where candidates were ranked.
        created: seconds since 1970.
        fault: why `request` is not the one that was saved, but the prompt and the model alone; "" where it is.
    """

    id: str
    job: str
    owner: str
    request: Request
    tokens: Grid | None
    origins: Grid | None
    score: float | None
    created: float
    favourite: bool
    fault: str = ""


class Store:
    """Args:
        folder: of the pictures; made if it is missing.
        metadata: whether a picture's settings go into its file, too.

    Attributes:
        own: folder inside it of the database, the thumbnails, and the tokens of jobs that were left; for its owner's eyes alone, and
            held by one program at a time.
        exports: folder of what the page takes and gives: uploads, files made for one download. It is emptied at start.

    Raises:
        ValueError: the folder cannot be written, another program uses it, or its database is broken.
    """

    def __init__(self, folder: Path, metadata: bool = True):
        self.folder, self.own, self.metadata = folder, folder / ".studio", metadata
        self.exports, self.lock = self.own / "page", threading.RLock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.own.mkdir(mode=0o700, exist_ok=True)
            self.own.chmod(0o700)
            self.held = filelock.FileLock(self.own / "lock", timeout=0)
            self.held.acquire()  # nothing of a folder in use is touched
            shutil.rmtree(self.exports, ignore_errors=True)
            for place in (self.own / "thumbnails", self.own / "jobs", self.exports):
                place.mkdir(exist_ok=True)
            for place in (folder, self.own / "thumbnails", self.own / "jobs"):
                delete_unfinished(place)
        except filelock.Timeout as error:
            raise ValueError(f"{folder} is in use by another argen: stop it, or choose another --data-dir") from error
        except OSError as error:
            raise ValueError(
                f"images cannot be kept in {folder} ({error.strerror or error}): choose a --data-dir that can be written"
            ) from error
        try:
            self.database = self._opened()
        except (sqlite3.Error, OSError) as error:
            self.held.release()
            raise ValueError(
                f"{self.own / 'studio.db'} cannot be used as a database ({error}): move it away, or choose another --data-dir"
            ) from error

    def _opened(self) -> sqlite3.Connection:
        path = self.own / "studio.db"
        path.touch(mode=0o600)
        path.chmod(0o600)
        database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        database.row_factory = sqlite3.Row
        database.execute("pragma journal_mode = wal")
        database.execute("pragma synchronous = normal")
        database.executescript(SCHEMA)
        for table in (
            "jobs",
            "pictures",
            "presets",
            "grids",
        ):  # whether they are ours, and whole as far as a look tells
            database.execute(f"select * from {table} limit 1").fetchall()
        return database

    def close(self) -> None:
        with self.lock:
            self.database.close()
            self.held.release()

    def ask(self, text: str, values: Sequence = ()) -> list[sqlite3.Row]:
        """Carry out one statement -> its rows."""
        with self.lock, closing(self.database.execute(text, values)) as found:
            return found.fetchall()

    # jobs

    @contextmanager
    def written(self) -> Iterator[None]:
        """All that is written meanwhile, or nothing of it."""
        with self.lock:
            self.database.execute("begin immediate")
            try:
                yield
            except BaseException:
                if self.database.in_transaction:  # a full disk has ended it already
                    self.database.execute("rollback")
                raise
            self.database.execute("commit")

    def add_jobs(self, jobs: Sequence[tuple[str, Request]], owner: str) -> None:
        """Put (id, request) at the end of the queue: all of them, or none."""
        told = [(id, json.dumps(request.to_dict())) for id, request in jobs]
        with self.written():
            (last,) = self.ask("select coalesce(max(place), 0) from jobs")[0]
            rows = [(id, owner, text, WAITING, last + 1 + i, time.time()) for i, (id, text) in enumerate(told)]
            insert = "insert into jobs (id, owner, request, state, place, created) values (?, ?, ?, ?, ?, ?)"
            self.database.executemany(insert, rows)

    def job(self, id: str) -> sqlite3.Row | None:
        found = self.ask("select * from jobs where id = ?", (id,))
        return found[0] if found else None

    def jobs(self, *states: str, owner: str | None = None, limit: int = 200) -> list[sqlite3.Row]:
        """Those in one of the states: what waits in its order, what is over with the latest first."""
        marks = ", ".join("?" * len(states))
        own, values = ("and owner = ?", [*states, owner]) if owner else ("", list(states))
        over = states and set(states) <= OVER
        order = "finished desc" if over else "state = 'running' desc, place"
        return self.ask(f"select * from jobs where state in ({marks}) {own} order by {order} limit ?", [*values, limit])

    def count(self, state: str, owner: str | None = None) -> int:
        own, values = ("and owner = ?", (state, owner)) if owner else ("", (state,))
        return self.ask(f"select count(*) from jobs where state = ? {own}", values)[0][0]

    def update_job(self, id: str, **values) -> None:
        sets = ", ".join(f"{name} = ?" for name in values)
        self.ask(f"update jobs set {sets} where id = ?", (*values.values(), id))

    def move(self, id: str, places: int) -> None:
        """Move a waiting job by so many places, forward if negative."""
        with self.lock:
            rows = self.ask("select id, place from jobs where state = 'waiting' order by place")
            line = [row["id"] for row in rows]
            if id not in line:
                return
            at = line.index(id)
            line.insert(max(0, min(len(line) - 1, at + places)), line.pop(at))
            for spot, one in zip((row["place"] for row in rows), line, strict=True):
                self.update_job(one, place=spot)

    def places(self) -> dict[str, int]:
        """Of every waiting job its place in the line, from 1."""
        rows = self.ask("select id from jobs where state = 'waiting' order by place")
        return {row["id"]: place for place, row in enumerate(rows, 1)}

    def left(self, id: str) -> Path:
        """The file of the tokens of a job that was left before its end."""
        return self.own / "jobs" / f"{id}.npz"

    def latest(self, owner: str) -> str | None:
        """The id of the job that an owner asked for last."""
        found = self.ask("select id from jobs where owner = ? order by created desc limit 1", (owner,))
        return found[0]["id"] if found else None

    # pictures

    def add_images(
        self,
        job: str,
        asked: float,
        owner: str,
        images: Sequence[tuple[Image.Image, Request]],
        grids: Sequence[Grid | None],
        origins: Sequence[Grid | None],
        scores: Sequence[float | None],
    ) -> list[str]:
        """Write the pictures of a job, all of them or none -> their ids. A job that was killed after it, and so runs again, writes the
        same ones.

        Args:
            asked: when the job was, in seconds since 1970.
            grids, origins, scores: of each picture, see `Saved`.
        """
        now = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(asked))
        ids = [f"{stamp}-{job}-{number}" for number in range(1, len(images) + 1)]
        told = [(image, request if self.metadata else None) for image, request in images]
        rows = []
        for number, (id, (_, request)) in enumerate(zip(ids, images, strict=True)):
            written = [json.dumps(each[number]) if each[number] else None for each in (grids, origins)]
            own = id, job, owner, number, json.dumps(request.to_dict()), request.prompt, request.model
            rows.append((*own, *written, scores[number], now, 0))
        files = [self.file(id) for id in ids]
        try:
            save_images(told, files, grids if self.metadata else None)
            with self.written():
                self.database.executemany(f"insert or replace into pictures values ({', '.join('?' * 12)})", rows)
        except BaseException:
            for file in files:
                file.unlink(missing_ok=True)
            raise
        return ids

    def images(
        self,
        search: str = "",
        model: str = "",
        favourites: bool = False,
        job: str | None = None,
        owner: str | None = None,
        limit: int = 60,
        offset: int = 0,
    ) -> list[Saved]:
        """The latest first, of a job in its order; those whose prompt has all words of `search`, in any order."""
        where, values = ["1"], []
        for word in search.split():
            where.append("prompt like ? escape '\\'")
            values.append("%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%")
        for name, value in (("model", model), ("job", job), ("owner", owner)):
            if value:
                where.append(f"{name} = ?")
                values.append(value)
        if favourites:
            where.append("favourite = 1")
        order = "number" if job else "created desc, number"
        rows = self.ask(
            f"select * from pictures where {' and '.join(where)} order by {order} limit ? offset ?",
            [*values, limit, offset],
        )
        return [_saved(row) for row in rows]

    def image(self, id: str) -> Saved:
        """Raises:
        KeyError: there is none.
        """
        found = self.ask("select * from pictures where id = ?", (id,))
        if not found:
            raise KeyError(f"there is no picture {id!r}")
        return _saved(found[0])

    def file(self, id: str) -> Path:
        return self.folder / f"{id}.png"

    def opened(self, id: str) -> Image.Image:
        """The image itself.

        Raises:
            FileNotFoundError, ValueError: its file was deleted, or moved away; it is damaged.
        """
        if not self.file(id).is_file():
            raise FileNotFoundError(f"the file of the image {id} is not there any more")
        return decode_image(self.file(id).read_bytes(), f"the image {id}")

    def thumbnail(self, id: str) -> Image.Image:
        """The image at most `THUMBNAIL` pixels wide and high, grey where its file is not there any more; made when it is first
        looked at."""
        path = self.own / "thumbnails" / f"{id}.webp"
        with suppress(OSError, ValueError):
            return open_image(path)
        try:
            small = opaque(self.opened(id))
        except (OSError, ValueError):
            return Image.new("RGB", (THUMBNAIL, THUMBNAIL), MISSING)
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        with suppress(OSError), replacing(path) as file:
            small.save(file, "WEBP", quality=90)
        return small

    def set_favourite(self, id: str, favourite: bool) -> None:
        self.ask("update pictures set favourite = ? where id = ?", (int(favourite), self.image(id).id))

    def delete(self, id: str) -> None:
        """Delete a picture and its files."""
        self.image(id)
        self.ask("delete from pictures where id = ?", (id,))
        for path in (self.file(id), self.own / "thumbnails" / f"{id}.webp"):
            path.unlink(missing_ok=True)

    def export(self, name: str) -> Path:
        """Where a file with this name can be written for one download; those of over `EXPORTED_FOR` seconds ago are deleted."""
        for old in self.exports.iterdir():
            with suppress(OSError):
                if time.time() - old.stat().st_mtime > EXPORTED_FOR:
                    shutil.rmtree(old)
        folder = self.exports / secrets.token_hex(8)
        folder.mkdir(mode=0o700)
        return folder / name

    def shown(self, id: str) -> Path:
        """A file of an image that the page may serve for as long as `export` keeps it: no other client can name its folder."""
        path = self.export(f"{id}.png")
        try:
            path.hardlink_to(self.file(id))
        except OSError:  # a file system without links
            shutil.copyfile(self.file(id), path)
        return path

    def zipped(self, ids: Iterable[str]) -> Path:
        """Write a ZIP file of images with their settings as JSON lines, for one download; those whose file is not there any more are
        named in missing.txt.

        Raises:
            FileNotFoundError: no file is there.
        """
        path, lines, missing = self.export("images.zip"), [], []
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for id in ids:
                if not self.file(id).is_file():
                    missing.append(f"{id}.png")
                    continue
                archive.write(self.file(id), f"{id}.png")
                lines.append(json.dumps({"file": f"{id}.png", **self.image(id).request.to_dict()}))
            archive.writestr("settings.jsonl", "\n".join(lines) + "\n")
            if missing:
                archive.writestr("missing.txt", "\n".join(missing) + "\n")
        if not lines:
            path.unlink()
            raise FileNotFoundError("the files of these images are not there any more")
        return path

    # presets

    def presets(self, owner: str) -> dict[str, dict]:
        rows = self.ask("select name, settings from presets where owner = ? order by name", (owner,))
        return {row["name"]: read_row(json.loads, row["settings"])[0] or {} for row in rows}

    def save_preset(self, owner: str, name: str, settings: dict) -> None:
        self.ask("insert or replace into presets values (?, ?, ?)", (owner, name, json.dumps(settings)))

    # grids

    def keep_grid(self, owner: str, axes: Sequence[tuple[str, Sequence]], jobs: Sequence[str]) -> None:
        """Remember which grid an owner asked for last: its axes (setting, values), and the ids of its jobs in their order."""
        self.ask("insert or replace into grids values (?, ?, ?)", (owner, json.dumps(axes), json.dumps(jobs)))

    def last_grid(self, owner: str) -> tuple[list[tuple[str, list]], list[str]] | None:
        """(axes, ids of jobs), as `keep_grid` was given them."""
        found = self.ask("select axes, jobs from grids where owner = ?", (owner,))
        read = [read_row(json.loads, found[0][name])[0] for name in ("axes", "jobs")] if found else [None]
        return None if None in read else (read[0], read[1])


def read_row(read: Callable[[str], Value], text: str) -> tuple[Value | None, str]:
    """(what `read` makes of a text of the database, "") or, where it cannot be read, (None, why). Another version of argen may have
    written it, or anybody."""
    try:
        return read(text), ""
    except Exception as error:
        return None, f"its settings cannot be read ({' '.join(str(error).split())[:200] or type(error).__name__})"


def request_of(text: str) -> Request:
    """The request in a row. Raises whatever reading it does, see `read_row`."""
    return Request.from_dict(json.loads(text))


def unreadable(prompt: object = "", model: object = "") -> Request:
    """What stands for a request that cannot be read: its prompt and its model, as far as they are known."""
    known = read_row(lambda _: Request(prompt, model or Request.model), "")[0]
    return known or Request("(settings that cannot be read)")


def _grid(text: str) -> Grid:
    rows = tuple(map(tuple, json.loads(text)))
    check_grid(rows)
    return rows


def _saved(row: sqlite3.Row) -> Saved:
    grids = {name: read_row(_grid, row[name])[0] if row[name] else None for name in ("tokens", "origins")}
    request, fault = read_row(request_of, row["request"])
    own = {name: row[name] for name in ("id", "job", "owner", "score", "created")}
    known = request or unreadable(row["prompt"], row["model"])
    return Saved(**own, **grids, request=known, favourite=bool(row["favourite"]), fault=fault)
