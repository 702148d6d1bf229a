"""A job followed from an event loop: waiting costs no thread."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from anyio.to_thread import run_sync

from argen.jobs.queue import Progress, Studio

LISTEN_EVERY = 1.0  # seconds between looks whether anybody still waits


class Stopping(RuntimeError):
    """The program stops: the job is kept, and goes on when it is started again."""


class Gone(ConnectionError):
    """Nobody waits for the job any more."""


async def never() -> bool:
    return False


async def follow(studio: Studio, id: str, gone: Callable[[], Awaitable[bool]] = never) -> AsyncIterator[Progress]:
    """A job's progress whenever it changes, until it is over.

    Args:
        gone: whether nobody waits any more.

    Raises:
        Stopping, Gone, KeyError: see there; there is no such job.
    """
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    with studio.listening(id, lambda: loop.call_soon_threadsafe(news.set)):
        while True:
            news.clear()
            now = await run_sync(studio.progress, id)
            yield now
            if now.over:
                return
            while not news.is_set():
                if studio.closing:
                    raise Stopping("the server stops: the job is kept, and goes on when it is started again")
                if await gone():
                    raise Gone("the client went away")
                try:
                    await asyncio.wait_for(news.wait(), LISTEN_EVERY)
                except TimeoutError:
                    continue


async def last(progress: AsyncIterator[Progress]) -> Progress:
    """How a job that is followed ended."""
    ended = None
    async for now in progress:
        ended = now
    return ended
