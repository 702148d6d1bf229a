"""The queue of all front ends: page, APIs and batches submit generation requests, and one worker runs them one by one.

Jobs can be cancelled at any token, resumed, moved, and previewed while they run; finished and waiting jobs are on disk and survive
a restart.
"""

import logging
import math
import secrets
import sqlite3
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from argen.files import replacing
from argen.hub.memory import out_of_memory
from argen.jobs.access import ModelAccess, UnknownModel
from argen.jobs.messages import error_message
from argen.jobs.store import (
    CANCELLED,
    DONE,
    FAILED,
    OVER,
    RUNNING,
    WAITING,
    SavedImage,
    Store,
    read_row,
    request_of,
    unreadable,
)
from argen.pipelines.base import TokenPipeline
from argen.request import Job, Request, rows_of

logger = logging.getLogger(__name__)
LOCAL = "local"  # owner of requests without a key
MAX_WAITING_JOBS = 1000  # jobs of one owner
PREVIEW_EVERY, PREVIEW_FOR = (
    0.4,
    5.0,
)  # seconds between previews, and how long they are made after the last request for one
MAX_PREVIEW_IMAGES = 9  # images of a preview at most
RETRY_AFTER = 2.0  # seconds until the database is written to again, after it could not be
MAX_STOPPED_PREVIEWS = 32  # of jobs that were stopped


class QueueFull(ValueError):
    """Too many jobs or clients are waiting."""


class Forbidden(PermissionError):
    """The job belongs to another owner, or only the administrator may do this."""


