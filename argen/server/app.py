"""The application: the APIs and the web page on one port."""

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio.to_thread
import gradio as gr
import uvicorn
from fastapi import FastAPI

import argen
from argen.server import a1111, jobs, openai
from argen.server.guard import MOST_BYTES, Guard, install, owner_of
from argen.studio.queue import Studio

THREADS = 200  # requests that may wait for their pictures at once


def create(
    studio: Studio,
    page: gr.Blocks | None = None,
    keys: Sequence[str] = (),
    local: bool = True,
    owners: dict[str, str] | None = None,
) -> FastAPI:
    """Put the APIs before the queue, and the page beside them; ``/docs`` describes them.

    Args:
        page: shown at ``/``; None for the APIs alone.
        keys: one of them is needed, of the page as a password.
        local: see `Guard`.
        owners: gets the owner of each name that logs in.
    """
    owners, guard = {} if owners is None else owners, Guard(tuple(keys), local)

    def login(name: str, key: str) -> bool:
        if known := guard.knows(key) and owners.get(name, owner_of(key)) == owner_of(key):
            owners[name] = owner_of(key)
        return known

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield

    app = FastAPI(title="argen", version=argen.__version__, lifespan=lifespan)
    install(app, guard)
    app.state.studio, app.state.models = studio, {}
    for part in (jobs, openai, a1111):
        app.include_router(part.router)
    if page is None:
        return app
    store = studio.store
    shown = {"allowed_paths": [str(store.folder.resolve())], "blocked_paths": [str(store.own.resolve())]}
    shown["max_file_size"] = MOST_BYTES
    return gr.mount_gradio_app(app, page, path="/", auth=login if keys else None, **shown)


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve until it is interrupted.

    Raises:
        OSError: the port is taken.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise OSError(f"cannot serve on {host}:{port} ({error}): choose another --port or --host") from error
    print(f"argen is at http://{host}:{port} - Ctrl-C stops it", flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)
