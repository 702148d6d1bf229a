"""What stands before every request: its size, its origin, its key; and errors that say one clear line."""

import base64
import binascii
import hashlib
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argen.studio.queue import LOCAL, NotYours, QueueFull, Studio

MOST_BYTES = 32 * 2**20  # of a request
MOST_TOLD = 600  # characters of an error
MOST_PIXELS = 25_000_000  # of a picture that is sent
FORMATS = ("PNG", "JPEG", "WEBP")
GUARDED = ("/v1", "/sdapi", "/api", "/pictures")  # what needs a key, and is closed to other sites
HERE = {"127.0.0.1", "localhost", "::1"}


def _studio(request: Request) -> Studio:
    return request.app.state.studio


def _owner(request: Request) -> str:
    return request.state.owner


Here = Annotated[Studio, Depends(_studio)]  # the queue of this server
Owner = Annotated[str, Depends(_owner)]  # who asks


class TooLarge(ValueError):
    """A body or a picture is larger than is taken."""


class Limited:
    """Refuses bodies above `MOST_BYTES`, whether or not they say how long they are."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = JSONResponse(
            problem(f"the request is larger than {MOST_BYTES // 2**20} MB: send a smaller picture"), 413
        )
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > MOST_BYTES:
            await refusal(scope, receive, send)
            return
        got, started = 0, False

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > MOST_BYTES:
                raise TooLarge
            return message

        async def answered(message: Message) -> None:
            nonlocal started
            if started or got <= MOST_BYTES:  # whatever the app says of a body that was cut off
                started = True
                await send(message)

        with suppress(TooLarge):
            await self.app(scope, counted, answered)
        if got > MOST_BYTES and not started:
            await refusal(scope, receive, send)


@dataclass(frozen=True)
class Guard:
    """Args:
    keys: one of them must be shown; without any everybody may ask, and all are one owner.
    local: whether the server is for this machine alone, so that requests must name it.
    """

    keys: tuple[str, ...] = ()
    local: bool = True

    def owner(self, request: Request) -> str:
        """Who asks, by the key: "Authorization: Bearer KEY", or as the password of a basic login."""
        if not self.keys:
            return LOCAL
        kind, _, value = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                value = ""
        if not self.knows(value.strip()):
            raise HTTPException(401, "no key, or a wrong one: send 'Authorization: Bearer KEY'")
        return owner_of(value.strip())

    def knows(self, key: str) -> bool:
        return any(secrets.compare_digest(key.encode(), own.encode()) for own in self.keys)

    def check(self, request: Request) -> None:
        """Raises:
        HTTPException: another web site asks, or the request names another machine.
        """
        host = request.headers.get("host", "")
        if self.local and (urlsplit(f"//{host}").hostname or "") not in HERE:
            raise HTTPException(403, "this server answers as localhost only")
        origin = request.headers.get("origin")
        if origin and request.method != "GET" and urlsplit(origin).netloc != host:
            raise HTTPException(403, "another web site may not ask this server")


def owner_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def problem(text: str, code: str = "invalid_request_error") -> dict:
    """The body of an error, as clients of OpenAI and of A1111 read it."""
    text = text if len(text) <= MOST_TOLD else f"{text[:MOST_TOLD]} ..."
    return {"error": {"message": text, "type": code, "param": None, "code": None}, "detail": text}


def install(app: FastAPI, guard: Guard) -> None:
    """Put the guard before an app, and give its errors one form."""

    @app.middleware("http")
    async def guarded(request: Request, call_next):
        if request.url.path.startswith(GUARDED):
            try:
                guard.check(request)
                request.state.owner = guard.owner(request)
            except HTTPException as error:
                return JSONResponse(problem(error.detail), error.status_code)
        return await call_next(request)

    app.add_middleware(Limited)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        return JSONResponse(problem(f"{where}: {first['msg']}" if where else first["msg"]), 422)

    @app.exception_handler(HTTPException)
    async def told(request: Request, error: HTTPException):
        return JSONResponse(problem(str(error.detail)), error.status_code)

    statuses = {QueueFull: 429, NotYours: 403, KeyError: 404, TimeoutError: 504, TooLarge: 413}
    for kind in (*statuses, ValueError, OSError):

        async def answered(request: Request, error: Exception, kind=kind):
            text = error.args[0] if error.args else str(error)
            return JSONResponse(problem(str(text)), statuses.get(kind, 400))

        app.add_exception_handler(kind, answered)


def read_picture(data: bytes, what: str = "the picture") -> Image.Image:
    """A picture that was sent; its size is looked at before it is decoded.

    Raises:
        TooLarge, ValueError: too many pixels; no PNG, JPEG or WebP, or a broken one.
    """
    if len(data) > MOST_BYTES:
        raise TooLarge(f"{what} is larger than {MOST_BYTES // 2**20} MB: send a smaller one")
    refusal = f"{what} has too many pixels: expected at most {MOST_PIXELS // 10**6} million"
    try:
        picture = Image.open(BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > MOST_PIXELS:
            raise TooLarge(refusal)
        picture.load()
    except Image.DecompressionBombError as error:
        raise TooLarge(refusal) from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{what} could not be read: expected a PNG, JPEG or WebP file") from error
    return picture


def from_base64(text: str, what: str = "the picture") -> Image.Image:
    """A picture in base64, with "data:image/png;base64," before it or without. Raises as `read_picture` does."""
    try:
        data = base64.b64decode(text.rpartition("base64,")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{what} is no base64: expected that of a PNG, JPEG or WebP file") from error
    return read_picture(data, what)


def enlarged(picture: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """A picture in the size that a client wants, if it is of the same shape."""
    if size is None or size == picture.size:
        return picture
    if size[0] * picture.height != size[1] * picture.width:
        raise ValueError(
            f"size is {size[0]}x{size[1]}, but this model's pictures are {picture.width}x{picture.height}: expected the same shape"
        )
    return picture.resize(size, Image.Resampling.LANCZOS)


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """Raises:
    ValueError: a side of no pixels, or of more than 2048.
    """
    if not all(1 <= side <= 2048 for side in size):
        raise ValueError(f"size is {size[0]}x{size[1]}: expected 1 to 2048 pixels on each side")
    return size[0], size[1]
