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

HEADERS_TIMEOUT = 15.0  # seconds within which a connection must send a request
MAX_CONNECTIONS = 2000  # in all; of one client at most `CLIENT_SHARE` of them
CLIENT_SHARE = 0.75
BACKLOG = 64  # connections accepted before they are counted
KEPT_FILES = BACKLOG + 96  # of the program's open files, reserved for its own
REFUSED_FOR = 0.5  # seconds until a refused connection is closed
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 8\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def create(
    studio: Studio,
    page: gr.Blocks | None = None,
    keys: Sequence[str] = (),
    local: bool = True,
) -> FastAPI:
    """Create the application: the APIs and the page on one queue; ``/openapi.json`` describes the APIs.

    Args:
        page: served at ``/``; None for the APIs alone.
        keys, local: see `Guard`; a key is the password of the page, too.
    """
    check_keys(keys)
    tries, sessions, links = Tries(), Sessions(), Links(bool(keys))

    async def login(name: str, key: str) -> bool:
        """Check a key; the user name is ignored. Repeated wrong keys are answered with growing delays."""
        address = ADDRESS.get()
        tries.check(address)
        if not is_known_key(keys, key):
            await tries.delay(address)
            return False
        sessions.owner.set(owner_of(key))
        return True

    app = FastAPI(
        title="argen", version=argen.__version__, docs_url=None, redoc_url=None
    )  # those pages load scripts from a CDN
    errors.install(app)
    app.add_middleware(Guard, keys=tuple(keys), local=local, tries=tries, sessions=sessions, links=links)
    app.state.studio, app.state.models, app.state.waiting, app.state.links = studio, {}, 0, links
    for part in (jobs, openai, scaling, a1111):  # the last one answers all other paths
        app.include_router(part.router)
    if page is None:
        return app
    # Gradio checks that the files of an event were uploaded only in pages that it has launched itself, and a mounted page does
    # not count as launched (seen in 6.31; to be reported to gradio-app/gradio). `argen.ui.build.Page` checks them as well.
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
    """Return how many connections may be open; raises the limit of open files for them as far as allowed."""
    if resource is None:
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MAX_CONNECTIONS + KEPT_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, soft - KEPT_FILES))


class OnceAMinute(logging.Filter):
    """Log filter that passes one line per minute of asyncio's "out of system resource", which it logs for every waiting client."""

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
    """HTTP/1.1 that closes connections which send no complete request in time, and refuses those above the limits."""

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
            )  # its input is read meanwhile, so that it gets the answer
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
    """Server that, on a signal, stops its job at the next token and keeps it, before connections are closed."""

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
