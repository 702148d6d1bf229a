"""Following a job from an event loop, so that waiting costs no thread."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from anyio.to_thread import run_sync

from argen.jobs.queue import Progress, Studio

CHECK_EVERY = 1.0  # seconds between checks whether the client is still connected


class ServerStopping(RuntimeError):
    """The server stops: the job is kept, and resumes when the server is started again."""


class ClientDisconnected(ConnectionError):
    """The client that waited for the job has disconnected."""


async def never_disconnected() -> bool:
    return False


async def follow(
    studio: Studio, id: str, is_disconnected: Callable[[], Awaitable[bool]] = never_disconnected
) -> AsyncIterator[Progress]:
    """Yield a job's progress whenever it changes, until it is over.

    Args:
        is_disconnected: whether the client has disconnected.

    Raises:
        ServerStopping, ClientDisconnected, KeyError: see there; there is no such job.
    """
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    with studio.listening(id, lambda: loop.call_soon_threadsafe(changed.set)):
        while True:
            changed.clear()
            progress = await run_sync(studio.progress, id)
            yield progress
            if progress.over:
                return
            while not changed.is_set():
                if studio.closing:
                    raise ServerStopping("the server stops: the job is kept, and resumes after a restart")
                if await is_disconnected():
                    raise ClientDisconnected("the client went away")
                try:
                    await asyncio.wait_for(changed.wait(), CHECK_EVERY)
                except TimeoutError:
                    continue


async def final_progress(progress: AsyncIterator[Progress]) -> Progress:
    """Return the final progress of a job that is followed."""
    final = None
    async for update in progress:
        final = update
    return final
