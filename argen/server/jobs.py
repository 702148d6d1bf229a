"""The queue over HTTP: what argen's own programs use. ``POST /api/jobs`` takes the fields of `argen.request.Request`."""

import base64
import re
from dataclasses import fields
from typing import Annotated, Any

from fastapi import APIRouter, Body, HTTPException
from fastapi.responses import JSONResponse, Response

from argen.bounds import MAX_SCALED, check_size
from argen.jobs.queue import Forbidden, Progress, Studio
from argen.jobs.store import DONE, WAITING, Saved
from argen.metadata import encoded
from argen.request import Request as Asked
from argen.server.guard import Here, Owner, Viewer
from samplers.errors import InvalidValue

router = APIRouter(tags=["queue"])
NAMES = tuple(item.name for item in fields(Asked))


def asked(given: dict[str, Any]) -> Asked:
    """A request out of JSON.

    Raises:
        ValueError: an unknown field, a value of the wrong kind or out of bounds.
    """
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}: expected some of {', '.join(NAMES)}")
    try:
        request = Asked.from_dict(given)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"a field has a value of the wrong kind ({error})") from error
    return request


def told(progress: Progress) -> dict:
    """A job as JSON."""
    names = "id", "state", "stage", "decided", "cells", "forward_passes", "seconds", "error", "created", "place", "eta"
    images = [image.id for image in progress.images]
    return {name: getattr(progress, name) for name in names} | {
        "progress": progress.share,
        "request": progress.request.to_dict(),
        "images": images,
    }


def finished(now: Progress) -> Progress:
    """Raises:
    HTTPException: the job failed, or was cancelled.
    """
    if now.state != DONE:
        raise HTTPException(400 if now.error else 409, now.error or f"the job was {now.state}")
    return now


def pixels_of(size: str) -> tuple[int, int] | None:
    """ "512x512" -> its numbers; "auto" or "" -> None, the image's own.

    Raises:
        ValueError: something else, or more than is scaled to.
    """
    if size in ("", "auto"):
        return None
    matched = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not matched:
        raise InvalidValue(f"size is {size[:40]!r}: expected auto, or e.g. 512x512", "size")
    return check_size((int(matched[1]), int(matched[2])), MAX_SCALED)


def shown(studio: Studio, saved: Saved) -> Asked | None:
    """The settings of an image, where they may stand in its file."""
    return saved.request if studio.store.metadata else None


@router.get("/health")
def health(studio: Here):
    """Whether jobs are run; 503 where they are not. Needs no key."""
    told = {
        "status": "ok" if studio.alive else "failed",
        "paused": studio.paused,
        "waiting": studio.store.count(WAITING),
    }
    return JSONResponse(told, 200 if studio.alive else 503)


@router.post("/api/jobs", status_code=201)
def submit(studio: Here, owner: Owner, given: Annotated[dict[str, Any], Body()]):
    return {"id": studio.submit(asked(given), owner)}


@router.get("/api/jobs")
def line(studio: Here, owner: Owner):
    return {"paused": studio.paused, "jobs": [told(one) for one in studio.line(owner)]}


@router.get("/api/jobs/{id}")
def job(studio: Here, owner: Owner, id: str):
    return told(studio.progress(id, owner=owner))


@router.delete("/api/jobs/{id}")
def cancel(studio: Here, owner: Owner, id: str):
    studio.cancel(id, owner)
    return {"id": id}


@router.post("/api/jobs/{id}/resume")
def resume(studio: Here, owner: Owner, id: str):
    studio.resume(id, owner)
    return {"id": id}


@router.post("/api/jobs/{id}/again", status_code=201)
def again(studio: Here, owner: Owner, id: str):
    return {"id": studio.again(id, owner)}


@router.get("/pictures/{id}.{form}")
def image(studio: Here, owner: Viewer, id: str, form: str, size: str | None = None):
    """An image of the owner, or one to which a link was given; as PNG in its own size it is the very file.

    Args:
        size: as 512x512, to scale it.
    """
    saved = studio.store.image(id)  # only what is in the database has a file
    if form not in ("png", "jpeg", "webp"):
        raise HTTPException(404, f"there is no {form[:20]} file of an image: expected png, jpeg or webp")
    if owner not in (saved.owner, None):
        raise Forbidden("that image belongs to somebody else")
    pixels, image = pixels_of(size or ""), studio.store.opened(saved.id)
    if form == "png" and pixels is None:
        return Response(studio.store.file(saved.id).read_bytes(), media_type="image/png")
    data = base64.b64decode(encoded(image, shown(studio, saved), pixels, form))
    return Response(data, media_type=f"image/{form}")


@router.api_route("/api/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"], include_in_schema=False)
def unknown(path: str):
    raise HTTPException(404, f"there is no /api/{path[:100]}: see /openapi.json")
