"""One queue for every face of argen: page, APIs and batches submit requests here, and one worker carries them out in turn.

Jobs can be cancelled at any token, taken up again, moved, and looked at while they are written; what is finished, and what waits,
is on disk and survives the program.
"""

import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from argen.pipelines.base import TokenPipeline
from argen.request import Job, Request, rows_of
from argen.studio.store import CANCELLED, DONE, FAILED, OVER, RUNNING, WAITING, Saved, Store

logger = logging.getLogger(__name__)
LOCAL = "local"  # owner of what no key asked for
MOST_WAITING = 1000  # jobs of one owner
PREVIEW_EVERY, WATCHED_FOR = 0.4, 5.0  # seconds between previews, and how long one is wanted after it was looked at
PREVIEWED = 9  # pictures of a preview at most


class QueueFull(ValueError):
    """Too much waits already."""


class NotYours(PermissionError):
    """The job belongs to somebody else."""


@dataclass
class Progress:
    """How a job is getting on; each change has a new version.

    Attributes:
        stage: what is done just now.
        decided, cells: of each picture, so far and in all.
        passes: of the network.
        seconds: of work so far.
        preview: pictures as far as they are written; None where nobody looked.
        pictures: what was made, once it is done.
        place: in the line, from 1; 0 when it is not waiting.
        eta: seconds to the end; None while unknown.
    """

    id: str
    owner: str
    request: Request
    state: str
    created: float
    stage: str = ""
    decided: int = 0
    cells: int = 0
    passes: int = 0
    seconds: float = 0.0
    error: str = ""
    preview: list[Image.Image] | None = None
    pictures: list[Saved] = field(default_factory=list)
    place: int = 0
    eta: float | None = None
    version: int = 0

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def share(self) -> float:
        """Done of all, 0 to 1."""
        return 1.0 if self.state == DONE else self.decided / max(1, self.cells)

    @property
    def speed(self) -> float:
        """Tokens a second, of all pictures together."""
        return self.decided * self.request.drawn / self.seconds if self.seconds else 0.0


