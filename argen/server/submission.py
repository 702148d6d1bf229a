"""Clients that wait for a job, without a thread each; a job ends when its client disconnects."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import anyio
from anyio.to_thread import run_sync
from fastapi import Request

from argen.jobs.job_progress import final_progress, follow
from argen.jobs.queue import Progress, QueueFull, Studio
from argen.request import Request as GenerationRequest

MAX_WAITING = 1000  # clients
Answer = TypeVar("Answer")


async def prepare(request: Request, function: Callable[..., Answer], *args) -> Answer:
    """Run a function in a thread before a job is queued (to load a model, encode an image); few at a time, others wait without one."""
    state = request.app.state
    if not hasattr(state, "preparing"):
        state.preparing = anyio.CapacityLimiter(4)
    return await run_sync(function, *args, limiter=state.preparing)


@asynccontextmanager
async def queued(
    request: Request, studio: Studio, owner: str, job_request: GenerationRequest, partials: int = 0
) -> AsyncIterator[AsyncIterator[Progress]]:
    """Put a request into the queue -> its progress whenever it changes, until it is over. The job is cancelled when this context is
    left earlier, because the client disconnected.

    Args:
        partials: number of partial images, see `Studio.submit`.

    Raises:
        QueueFull: too many clients wait.
        ServerStopping, ClientDisconnected: see `argen.jobs.job_progress`.
    """
    state = request.app.state
    if state.waiting >= MAX_WAITING:
        raise QueueFull(f"{state.waiting:,} clients are waiting: expected at most {MAX_WAITING:,}, try again later")
    state.waiting += 1
    id = None
    try:
        id = await run_sync(studio.submit, job_request, owner, partials)
        async with aclosing(follow(studio, id, request.is_disconnected)) as progress:
            yield progress
    finally:
        state.waiting -= 1
        if id is not None and not studio.closing:
            with anyio.CancelScope(shield=True):
                await run_sync(studio.cancel, id)  # does nothing to a job that is over


async def result(request: Request, studio: Studio, owner: str, job_request: GenerationRequest) -> Progress:
    """Run a request -> the final progress of its job. Raises as `queued` does."""
    async with queued(request, studio, owner, job_request) as progress:
        return await final_progress(progress)
