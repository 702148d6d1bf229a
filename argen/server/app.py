"""The application: the APIs and the web page on one port."""

import asyncio
import socket
from collections.abc import Sequence

import gradio as gr
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

import argen
from argen.server import a1111, errors, jobs, openai
from argen.server.guard import MAX_BYTES, Guard, knows, owner_of
from argen.studio.queue import Studio

HEADERS_TIMEOUT = 15.0  # seconds in which a connection must have asked for something


def create(
    studio: Studio,
    page: gr.Blocks | None = None,
    keys: Sequence[str] = (),
    local: bool = True,
    owners: dict[str, str] | None = None,
) -> FastAPI:
    """Put the APIs before the queue, and the page beside them; ``/openapi.json`` describes them.

    Args:
        page: shown at ``/``; None for the APIs alone.
        keys, local: see `Guard`; a key is the password of the page, too.
        owners: gets the owner of each name that logs in.
    """
    owners = {} if owners is None else owners

    def login(name: str, key: str) -> bool:
        if known := knows(keys, key) and owners.get(name, owner_of(key)) == owner_of(key):
            owners[name] = owner_of(key)
        return known

    app = FastAPI(
        title="argen", version=argen.__version__, docs_url=None, redoc_url=None
    )  # those load scripts from elsewhere
    errors.install(app)
    app.add_middleware(Guard, keys=tuple(keys), local=local)
    app.state.studio, app.state.models, app.state.waiting = studio, {}, 0
    for part in (jobs, openai, a1111):
        app.include_router(part.router)
    if page is None:
        return app
    # Gradio checks that the files of an event were uploaded only in pages that it has launched itself, which it does not count a
    # mounted one among (seen in 6.31; to be reported to gradio-app/gradio). `argen.ui.build.Page` checks them as well.
    page.has_launched = page.is_running = True
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        auth=login if keys else None,
        allowed_paths=[str(studio.store.folder.resolve())],
        blocked_paths=[str(path.resolve()) for path in studio.store.hidden],
        max_file_size=MAX_BYTES,
        show_error=False,
    )


class Timed(H11Protocol):
    """HTTP/1.1 that hangs up on who connects, or begins a request, and does not go on."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_a_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_a_request()

    def _expect_a_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(HEADERS_TIMEOUT, self._hang_up_unless_asked, self.scope)

    def _hang_up_unless_asked(self, before: dict | None) -> None:
        if self.scope is before and (self.cycle is None or self.cycle.response_complete):
            self.transport.abort()


class Server(uvicorn.Server):
    """Serves until a signal comes; then jobs stop at their next token, and are kept, before connections are closed."""

    def __init__(self, config: uvicorn.Config, studio: Studio):
        super().__init__(config)
        self.studio = studio

    def handle_exit(self, sig, frame) -> None:
        self.studio.closing = True
        super().handle_exit(sig, frame)


def configured(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    how = {"log_level": "warning", "timeout_graceful_shutdown": 5, "http": Timed}
    return uvicorn.Config(app, host=host, port=port, **how)


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
    Server(configured(app, host, port), app.state.studio).run()
