"""The application: the APIs and the web page on one port."""

import asyncio
import logging
import socket
import time
from collections.abc import Sequence

import gradio as gr
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

import argen
from argen.jobs.queue import Studio
from argen.server import a1111, errors, jobs, openai, scaling
from argen.server.guard import ADDRESS, MAX_BYTES, Guard, Links, Sessions, Tries, check_keys, is_known_key, owner_of

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

HEADERS_TIMEOUT = 15.0  # seconds in which a connection must have asked for something
MAX_CONNECTIONS = 2000  # in all; of one client at most `CLIENT_SHARE` of them
CLIENT_SHARE = 0.75
BACKLOG = 64  # connections that are accepted at once, before they are counted
KEPT_FILES = BACKLOG + 96  # of those that the program may have open, for its own
REFUSED_FOR = 0.5  # seconds
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 8\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def create(
    studio: Studio,
    page: gr.Blocks | None = None,
    keys: Sequence[str] = (),
    local: bool = True,
) -> FastAPI:
    """Put the APIs before the queue, and the page beside them; ``/openapi.json`` describes them.

    Args:
        page: shown at ``/``; None for the APIs alone.
        keys, local: see `Guard`; a key is the password of the page, too.
    """
    check_keys(keys)
    tries, sessions, links = Tries(), Sessions(), Links(bool(keys))

    async def login(name: str, key: str) -> bool:
        """Whether a key is one of ours; the name is free. A wrong one is answered later and later, as everywhere."""
        address = ADDRESS.get()
        tries.check(address)
        if not is_known_key(keys, key):
            await tries.delay(address)
            return False
        sessions.owner.set(owner_of(key))
        return True

    app = FastAPI(
        title="argen", version=argen.__version__, docs_url=None, redoc_url=None
    )  # those load scripts from elsewhere
    errors.install(app)
    app.add_middleware(Guard, keys=tuple(keys), local=local, tries=tries, sessions=sessions, links=links)
    app.state.studio, app.state.models, app.state.waiting, app.state.links = studio, {}, 0, links
    for part in (jobs, openai, scaling, a1111):  # the last one answers what is left
        app.include_router(part.router)
    if page is None:
        return app
    # Gradio checks that the files of an event were uploaded only in pages that it has launched itself, which it does not count a
    # mounted one among (seen in 6.31; to be reported to gradio-app/gradio). `argen.ui.build.Page` checks them as well.
    page.has_launched = page.is_running = True
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        auth=login if keys else None,
        max_file_size=MAX_BYTES,
        show_error=False,
    )
    mounted = app.routes[-1].app
    mounted.tokens = sessions
    errors.install_in_page(mounted)
    return app


def max_connections() -> int:
    """How many connections may be open; the limit of files of the program is raised for them as far as it may be."""
    if resource is None:
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MAX_CONNECTIONS + KEPT_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, soft - KEPT_FILES))


class OnceAMinute(logging.Filter):
    """Lets one line a minute through of those in which asyncio says, for every client that waits, that no file can be opened."""

    latest = -60.0

    def filter(self, record: logging.LogRecord) -> bool:
        if "out of system resource" not in str(record.msg):
            return True
        now = time.monotonic()
        if now - self.latest < 60.0:
            return False
        self.latest = now
        return True


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on who connects, or begins a request, and does not go on, and on those that are too many."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        limit = self.config.limit_concurrency - 1
        address = self.client and self.client[0]
        same_client = sum(1 for connection in self.connections if connection.client and connection.client[0] == address)
        self.refused = len(self.connections) > limit or same_client > CLIENT_SHARE * limit
        if len(self.connections) > limit + BACKLOG // 2:
            transport.abort()
        elif self.refused:
            transport.write(BUSY)
            transport.write_eof()
            self.loop.call_later(
                REFUSED_FOR, transport.abort
            )  # what it sends meanwhile is read, so that it sees the answer
        else:
            self._expect_a_request()

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
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
    options = {"log_level": "warning", "timeout_graceful_shutdown": 5, "http": TimedProtocol, "backlog": BACKLOG}
    return uvicorn.Config(app, host=host, port=port, limit_concurrency=max_connections() + 1, **options)


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
    logging.getLogger("asyncio").addFilter(OnceAMinute())
    print(f"argen is at http://{host}:{port} - Ctrl-C stops it", flush=True)
    Server(configured(app, host, port), app.state.studio).run()
