"""The guard before every path of the server, HTTP and websocket: host, origin, keys, and limits on size and time of a request."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Annotated
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argen.images import MOST_BYTES
from argen.jobs.queue import LOCAL, Studio
from argen.server.errors import refuse

MAX_BYTES = MOST_BYTES  # of a request, of which an image is the largest part
BODY_TIMEOUT = 30.0  # seconds without a byte of an announced body
MIN_BYTES_PER_SECOND = 2**16  # average rate at which a body must arrive
KEY_PATHS = ("/v1", "/sdapi", "/api", "/pictures", "/openapi.json")  # paths that need a key; the page has its own login
LINK_PATH, LINK_FOR = "/pictures/", 3600.0  # paths that a signed link opens, and for how many seconds
LOCAL_HOSTS = {"127.0.0.1", "localhost", "::1"}
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(:\d{1,5})?")
PAGE = "/gradio_api/"
OPEN = tuple(PAGE + name for name in ("startup-events", "theme.css", "login_check", "user", "app_id"))  # before a login
STREAMING_PATHS = tuple(
    PAGE + name for name in ("heartbeat", "queue/data", "call", "upload_progress")
)  # stay open as long as the client
MAX_OPEN_STREAMS = 128  # of one address
MIN_KEY = 8  # characters
FREE_TRIES = 3  # wrong keys per address that are answered without delay
FIRST_DELAY, MAX_DELAY = 0.25, 8.0  # seconds, doubled with each further wrong key
RETRY = {"Retry-After": f"{MAX_DELAY:.0f}"}
MAX_DELAYED = 8  # delayed answers per address at a time
FORGET_AFTER = 600.0  # seconds without a wrong key


def _studio(request: Request) -> Studio:
    return request.app.state.studio


def _owner(request: Request) -> str:
    return request.state.owner


StudioDep = Annotated[Studio, Depends(_studio)]  # the queue of this server
Owner = Annotated[str, Depends(_owner)]  # of the request
Viewer = Annotated[str | None, Depends(_owner)]  # of an image; None for a client with a signed link


ADDRESS: ContextVar[str] = ContextVar("address", default="")  # of the client of the current request


class Guard:
    """ASGI middleware that refuses requests before anything of them is read.

    Args:
        keys: one of them must be shown as "Authorization: Bearer KEY", or as the password of a basic login; without keys everybody
            has access, as one owner. The first key is the administrator's.
        local: whether the server is for this machine alone, so that requests must name it as host (against DNS rebinding).
        tries: counts wrong keys, also those of the page's login.
        sessions: of the users logged in at the page.
        links: signed addresses of images that need no key.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], local: bool, tries: "Tries", sessions: "Sessions", links: "Links"
    ):
        self.app, self.keys, self.local = app, tuple(keys), local
        self.tries, self.sessions, self.links = tries, sessions, links
        self.open_streams: Counter[str] = Counter()  # address -> requests that stay open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        address = scope["client"][0] if scope.get("client") else ""
        ADDRESS.set(address)
        try:
            check_origin(headers, self.local)
            check_path(path)
            if path.startswith(LINK_PATH) and self.links.valid(path, scope["query_string"].decode("latin-1")):
                scope.setdefault("state", {})["owner"] = None
            elif path.startswith(KEY_PATHS):
                if self.keys:
                    self.tries.check(address)
                scope.setdefault("state", {})["owner"] = self.owner(headers)
            if (
                self.keys
                and path.startswith(PAGE)
                and not path.startswith(OPEN)
                and not self.sessions.logged_in(headers)
            ):
                raise HTTPException(403, "log in at the page first")
            if path.startswith(STREAMING_PATHS) and self.open_streams[address] >= MAX_OPEN_STREAMS:
                raise HTTPException(
                    429, f"{MAX_OPEN_STREAMS} requests of this address stay open: close some pages", RETRY
                )
        except HTTPException as error:
            if error.status_code == 401:
                await self.tries.delay(address)
            await refuse(scope, receive, send, error.status_code, str(error.detail), error.headers)
            return
        streaming = path.startswith(STREAMING_PATHS)
        self.open_streams[address] += streaming
        try:
            if scope["type"] == "http":
                await limited(self.app, scope, receive, send)
            else:
                await self.app(scope, receive, send)
        finally:
            self.open_streams[address] -= streaming
            if not self.open_streams[address]:
                del self.open_streams[address]

    def owner(self, headers: Headers) -> str:
        """Return the owner of a request.

        Raises:
            HTTPException: no key, or a wrong one.
        """
        if not self.keys:
            return LOCAL
        kind, _, value = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                value = ""
        if not is_known_key(self.keys, value.strip()):
            raise HTTPException(401, "no key, or a wrong one: send 'Authorization: Bearer KEY'")
        return owner_of(value.strip())


class Links:
    """Signed addresses that open for a while without a key: they hold a digest of the path and the time of expiry.

    Args:
        needed: whether other addresses need a key; if not, nothing is signed.
    """

    def __init__(self, needed: bool):
        self.needed, self.secret = needed, secrets.token_bytes(32)

    def signed(self, path: str, query: dict[str, str]) -> str:
        """Add a query, and a signature if needed, to a path of this server."""
        if self.needed:
            expires = f"{time.time() + LINK_FOR:.0f}"
            query = query | {"expires": expires, "token": self.digest(path, expires)}
        return f"{path}?{urlencode(query)}" if query else path

    def digest(self, path: str, expires: str) -> str:
        return hmac.new(self.secret, f"{path} {expires}".encode(), hashlib.sha256).hexdigest()[:32]

    def valid(self, path: str, query: str) -> bool:
        """Whether the query of a path has a valid signature that has not expired."""
        params = dict(parse_qsl(query))
        expires, token = params.get("expires", ""), params.get("token", "")
        expected = self.digest(path, expires).encode()
        return secrets.compare_digest(token.encode("utf-8", "replace"), expected) and float(expires) >= time.time()


