"""Storage of jobs and finished images: SQLite, beside the PNG files in one folder.

The store generates the ids of images and jobs; a path never comes from a client.
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
MISSING = (160, 160, 160)  # colour of the thumbnail of an image whose file is missing
EXPORT_SECONDS = 86400.0  # seconds
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
class SavedImage:
    """A finished image.

    Attributes:
        id: of the image; its files have this name.
        job: id of the job that made it.
        request: reproduces this image alone.
        tokens: rows of its token grid; None for latents.
        origins: of the tokens (`samplers.steps.Origin`); None where all were sampled by the generator.
        score: cosine to the prompt, where candidates were ranked.
        created: seconds since 1970.
        fault: why the saved request cannot be read, so that `request` has its prompt and model alone; "" if it can.
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
        folder: of the images; created if missing.
        metadata: whether settings are written into the image files, too.

    Attributes:
        private_folder: folder inside it with the database, the thumbnails and the tokens of interrupted jobs; readable by its owner
            alone, and locked by one program at a time.
        trainings: folder of the trainings of the page, see `argen.jobs.trainings`; it is made by the first one.
        exports: folder of uploads, and of files made for one download; emptied at start.

    Raises:
        ValueError: the folder cannot be written, another program uses it, or its database is broken.
    """

    def __init__(self, folder: Path, metadata: bool = True):
        self.folder, self.private_folder, self.metadata = folder, folder / ".studio", metadata
        self.exports, self.lock = self.private_folder / "page", threading.RLock()
        self.trainings = folder / "trainings"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.private_folder.mkdir(mode=0o700, exist_ok=True)
            self.private_folder.chmod(0o700)
            self.folder_lock = filelock.FileLock(self.private_folder / "lock", timeout=0)
            self.folder_lock.acquire()  # before anything in the folder is changed
            shutil.rmtree(self.exports, ignore_errors=True)
            for directory in (self.private_folder / "thumbnails", self.private_folder / "jobs", self.exports):
                directory.mkdir(exist_ok=True)
            for directory in (folder, self.private_folder / "thumbnails", self.private_folder / "jobs"):
                delete_unfinished(directory)
        except filelock.Timeout as error:
            raise ValueError(f"{folder} is in use by another argen: stop it, or choose another --data-dir") from error
        except OSError as error:
            raise ValueError(
                f"images cannot be kept in {folder} ({error.strerror or error}): choose a --data-dir that can be written"
            ) from error
        try:
            self.database = self._open_database()
        except (sqlite3.Error, OSError) as error:
            self.folder_lock.release()
            raise ValueError(
                f"{self.private_folder / 'studio.db'} cannot be used as a database ({error}): move it away, or choose another --data-dir"
            ) from error

    def _open_database(self) -> sqlite3.Connection:
        path = self.private_folder / "studio.db"
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
        ):  # fails if a table is missing or broken
            database.execute(f"select * from {table} limit 1").fetchall()
        return database

    def close(self) -> None:
        with self.lock:
            self.database.close()
            self.folder_lock.release()

    def execute(self, statement: str, parameters: Sequence = ()) -> list[sqlite3.Row]:
        """Execute one statement -> its rows."""
        with self.lock, closing(self.database.execute(statement, parameters)) as cursor:
            return cursor.fetchall()

    # jobs

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Context of a transaction: all statements inside it take effect, or none."""
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
        """Append (id, request) pairs to the queue: all of them, or none."""
        requests = [(id, json.dumps(request.to_dict())) for id, request in jobs]
        with self.transaction():
            (last,) = self.execute("select coalesce(max(place), 0) from jobs")[0]
            rows = [(id, owner, text, WAITING, last + 1 + i, time.time()) for i, (id, text) in enumerate(requests)]
            insert = "insert into jobs (id, owner, request, state, place, created) values (?, ?, ?, ?, ?, ?)"
            self.database.executemany(insert, rows)

    def job(self, id: str) -> sqlite3.Row | None:
        rows = self.execute("select * from jobs where id = ?", (id,))
        return rows[0] if rows else None

    def jobs(self, *states: str, owner: str | None = None, limit: int = 200) -> list[sqlite3.Row]:
        """Return the jobs in one of the states: waiting ones in queue order, finished ones with the latest first."""
        placeholders = ", ".join("?" * len(states))
        by_owner, values = ("and owner = ?", [*states, owner]) if owner else ("", list(states))
        finished = states and set(states) <= OVER
        order = "finished desc" if finished else "state = 'running' desc, place"
        return self.execute(
            f"select * from jobs where state in ({placeholders}) {by_owner} order by {order} limit ?", [*values, limit]
        )

    def count(self, state: str, owner: str | None = None) -> int:
        by_owner, values = ("and owner = ?", (state, owner)) if owner else ("", (state,))
        return self.execute(f"select count(*) from jobs where state = ? {by_owner}", values)[0][0]

    def update_job(self, id: str, **values) -> None:
        sets = ", ".join(f"{name} = ?" for name in values)
        self.execute(f"update jobs set {sets} where id = ?", (*values.values(), id))

    def move(self, id: str, places: int) -> None:
        """Move a waiting job by `places` in the queue, forward if negative."""
        with self.lock:
            rows = self.execute("select id, place from jobs where state = 'waiting' order by place")
            ids = [row["id"] for row in rows]
            if id not in ids:
                return
            index = ids.index(id)
            ids.insert(max(0, min(len(ids) - 1, index + places)), ids.pop(index))
            for place, waiting_id in zip((row["place"] for row in rows), ids, strict=True):
                self.update_job(waiting_id, place=place)

    def queue_positions(self) -> dict[str, int]:
        """Return the position in the queue of every waiting job, from 1."""
        rows = self.execute("select id from jobs where state = 'waiting' order by place")
        return {row["id"]: place for place, row in enumerate(rows, 1)}

    def resume_file(self, id: str) -> Path:
        """Return the file of the tokens of an interrupted job."""
        return self.private_folder / "jobs" / f"{id}.npz"

    def latest_job(self, owner: str) -> str | None:
        """Return the id of the latest job of an owner."""
        rows = self.execute("select id from jobs where owner = ? order by created desc limit 1", (owner,))
        return rows[0]["id"] if rows else None

    # images

    def add_images(
        self,
        job: str,
        created: float,
        owner: str,
        images: Sequence[tuple[Image.Image, Request]],
        grids: Sequence[Grid | None],
        origins: Sequence[Grid | None],
        scores: Sequence[float | None],
    ) -> list[str]:
        """Save the images of a job, all of them or none -> their ids. A job that runs again after a kill writes the same ones.

        Args:
            created: when the job was, in seconds since 1970.
            grids, origins, scores: of each image, see `SavedImage`.
        """
        now = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(created))
        ids = [f"{stamp}-{job}-{number}" for number in range(1, len(images) + 1)]
        files_to_write = [(image, request if self.metadata else None) for image, request in images]
        rows = []
        for number, (id, (_, request)) in enumerate(zip(ids, images, strict=True)):
            grid_columns = [json.dumps(grid[number]) if grid[number] else None for grid in (grids, origins)]
            columns = id, job, owner, number, json.dumps(request.to_dict()), request.prompt, request.model
            rows.append((*columns, *grid_columns, scores[number], now, 0))
        files = [self.file(id) for id in ids]
        try:
            save_images(files_to_write, files, grids if self.metadata else None)
            with self.transaction():
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
    ) -> list[SavedImage]:
        """Return images, the latest first, of one job in its order; `search`: words that the prompt must have, in any order."""
        conditions, values = ["1"], []
        for word in search.split():
            conditions.append("prompt like ? escape '\\'")
            values.append("%" + word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%")
        for name, value in (("model", model), ("job", job), ("owner", owner)):
            if value:
                conditions.append(f"{name} = ?")
                values.append(value)
        if favourites:
            conditions.append("favourite = 1")
        order = "number" if job else "created desc, number"
        rows = self.execute(
            f"select * from pictures where {' and '.join(conditions)} order by {order} limit ? offset ?",
            [*values, limit, offset],
        )
        return [_to_saved_image(row) for row in rows]

    def image(self, id: str) -> SavedImage:
        """Raises:
        KeyError: there is none.
        """
        rows = self.execute("select * from pictures where id = ?", (id,))
        if not rows:
            raise KeyError(f"there is no image {id!r}")
        return _to_saved_image(rows[0])

    def file(self, id: str) -> Path:
        return self.folder / f"{id}.png"

    def read_image(self, id: str) -> Image.Image:
        """Read the file of an image.

        Raises:
            FileNotFoundError, ValueError: its file is missing; it is damaged.
        """
        if not self.file(id).is_file():
            raise FileNotFoundError(f"the file of the image {id} is not there any more")
        return decode_image(self.file(id).read_bytes(), f"the image {id}")

    def thumbnail(self, id: str) -> Image.Image:
        """Return the image at most `THUMBNAIL` pixels wide and high, grey if its file is missing; cached on first use."""
        path = self.private_folder / "thumbnails" / f"{id}.webp"
        with suppress(OSError, ValueError):
            return open_image(path)
        try:
            small = opaque(self.read_image(id))
        except (OSError, ValueError):
            return Image.new("RGB", (THUMBNAIL, THUMBNAIL), MISSING)
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        with suppress(OSError), replacing(path) as file:
            small.save(file, "WEBP", quality=90)
        return small

    def set_favourite(self, id: str, favourite: bool) -> None:
        self.execute("update pictures set favourite = ? where id = ?", (int(favourite), self.image(id).id))

    def delete(self, id: str) -> None:
        """Delete an image and its files."""
        self.image(id)
        self.execute("delete from pictures where id = ?", (id,))
        for path in (self.file(id), self.private_folder / "thumbnails" / f"{id}.webp"):
            path.unlink(missing_ok=True)

    def export(self, name: str) -> Path:
        """Return a path at which a file with this name can be written for one download; files older than `EXPORT_SECONDS` are deleted."""
        for old in self.exports.iterdir():
            with suppress(OSError):
                if time.time() - old.stat().st_mtime > EXPORT_SECONDS:
                    shutil.rmtree(old)
        folder = self.exports / secrets.token_hex(8)
        folder.mkdir(mode=0o700)
        return folder / name

    def link_for_download(self, id: str) -> Path:
        """Link or copy an image into the exports, where the page may serve it; other clients cannot guess the name of its folder."""
        path = self.export(f"{id}.png")
        try:
            path.hardlink_to(self.file(id))
        except OSError:  # a file system without links
            shutil.copyfile(self.file(id), path)
        return path

    def zip_images(self, ids: Iterable[str]) -> Path:
        """Write a ZIP file of images with their settings as JSON lines, for one download; those whose file is missing are named in
        missing.txt.

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
        rows = self.execute("select name, settings from presets where owner = ? order by name", (owner,))
        return {row["name"]: read_row(json.loads, row["settings"])[0] or {} for row in rows}

    def save_preset(self, owner: str, name: str, settings: dict) -> None:
        self.execute("insert or replace into presets values (?, ?, ?)", (owner, name, json.dumps(settings)))

    # grids

    def keep_grid(self, owner: str, axes: Sequence[tuple[str, Sequence]], jobs: Sequence[str]) -> None:
        """Save the latest grid of an owner: its axes (setting, values), and the ids of its jobs in their order."""
        self.execute("insert or replace into grids values (?, ?, ?)", (owner, json.dumps(axes), json.dumps(jobs)))

    def last_grid(self, owner: str) -> tuple[list[tuple[str, list]], list[str]] | None:
        """Return (axes, ids of jobs) of the latest grid, see `keep_grid`."""
        rows = self.execute("select axes, jobs from grids where owner = ?", (owner,))
        values = [read_row(json.loads, rows[0][name])[0] for name in ("axes", "jobs")] if rows else [None]
        return None if None in values else (values[0], values[1])


def read_row(read: Callable[[str], Value], text: str) -> tuple[Value | None, str]:
    """Parse a text of the database with `read` -> (value, "") or, where that fails, (None, reason). Another version of argen, or
    anybody, may have written it."""
    try:
        return read(text), ""
    except Exception as error:
        return None, f"its settings cannot be read ({' '.join(str(error).split())[:200] or type(error).__name__})"


def request_of(text: str) -> Request:
    """Parse the request of a row. Raises any exception of parsing, see `read_row`."""
    return Request.from_dict(json.loads(text))


def unreadable(prompt: object = "", model: object = "") -> Request:
    """Return a placeholder of a request that cannot be read, with its prompt and model as far as they are known."""
    request = read_row(lambda _: Request(prompt, model or Request.model), "")[0]
    return request or Request("(settings that cannot be read)")


def _grid(text: str) -> Grid:
    rows = tuple(map(tuple, json.loads(text)))
    check_grid(rows)
    return rows


def _to_saved_image(row: sqlite3.Row) -> SavedImage:
    grids = {name: read_row(_grid, row[name])[0] if row[name] else None for name in ("tokens", "origins")}
    request, fault = read_row(request_of, row["request"])
    columns = {name: row[name] for name in ("id", "job", "owner", "score", "created")}
    shown_request = request or unreadable(row["prompt"], row["model"])
    return SavedImage(**columns, **grids, request=shown_request, favourite=bool(row["favourite"]), fault=fault)