@dataclass
class Progress:
    """State and progress of a job; each change has a new version.

    Attributes:
        stage: current stage, e.g. "loading the model".
        decided, cells: of each image, so far and in all.
        forward_passes: of the network.
        seconds: of work so far.
        preview: unfinished images; None where nobody requested a preview.
        partials: the first image at each share requested by `Studio.submit`.
        images: the finished images, once it is done.
        place: position in the queue, from 1; 0 when it is not waiting.
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
    forward_passes: int = 0
    seconds: float = 0.0
    error: str = ""
    preview: list[Image.Image] | None = None
    partials: tuple[Image.Image, ...] = ()
    images: list[SavedImage] = field(default_factory=list)
    place: int = 0
    eta: float | None = None
    version: int = 0

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def share(self) -> float:
        """Share of the cells that are decided, 0 to 1."""
        return 1.0 if self.state == DONE else self.decided / max(1, self.cells)

    @property
    def speed(self) -> float:
        """Tokens per second, over all images."""
        return self.decided * self.request.num_drawn / self.seconds if self.seconds else 0.0


class Studio:
    """Args:
        folder: see `Store`.
        models: id -> the pipeline; called by the worker.
        metadata: see `Store`.
        folders: where saved pipelines may be loaded from, beside the models that have an id.

    Attributes:
        store: jobs and images on disk.
        device: lock that whoever uses the models holds; the worker releases it between jobs.
        paused: whether the worker pauses, between two steps of its job if it has one.
    """

    def __init__(
        self,
        folder: Path,
        models: Callable[[str], TokenPipeline],
        metadata: bool = True,
        folders: Sequence[Path] = (),
    ):
        self.store, self.device, self.paused = Store(folder, metadata), threading.RLock(), False
        self.models = ModelAccess(models, folders, self.store.trainings)
        self.changed = threading.Condition()
        self.live: Progress | None = None
        self.preview_requested, self.cancelled, self.closing = 0.0, False, False
        self.listeners: dict[str, set[Callable[[], object]]] = defaultdict(set)  # id of a job -> callbacks
        self.partials: dict[str, int] = {}  # id of a job -> number of partial images
        self.stopped_previews: dict[str, list[Image.Image]] = {}  # id of a stopped job -> its last preview
        self.seconds_per_image: dict[str, float] = {}  # by model
        for row in self.store.jobs(RUNNING, limit=-1):  # interrupted by the end of the program
            self.store.update_job(row["id"], state=WAITING)
        self.worker = threading.Thread(target=self._run_worker, name="argen worker", daemon=True)
        self.worker.start()

    def close(self) -> None:
        """Stop at the next token; an unfinished job goes back to waiting."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.worker.join(timeout=60)
        self.store.close()

    @property
    def alive(self) -> bool:
        """Whether the worker runs jobs."""
        return self.worker.is_alive() and not self.closing

    # commands

    def submit(self, request: Request, owner: str = LOCAL, partials: int = 0) -> str:
        """Put a request at the end of the queue -> the id of its job.

        Args:
            partials: number of partial images of the first image, at 1 / (partials + 1) of its tokens, and so on.

        Raises:
            QueueFull, UnknownModel: too many jobs of this owner wait; see `ModelAccess.check`.
        """
        return self.submit_all([request], owner, partials)[0]

    def submit_all(self, requests: Sequence[Request], owner: str = LOCAL, partials: int = 0) -> list[str]:
        """`submit` of all of them, or of none."""
        for name in {request.model for request in requests}:
            self.models.check(name)
        with self.changed:
            if (waiting := self.store.count(WAITING, owner)) + len(requests) > MAX_WAITING_JOBS:
                raise QueueFull(f"{waiting:,} jobs are waiting: expected at most {MAX_WAITING_JOBS:,}, try again later")
            ids = [secrets.token_hex(6) for _ in requests]
            self.store.add_jobs(list(zip(ids, requests, strict=True)), owner)
            if partials:
                self.partials |= dict.fromkeys(ids, partials)
            self.changed.notify_all()
        return ids

    def cancel(self, id: str, owner: str | None = None) -> None:
        """Remove a job from the queue, or stop it at the next token; its tokens are kept for `resume`.

        Args:
            owner: who cancels; None may cancel any job.

        Raises:
            KeyError, Forbidden: there is no such job; it is somebody else's.
        """
        with self.changed:
            row = self._owned_row(id, owner)
            if self.live is not None and self.live.id == id:
                self.cancelled = True
            elif row["state"] == WAITING:
                self.store.update_job(id, state=CANCELLED, finished=time.time())
                self.partials.pop(id, None)
            self._notify(id)

    def resume(self, id: str, owner: str | None = None) -> None:
        """Queue a cancelled or failed job again; it resumes from its tokens. Raises as `cancel` does.

        Raises:
            ValueError: it is waiting, running or done.
        """
        with self.changed:
            row = self._owned_row(id, owner)
            if row["state"] not in (CANCELLED, FAILED):
                raise ValueError(f"the job is {row['state']}: only one that was cancelled or failed can be resumed")
            self.store.update_job(id, state=WAITING, finished=None, error="")
            self.changed.notify_all()

    def submit_next_seeds(self, id: str, owner: str | None = None) -> str:
        """Submit the same request with the seeds that follow -> the id of the new job. Raises as `cancel` and `submit` do."""
        row = self._owned_row(id, owner)
        request, fault = read_row(request_of, row["request"])
        if request is None:
            raise ValueError(fault)
        return self.submit(replace(request, seed=request.seed + request.num_drawn), row["owner"])

    def move(self, id: str, places: int, owner: str | None = None) -> None:
        """Move a waiting job so many places back, or forward if negative. Raises as `cancel` does."""
        with self.changed:
            self._owned_row(id, owner)
            self.store.move(id, places)
            self.changed.notify_all()

    @contextmanager
    def listening(self, id: str, callback: Callable[[], object]) -> Iterator[None]:
        """Context in which `callback` is called whenever a job changes, by the thread that changes it."""
        with self.changed:
            self.listeners[id].add(callback)
        try:
            yield
        finally:
            with self.changed:
                self.listeners[id].discard(callback)
                if not self.listeners[id]:
                    del self.listeners[id]

    def pause(self, paused: bool = True) -> None:
        """Pause or resume the queue."""
        with self.changed:
            self.paused = paused
            self.changed.notify_all()

    # state

    def progress(self, id: str, preview: bool = False, owner: str | None = None) -> Progress:
        """Return the progress of a job. Raises as `cancel` does.

        Args:
            preview: request previews; they appear in the following updates.
            owner: who asks; None may see any job.
        """
        with self.changed:
            if preview and self.live is not None and self.live.id == id:
                self.preview_requested = time.monotonic()
            return self._to_progress(self._owned_row(id, owner))

    def queue(self, owner: str | None = None) -> list[Progress]:
        """Return the running and the waiting jobs, in order."""
        with self.changed:
            positions = self.store.queue_positions()
            jobs = [self._to_progress(row, positions) for row in self.store.jobs(RUNNING, WAITING, owner=owner)]
        eta = 0.0
        for job in jobs:
            seconds = job.eta if job.state == RUNNING else self._estimated_seconds(job.request)
            eta = math.nan if seconds is None else eta + seconds
            job.eta = None if math.isnan(eta) else eta
        return jobs

    def watch(self, id: str, preview: bool = False, patience: float = 1.0) -> Iterator[Progress]:
        """Yield a job's progress whenever it changes, and at least every `patience` seconds, until it is over.

        Raises:
            KeyError: there is no such job.
        """
        while True:
            progress = self.progress(id, preview)
            yield progress
            if progress.over or self.closing:
                return
            with self.changed:
                live = self.live
                if live is None or live.id != id or live.version == progress.version:
                    self.changed.wait(patience)

    def result(self, id: str, timeout: float | None = None) -> Progress:
        """Wait until a job is over.

        Raises:
            TimeoutError: it takes longer.
        """
        started = time.monotonic()
        for progress in self.watch(id):
            if timeout is not None and time.monotonic() - started > timeout and not progress.over:
                raise TimeoutError(f"the job is still {progress.state} after {timeout:.0f} seconds")
        return progress

    @contextmanager
    def model(self, name: str, kind: str = "generator") -> Iterator[TokenPipeline]:
        """Context with a model, for work outside the queue; the worker waits meanwhile. Raises as `ModelAccess` does."""
        with self.device:
            yield self.models(name, kind)

    # the worker

    def _notify(self, id: str) -> None:
        """Notify the listeners of a job that changed; called with `changed` held."""
        self.changed.notify_all()
        for callback in list(self.listeners.get(id, ())):
            with suppress(RuntimeError):  # its event loop is closed
                callback()

    def _owned_row(self, id: str, owner: str | None):
        row = self.store.job(id)
        if row is None:
            raise KeyError(f"there is no job {id!r}")
        if owner is not None and row["owner"] != owner:
            raise Forbidden("that job belongs to somebody else")
        return row

    def _to_progress(self, row, positions: dict[str, int] | None = None) -> Progress:
        """Convert a row of the store to progress; the running job has a newer one in memory. A row that cannot be read has failed.

        Args:
            positions: of the waiting jobs; None reads them from the store.
        """
        if self.live is not None and self.live.id == row["id"]:
            return replace(self.live)
        names = "id", "owner", "state", "created", "decided", "cells", "seconds", "error"
        request, fault = read_row(request_of, row["request"])
        progress = Progress(
            **{name: row[name] for name in names}, forward_passes=row["passes"], request=request or unreadable()
        )
        if fault and progress.state in (WAITING, RUNNING):
            progress.state, progress.error = FAILED, fault
        if progress.state == DONE:
            progress.images = self.store.images(job=progress.id, limit=-1)
        elif progress.state == WAITING:
            progress.place = (self.store.queue_positions() if positions is None else positions)[progress.id]
        elif progress.state == CANCELLED:
            progress.preview = self.stopped_previews.get(progress.id)
        return progress

    def _estimated_seconds(self, request: Request) -> float | None:
        rate = self.seconds_per_image.get(request.model)
        return None if rate is None else rate * request.num_drawn

    def _next_job(self) -> Progress | None:
        """Wait for the next job and start it; None when the studio closes."""
        with self.changed:
            while not self.closing:
                try:
                    waiting = [] if self.paused else self.store.jobs(WAITING, limit=1)
                    if waiting and (live := self._start_job(waiting[0]["id"])) is not None:
                        return live
                    if waiting:
                        continue
                except sqlite3.Error as error:
                    logger.warning("the database cannot be written (%s): the next job waits", error)
                    self.changed.wait(RETRY_AFTER)
                else:
                    self.changed.wait()
        return None

    def _start_job(self, id: str) -> Progress | None:
        """Start a waiting job; None if it cannot be read, so that it failed."""
        live = self._to_progress(self.store.job(id))
        if live.state == FAILED:
            self.store.update_job(id, state=FAILED, error=live.error, finished=time.time())
            self._notify(id)
            return None
        self.store.update_job(id, state=RUNNING)
        live.state, live.place, live.stage, live.decided = RUNNING, 0, "loading the model", 0
        self.live, self.cancelled = live, False
        self._notify(id)
        return live

    def _run_worker(self) -> None:
        while (live := self._next_job()) is not None:
            state, error = DONE, ""
            try:
                with self.device:
                    if not self._run_job(live):
                        state = WAITING if self.closing and not self.cancelled else CANCELLED
            except Exception as failure:  # whatever it is, the next job must run
                expected = isinstance(
                    failure, ValueError | OSError | ModuleNotFoundError | sqlite3.Error | UnknownModel
                ) or out_of_memory(failure)
                if not expected:
                    logger.exception("job %s failed", live.id)
                state, error = (
                    FAILED,
                    error_message(failure) if expected else f"{type(failure).__name__}: {failure}"[:500],
                )
            self._finish_job(live, state, error)

    def _finish_job(self, live: Progress, state: str, error: str) -> None:
        """Save the final state of a job; retried until the database can be written, or the studio closes (the job then runs again
        after the next start)."""
        counts = {name: getattr(live, name) for name in ("decided", "cells", "seconds")} | {
            "passes": live.forward_passes
        }
        finished = None if state == WAITING else time.time()
        with self.changed:
            self.partials.pop(live.id, None)
            if state == CANCELLED and live.preview:
                self.stopped_previews[live.id] = live.preview
                for oldest in list(self.stopped_previews)[:-MAX_STOPPED_PREVIEWS]:
                    del self.stopped_previews[oldest]
            while True:
                try:
                    self.store.update_job(live.id, state=state, error=error, **counts, finished=finished)
                    break
                except sqlite3.Error as failure:
                    logger.warning("the end of job %s cannot be written (%s)", live.id, failure)
                    state, error = FAILED, error or f"the database cannot be written ({failure}): is the disk full?"
                    live.state, live.error = state, error  # clients that wait for it see this at once
                    self._notify(live.id)
                    self.changed.wait(RETRY_AFTER)
                    if self.closing:
                        break
            self.live = None
            self._notify(live.id)

    def _run_job(self, live: Progress) -> bool:
        """Run a job; returns whether it finished."""
        request, resume_file = live.request, self.store.resume_file(live.id)
        pipe = self.models(request.model)
        before, started, previewed = live.seconds, time.monotonic(), 0.0
        partials, last_share = (
            self.partials.get(live.id, 0),
            0,
        )  # number of partial images, and the last one made
        num_given = sum(cell >= 0 for row in request.tokens or () for cell in row)
        job: Job | None = None
        for job in pipe.run(request, tokens=_read_resume_state(resume_file)):
            now, preview, partial = time.monotonic(), None, []
            cells = job.tokens[0].shape[-2:].numel()
            share = (job.decided - num_given) * (partials + 1) // max(1, cells - num_given)
            if not job.images:
                if now - self.preview_requested < PREVIEW_FOR and now - previewed > PREVIEW_EVERY:
                    preview, previewed = pipe.images(job.tokens[:MAX_PREVIEW_IMAGES]), now
                if last_share < share <= partials:
                    last_share, partial = share, pipe.images(job.tokens[:1])
            with self.changed:
                live.stage, live.decided, live.forward_passes = "writing tokens", job.decided, job.forward_passes
                live.cells, live.seconds = cells, before + time.monotonic() - started
                live.eta = live.seconds / live.decided * (live.cells - live.decided) if live.decided else None
                live.preview = preview or live.preview
                live.partials += tuple(partial)
                live.version += 1
                self._notify(live.id)
                started += self._wait_while_paused(live)
                if (self.cancelled or self.closing) and not job.images:
                    break
        if job is None or not job.images:
            if job is not None and job.resume_state is not None:
                live.preview = pipe.images(job.tokens[:MAX_PREVIEW_IMAGES])
                with replacing(resume_file) as file:
                    np.savez(file, tokens=job.resume_state.cpu().numpy())
            return False
        with self.changed:
            live.stage = "saving"
        grids = [None if rows.is_floating_point() else rows_of(rows) for rows in job.tokens]
        origins = [None] * len(grids) if job.origins is None else [rows_of(rows) for rows in job.origins]
        scores = job.scores or [None] * len(job.images)
        images = list(zip(job.images, job.requests, strict=True))
        self.store.add_images(live.id, live.created, live.owner, images, grids, origins, scores)
        resume_file.unlink(missing_ok=True)
        self.seconds_per_image[request.model] = live.seconds / request.num_drawn
        return True

    def _wait_while_paused(self, live: Progress) -> float:
        """Wait while the queue is paused -> seconds waited; called with `changed` held."""
        started = time.monotonic()
        while self.paused and not self.cancelled and not self.closing:
            if live.stage != "paused":
                live.stage, live.version = "paused", live.version + 1
                self._notify(live.id)
            self.changed.wait()
        return time.monotonic() - started


def _read_resume_state(path: Path) -> torch.Tensor | None:
    """Read the tokens of an interrupted job; None where there are none, or their file is broken (the job then starts over)."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["tokens"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s cannot be read (%s): the job begins again", path.name, error)
        return None