class Sessions(dict[str, str]):
    """Mapping of login tokens of the page to owners, not to the typed names: names are free, and two keys may use the same one.

    Attributes:
        owner: of the key of the current login.
    """

    owner: ContextVar[str] = ContextVar("owner")

    def __setitem__(self, token: str, name: str) -> None:
        super().__setitem__(token, self.owner.get())

    def logged_in(self, headers: Headers) -> bool:
        """Whether a request has the cookies of a logged-in user."""
        cookies = cookie_parser(headers.get("cookie", ""))
        return any(name.startswith("access-token-") and value in self for name, value in cookies.items())


class Tries:
    """Counter of wrong keys per address. Each one above `FREE_TRIES` is answered later than the one before, and few at a time, so
    that keys cannot be guessed one after the other, nor many at once."""

    def __init__(self):
        self.wrong: Counter[str] = Counter()
        self.latest: dict[str, float] = {}
        self.delayed: Counter[str] = Counter()

    def check(self, address: str) -> None:
        """Raises:
        HTTPException: too many answers to this address are delayed already.
        """
        if self.delayed[address] >= MAX_DELAYED:
            raise HTTPException(429, "too many wrong keys: wait before the next try", RETRY)

    async def delay(self, address: str) -> None:
        """Count a wrong key of an address, and wait for its delay."""
        now = time.monotonic()
        for expired in [known_address for known_address, latest in self.latest.items() if now - latest > FORGET_AFTER]:
            del self.wrong[expired], self.latest[expired]
        self.wrong[address] += 1
        self.latest[address] = now
        excess = self.wrong[address] - FREE_TRIES
        if excess <= 0:
            return
        self.delayed[address] += 1
        try:
            await asyncio.sleep(min(MAX_DELAY, FIRST_DELAY * 2 ** min(excess - 1, 16)))
        finally:
            self.delayed[address] -= 1


def check_origin(headers: Headers, local: bool) -> None:
    """Raises:
    HTTPException: another origin, another host than this machine, or a malformed header.
    """
    host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
    host_match = HOST.fullmatch(host)
    try:
        origin_host = urlsplit(origin).netloc
    except ValueError:
        host_match = None
    if not host_match:
        raise HTTPException(400, "the header Host or Origin is malformed: expected HOST:PORT")
    if local and host_match[1].strip("[]") not in LOCAL_HOSTS:
        raise HTTPException(403, "this server answers as localhost only")
    if origin and origin_host != host:
        raise HTTPException(403, "another web site may not ask this server")


def check_path(path: str) -> None:
    """Raises:
    HTTPException: the path would have the page fetch a file from elsewhere.
    """
    if path.startswith("/gradio_api/") and "://" in path:
        raise HTTPException(403, "this server fetches nothing for others")


async def limited(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run an app, but refuse bodies above `MAX_BYTES`, with or without content-length, and bodies that arrive too slowly."""
    announced = Headers(scope=scope).get("content-length", "0")
    too_large = 413, f"the request is larger than {MAX_BYTES // 2**20} MB: send a smaller image"
    if not announced.isdigit() or int(announced) > MAX_BYTES:
        await refuse(scope, receive, send, *too_large)
        return
    received, complete, response_started, refusal, start_time = 0, False, False, None, time.monotonic()

    async def counting_receive() -> Message:
        nonlocal received, complete, refusal
        if complete:
            return await receive()  # waits until the client disconnects
        seconds_left = start_time + BODY_TIMEOUT + received / MIN_BYTES_PER_SECOND - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, min(BODY_TIMEOUT, seconds_left)))
        except TimeoutError:
            refusal = (
                408,
                f"the request arrives too slowly (less than {MIN_BYTES_PER_SECOND // 1024} KB a second): send it again",
            )
            raise BodyError from None
        received, complete = received + len(message.get("body", b"")), not message.get("more_body", False)
        if received > MAX_BYTES:
            refusal = too_large
            raise BodyError
        return message

    async def guarded_send(message: Message) -> None:
        nonlocal response_started
        if response_started or refusal is None:  # drops the app's answer to a body that was cut off
            response_started = True
            await send(message)

    try:
        await app(scope, counting_receive, guarded_send)
    except Exception:
        if refusal is None:
            raise
    if refusal is not None and not response_started:
        await refuse(scope, receive, send, *refusal, {"Connection": "close"})


class BodyError(Exception):
    """A body is too large or too slow."""


def check_keys(keys: Sequence[str]) -> None:
    """Raises:
    ValueError: a key is too short, or has characters that not every client can send in a header.
    """
    if any(len(key) < MIN_KEY for key in keys):
        raise ValueError(f"a key is shorter than {MIN_KEY} characters: choose a longer one")
    if any(not re.fullmatch(r"[!-~]+", key) for key in keys):
        raise ValueError("a key holds blanks or characters outside ASCII: choose letters, digits and punctuation")


def is_known_key(keys: Sequence[str], key: str) -> bool:
    return any(secrets.compare_digest(key.encode("utf-8", "replace"), known.encode()) for known in keys)


def owner_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:12]