class Studio:
    """Args:
        folder: see `Store`.
        models: id -> the pipeline; called by the worker.
        metadata: see `Store`.

    Attributes:
        store: what is kept.
        device: held by whoever uses the models; the worker lets go of it between jobs.
        paused: whether the worker rests, at a token if it is in a job.
    """

    def __init__(self, folder: Path, models: Callable[[str], TokenPipeline], metadata: bool = True):
        self.store, self.models, self.device, self.paused = Store(folder, metadata), models, threading.RLock(), False
        self.changed = threading.Condition()
        self.live: Progress | None = None
        self.watched, self.cancelled, self.closing = 0.0, False, False
        self.rates: dict[str, float] = {}  # model -> seconds a picture
        for row in self.store.jobs(RUNNING, limit=-1):  # the program ended in the middle
            self.store.update_job(row["id"], state=WAITING)
        self.worker = threading.Thread(target=self._work, name="argen worker", daemon=True)
        self.worker.start()

    def close(self) -> None:
        """Stop, at the next token; a job in the middle will be waiting."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.worker.join(timeout=60)
        self.store.close()

    # what is asked

    def submit(self, request: Request, owner: str = LOCAL) -> str:
        """Put a request at the end of the line -> the id of its job.

        Raises:
            QueueFull: too many jobs of this owner wait.
        """
        return self.submit_all([request], owner)[0]

    def submit_all(self, requests: Sequence[Request], owner: str = LOCAL) -> list[str]:
        """`submit` of all of them, or of none."""
        with self.changed:
            if (waiting := self.store.count(WAITING, owner)) + len(requests) > MOST_WAITING:
                raise QueueFull(f"{waiting:,} jobs are waiting: expected at most {MOST_WAITING:,}, try again later")
            ids = [secrets.token_hex(6) for _ in requests]
            for id, request in zip(ids, requests, strict=True):
                self.store.add_job(id, owner, request)
            self.changed.notify_all()
        return ids

    def cancel(self, id: str, owner: str | None = None) -> None:
        """Take a job out of the line, or stop it at the next token; what is written is kept for `resume`.

        Args:
            owner: who asks; None may do anything.

        Raises:
            KeyError, NotYours: there is no such job; it is somebody else's.
        """
        with self.changed:
            row = self._own(id, owner)
            if self.live is not None and self.live.id == id:
                self.cancelled = True
            elif row["state"] == WAITING:
                self.store.update_job(id, state=CANCELLED, finished=time.time())
            self.changed.notify_all()

    def resume(self, id: str, owner: str | None = None) -> None:
        """Put a cancelled or failed job back into the line; it goes on from its tokens. Raises as `cancel` does.

        Raises:
            ValueError: it is waiting, running or done.
        """
        with self.changed:
            row = self._own(id, owner)
            if row["state"] not in (CANCELLED, FAILED):
                raise ValueError(f"the job is {row['state']}: only one that was cancelled or failed can be resumed")
            self.store.update_job(id, state=WAITING, finished=None, error="")
            self.changed.notify_all()

    def again(self, id: str, owner: str | None = None) -> str:
        """The same with the seeds that follow -> the id of the new job. Raises as `cancel` and `submit` do."""
        row = self._own(id, owner)
        request = _request(row)
        return self.submit(replace(request, seed=request.seed + request.drawn), row["owner"])

    def move(self, id: str, places: int, owner: str | None = None) -> None:
        """Move a waiting job so many places back, or forward if negative. Raises as `cancel` does."""
        with self.changed:
            self._own(id, owner)
            self.store.move(id, places)
            self.changed.notify_all()

    def pause(self, paused: bool = True) -> None:
        """Rest, or go on."""
        with self.changed:
            self.paused = paused
            self.changed.notify_all()

    # what is told

    def progress(self, id: str, preview: bool = False, owner: str | None = None) -> Progress:
        """How a job is getting on. Raises as `cancel` does.

        Args:
            preview: whether pictures are wanted while it is written; the next ones come soon.
            owner: who asks; None may see anything.
        """
        with self.changed:
            if preview and self.live is not None and self.live.id == id:
                self.watched = time.monotonic()
            return self._told(self._own(id, owner))

    def line(self, owner: str | None = None) -> list[Progress]:
        """What runs and what waits, in order."""
        with self.changed:
            places = self.store.places()
            found = [self._told(row, places) for row in self.store.jobs(RUNNING, WAITING, owner=owner)]
        rest = 0.0
        for one in found:
            known = one.eta if one.state == RUNNING else self._expected(one.request)
            rest = math.nan if known is None else rest + known
            one.eta = None if math.isnan(rest) else rest
        return found

    def watch(self, id: str, preview: bool = False, patience: float = 1.0) -> Iterator[Progress]:
        """A job's progress whenever it changes, and at least every `patience` seconds, until it is over.

        Raises:
            KeyError: there is no such job.
        """
        while True:
            now = self.progress(id, preview)
            yield now
            if now.over or self.closing:
                return
            with self.changed:
                live = self.live
                if live is None or live.id != id or live.version == now.version:
                    self.changed.wait(patience)

    def result(self, id: str, timeout: float | None = None) -> Progress:
        """Wait until a job is over.

        Raises:
            TimeoutError: it takes longer.
        """
        started = time.monotonic()
        for now in self.watch(id):
            if timeout is not None and time.monotonic() - started > timeout and not now.over:
                raise TimeoutError(f"the job is still {now.state} after {timeout:.0f} seconds")
        return now

    @contextmanager
    def model(self, name: str) -> Iterator[TokenPipeline]:
        """A model, for something that is no job; the worker waits meanwhile."""
        with self.device:
            yield self.models(name)

    # the worker

    def _own(self, id: str, owner: str | None):
        row = self.store.job(id)
        if row is None:
            raise KeyError(f"there is no job {id!r}")
        if owner is not None and row["owner"] != owner:
            raise NotYours("that job belongs to somebody else")
        return row

    def _told(self, row, places: dict[str, int] | None = None) -> Progress:
        """A row of the store, or what is newer of the job that runs; `places` of those that wait, where they are known."""
        if self.live is not None and self.live.id == row["id"]:
            return replace(self.live)
        own = {
            name: row[name]
            for name in ("id", "owner", "state", "created", "decided", "cells", "passes", "seconds", "error")
        }
        told = Progress(**own, request=_request(row))
        if told.state == DONE:
            told.pictures = self.store.pictures(job=told.id, limit=-1)
        elif told.state == WAITING:
            told.place = (self.store.places() if places is None else places)[told.id]
        return told

    def _expected(self, request: Request) -> float | None:
        rate = self.rates.get(request.model)
        return None if rate is None else rate * request.drawn

    def _next(self) -> Progress | None:
        """Wait for a job and take it; None when the studio closes."""
        with self.changed:
            while not self.closing:
                waiting = [] if self.paused else self.store.jobs(WAITING, limit=1)
                if waiting:
                    id = waiting[0]["id"]
                    self.store.update_job(id, state=RUNNING)
                    self.live, self.cancelled = self._told(self.store.job(id)), False
                    self.live.stage, self.live.decided = "loading the model", 0
                    return self.live
                self.changed.wait()
        return None

    def _work(self) -> None:
        while (live := self._next()) is not None:
            ended = {"state": DONE}
            try:
                with self.device:
                    if not self._draw(live):
                        ended = {"state": WAITING if self.closing and not self.cancelled else CANCELLED}
            except Exception as error:  # whatever it is, the next job must have its turn
                known = isinstance(error, ValueError | OSError | ModuleNotFoundError)
                if not known:
                    logger.exception("job %s failed", live.id)
                ended = {"state": FAILED, "error": str(error) if known else f"{type(error).__name__}: {error}"[:500]}
            counts = {name: getattr(live, name) for name in ("decided", "cells", "passes", "seconds")}
            finished = None if ended["state"] == WAITING else time.time()
            with self.changed:
                self.store.update_job(live.id, **ended, **counts, finished=finished)
                self.live = None
                self.changed.notify_all()

    def _draw(self, live: Progress) -> bool:
        """Carry a job out; whether it came to its end."""
        request, left = live.request, self.store.left(live.id)
        pipe = self.models(request.model)
        begun = torch.from_numpy(np.load(left, allow_pickle=False)["tokens"]) if left.is_file() else None
        before, started, shown = live.seconds, time.monotonic(), 0.0
        job: Job | None = None
        for job in pipe.run(request, tokens=begun):
            now = time.monotonic()
            preview = None
            wanted = now - self.watched < WATCHED_FOR and now - shown > PREVIEW_EVERY
            if wanted and not job.pictures:
                preview, shown = pipe.pictures(job.tokens[:PREVIEWED]), now
            with self.changed:
                live.stage, live.decided, live.passes = "writing tokens", job.decided, job.passes
                live.cells, live.seconds = job.tokens[0].shape[-2:].numel(), before + time.monotonic() - started
                live.eta = live.seconds / live.decided * (live.cells - live.decided) if live.decided else None
                live.preview = preview or live.preview
                live.version += 1
                self.changed.notify_all()
                rested = time.monotonic()
                while self.paused and not self.cancelled and not self.closing:
                    if live.stage != "paused":
                        live.stage, live.version = "paused", live.version + 1
                        self.changed.notify_all()
                    self.changed.wait()
                started += time.monotonic() - rested
                if (self.cancelled or self.closing) and not job.pictures:
                    break
        if job is None or not job.pictures:
            if job is not None and job.kept is not None:
                np.savez(left, tokens=job.kept.cpu().numpy())
            return False
        with self.changed:
            live.stage = "saving"
        grids = [None if rows.is_floating_point() else rows_of(rows) for rows in job.tokens]
        origins = [None] * len(grids) if job.origins is None else [rows_of(rows) for rows in job.origins]
        scores = job.scores or [None] * len(job.pictures)
        made = list(zip(job.pictures, job.requests, strict=True))
        self.store.add_pictures(live.id, live.created, live.owner, made, grids, origins, scores)
        left.unlink(missing_ok=True)
        self.rates[request.model] = live.seconds / request.drawn
        return True


def _request(row) -> Request:
    return Request.from_dict(json.loads(row["request"]))
