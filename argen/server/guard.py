"""What stands before every path of the server, HTTP and websocket: host and origin, keys, the size of a request and its time."""

import asyncio
import base64
import binascii
import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argen.images import MOST_BYTES
from argen.server.errors import refuse
from argen.studio.queue import LOCAL, Studio

MAX_BYTES = MOST_BYTES  # of a request, of which an image is the largest part
BODY_TIMEOUT = 30.0  # seconds without a byte of a body that was announced
KEYED = ("/v1", "/sdapi", "/api", "/pictures", "/openapi.json")  # what needs a key; the page has a login of its own
LOGIN = "/login"
HERE = {"127.0.0.1", "localhost", "::1"}
FREE_TRIES = 3  # wrong keys of an address that are answered at once
FIRST_DELAY, MAX_DELAY = 0.25, 8.0  # seconds, doubled with each wrong key more
MAX_DELAYED = 8  # answers of one address that may be held back at once
FORGET_AFTER = 600.0  # seconds without a wrong key


def _studio(request: Request) -> Studio:
    return request.app.state.studio


def _owner(request: Request) -> str:
    return request.state.owner


Here = Annotated[Studio, Depends(_studio)]  # the queue of this server
Owner = Annotated[str, Depends(_owner)]  # who asks


class Guard:
    """ASGI middleware that refuses what this server does not answer, before anything of it is read.

    Args:
        keys: one of them must be shown as "Authorization: Bearer KEY", or as the password of a basic login; without any everybody may
            ask, and all are one owner. The first one is the administrator's.
        local: whether the server is for this machine alone, so that requests must name it (else a web site whose name is made to
            point here could ask).
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str] = (), local: bool = True):
        self.app, self.keys, self.local, self.tries = app, tuple(keys), local, Tries()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        address = scope["client"][0] if scope.get("client") else ""
        try:
            check_origin(headers, self.local)
            check_path(path)
            if self.keys and (path.startswith(KEYED) or path == LOGIN):
                self.tries.check(address)
            if path.startswith(KEYED):
                scope.setdefault("state", {})["owner"] = self.owner(headers)
        except HTTPException as error:
            if error.status_code == 401:
                await self.tries.delay(address)
            await refuse(scope, receive, send, error.status_code, str(error.detail), error.headers)
            return
        if self.keys and path == LOGIN:
            send = self.tries.watching(address, send)
        await (limited(self.app, scope, receive, send) if scope["type"] == "http" else self.app(scope, receive, send))

    def owner(self, headers: Headers) -> str:
        """Who asks.

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
        if not knows(self.keys, value.strip()):
            raise HTTPException(401, "no key, or a wrong one: send 'Authorization: Bearer KEY'")
        return owner_of(value.strip())


class Tries:
    """Wrong keys of each address. Each one more than `FREE_TRIES` is answered later than the one before, and few at a time, so that
    keys cannot be guessed in a row, nor many at once."""

    def __init__(self):
        self.wrong: Counter[str] = Counter()
        self.latest: dict[str, float] = {}
        self.delayed: Counter[str] = Counter()

    def check(self, address: str) -> None:
        """Raises:
        HTTPException: too many answers to this address are held back already.
        """
        if self.delayed[address] >= MAX_DELAYED:
            raise HTTPException(
                429, "too many wrong keys: wait before the next try", {"Retry-After": f"{MAX_DELAY:.0f}"}
            )

    async def delay(self, address: str) -> None:
        """Count a wrong key of an address, and wait as long as that costs."""
        now = time.monotonic()
        for old in [one for one, last in self.latest.items() if now - last > FORGET_AFTER]:
            del self.wrong[old], self.latest[old]
        self.wrong[address] += 1
        self.latest[address] = now
        more = self.wrong[address] - FREE_TRIES
        if more <= 0:
            return
        self.delayed[address] += 1
        try:
            await asyncio.sleep(min(MAX_DELAY, FIRST_DELAY * 2 ** min(more - 1, 16)))
        finally:
            self.delayed[address] -= 1

    def watching(self, address: str, send: Send) -> Send:
        """`send` of the login: its refusals (status 400) are wrong keys, too."""

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (400, 401):
                await self.delay(address)
            await send(message)

        return watched


def check_origin(headers: Headers, local: bool) -> None:
    """Raises:
    HTTPException: another web site asks, or the request names another machine, or a name is malformed.
    """
    host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
    try:
        named = urlsplit(f"//{host}")
        name, _ = named.hostname or "", named.port
        asking = urlsplit(origin).netloc
    except ValueError as error:
        raise HTTPException(400, "the header Host or Origin is malformed: expected HOST:PORT") from error
    if local and name not in HERE:
        raise HTTPException(403, "this server answers as localhost only")
    if origin and asking != host:
        raise HTTPException(403, "another web site may not ask this server")


def check_path(path: str) -> None:
    """Raises:
    HTTPException: the path would have the page fetch a file from elsewhere.
    """
    if path.startswith("/gradio_api/") and "://" in path:
        raise HTTPException(403, "this server fetches nothing for others")


async def limited(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run an app, but for bodies above `MAX_BYTES`, whether or not they say how long they are, and for those that do not arrive."""
    announced = Headers(scope=scope).get("content-length", "0")
    too_large = 413, f"the request is larger than {MAX_BYTES // 2**20} MB: send a smaller image"
    if not announced.isdigit() or int(announced) > MAX_BYTES:
        await refuse(scope, receive, send, *too_large)
        return
    got, whole, started, fault = 0, False, False, None

    async def counted() -> Message:
        nonlocal got, whole, fault
        if whole:
            return await receive()  # waits until the client goes away
        try:
            message = await asyncio.wait_for(receive(), BODY_TIMEOUT)
        except TimeoutError:
            fault = 408, f"the request stopped arriving for {BODY_TIMEOUT:.0f} seconds: send it again"
            raise Fault from None
        got, whole = got + len(message.get("body", b"")), not message.get("more_body", False)
        if got > MAX_BYTES:
            fault = too_large
            raise Fault
        return message

    async def answered(message: Message) -> None:
        nonlocal started
        if started or fault is None:  # whatever the app says of a body that was cut off
            started = True
            await send(message)

    try:
        await app(scope, counted, answered)
    except Exception:
        if fault is None:
            raise
    if fault is not None and not started:
        await refuse(scope, receive, send, *fault, {"Connection": "close"})


class Fault(Exception):
    """A body is too large, or does not arrive."""


def knows(keys: Sequence[str], key: str) -> bool:
    return any(secrets.compare_digest(key.encode("utf-8", "replace"), own.encode()) for own in keys)


def owner_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:12]
