"""The application: the APIs and the web page on one port."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio.to_thread
import gradio as gr
from fastapi import FastAPI

import argen
from argen.server import a1111, jobs, openai
from argen.server.guard import MOST_BYTES, Guard, install
from argen.studio.queue import Studio

THREADS = 200  # requests that may wait for their pictures at once


def create(studio: Studio, page: gr.Blocks | None = None, keys: Sequence[str] = (), local: bool = True) -> FastAPI:
    """Put the APIs before the queue, and the page beside them; ``/docs`` describes them.

    Args:
        page: shown at ``/``; None for the APIs alone.
        keys: one of them is needed, of the page as a password.
        local: see `Guard`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield

    app = FastAPI(title="argen", version=argen.__version__, lifespan=lifespan)
    guard = Guard(tuple(keys), local)
    install(app, guard)
    app.state.studio, app.state.models = studio, {}
    for part in (jobs, openai, a1111):
        app.include_router(part.router)
    if page is None:
        return app
    login = (lambda user, key: guard.knows(key)) if keys else None
    shown = {"allowed_paths": [str(studio.store.folder.resolve())], "max_file_size": MOST_BYTES}
    return gr.mount_gradio_app(app, page, path="/", auth=login, **shown)
