"""Errors over HTTP: one clear line, in the form that clients of OpenAI and of A1111 read."""

import logging
import re
import sqlite3
from collections.abc import Mapping

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from argen.hub.memory import out_of_memory
from argen.images import TooLarge
from argen.jobs.access import UnknownModel
from argen.jobs.job_progress import ClientDisconnected, ServerStopping
from argen.jobs.messages import DISK_FULL, error_message
from argen.jobs.queue import Forbidden, QueueFull

logger = logging.getLogger(__name__)
MAX_MESSAGE = 600  # characters of an error
OPENAI = "/v1"
CODES = {  # of pydantic -> of OpenAI
    "missing": "missing_required_parameter",
    "greater_than_equal": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
    "literal_error": "invalid_value",
}
PARAMS = {"num_images": "n"}  # settings that have another name there
STATUSES = {  # of exceptions; the first match counts
    QueueFull: 429,
    Forbidden: 403,
    KeyError: 404,
    FileNotFoundError: 404,
    TimeoutError: 504,
    TooLarge: 413,
    ServerStopping: 503,
    ClientDisconnected: 499,
    ValueError: 400,
    OSError: 400,
    sqlite3.Error: 507,
}


def error_body(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> dict:
    """Return the body of an error: OpenAI's `error` object, and A1111's `detail`."""
    message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."
    message = message.encode("utf-8", "replace").decode()
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}, "detail": message}


def check_method(request: Request, router: APIRouter) -> None:
    """Raises:
    HTTPException: a route of the router has this path for other methods, 405 that names them.
    """
    methods: set[str] = set()
    for route in router.routes:
        if isinstance(route, APIRoute) and route.include_in_schema and route.matches(request.scope)[0] is Match.PARTIAL:
            methods |= route.methods
    if methods:
        allowed = ", ".join(sorted(methods))
        message = f"{request.url.path[:100]} does not take {request.method}: send {allowed}"
        raise HTTPException(405, message, {"Allow": allowed})


async def refuse(
    scope: Scope, receive: Receive, send: Send, status: int, message: str, headers: Mapping[str, str] | None = None
) -> None:
    """Answer a request, or a websocket that is not accepted yet, with an error."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": message})
        return
    await JSONResponse(error_body(message, status=status), status, headers)(scope, receive, send)


def install(app: FastAPI) -> None:
    """Install handlers that give all errors of an app the same form."""

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError):
        message, param, code = describe_validation_error(error)
        status = 400 if request.url.path.startswith(OPENAI) else 422
        return JSONResponse(error_body(message, param, code), status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        body = error_body(str(error.detail), status=error.status_code)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception):
        if message := out_of_memory(error):
            return JSONResponse(error_body(message, status=507), 507)
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(error_body("the server failed at this request: its log says why", status=500), 500)

    for kind in STATUSES:
        app.add_exception_handler(kind, handle_known)


def install_in_page(page: FastAPI) -> None:
    """Install handlers that reduce errors of the page's own routes (uploads, files) to one line without local paths."""

    @page.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        if hasattr(request.state, "owner"):  # a path of an API that no route has
            return JSONResponse(error_body(f"there is no {request.url.path[:100]}", status=404), error.status_code)
        detail = "File not allowed" if str(error.detail).startswith("File not allowed") else error.detail
        return JSONResponse({"detail": detail}, error.status_code, error.headers)

    for kind in (OSError, sqlite3.Error):
        page.add_exception_handler(kind, handle_known)


async def handle_known(request: Request, error: Exception) -> JSONResponse:
    """Convert an exception of `STATUSES` to a response."""
    status = next(status for kind, status in STATUSES.items() if isinstance(error, kind))
    message = error_message(error)
    if isinstance(error, sqlite3.Error):
        message = f"the server cannot write its database ({message}): is its disk full?"
    elif isinstance(error, OSError) and error.errno in DISK_FULL:
        status = 507
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    if request.url.path.startswith(OPENAI):
        param = PARAMS.get(param, param)
        if isinstance(error, UnknownModel):
            param, code = "model", "model_not_found"
        elif status == 400:
            code = code or "invalid_value"
    body = error_body(message, param, code, status)
    return JSONResponse(body, status, {"Retry-After": "10"} if status == 429 else None)


def describe_validation_error(error: RequestValidationError) -> tuple[str, str | None, str | None]:
    """Return (message, parameter, OpenAI code) of an invalid body."""
    details = error.errors()[0]
    location = [str(part) for part in details["loc"] if part not in ("body", "query", "path")]
    location = [part for part in location if re.fullmatch(r"[\w-]+(\[\])?", part)]
    if details["type"] == "json_invalid":
        return f"the body is not JSON: {details['msg']}", None, "invalid_json"
    param = location[0] if location else None
    code = CODES.get(
        details["type"], "invalid_type" if details["type"].endswith(("_type", "_parsing")) else "invalid_value"
    )
    if isinstance(details.get("input"), float):
        code = code.replace("integer", "decimal")
    return f"{'.'.join(location)}: {details['msg']}" if location else details["msg"], param, code
