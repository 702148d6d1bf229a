"""The queue over HTTP, argen's own API. ``POST /api/jobs`` takes the fields of `argen.request.Request`."""

import base64
import re
from dataclasses import fields
from typing import Annotated, Any

from fastapi import APIRouter, Body, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from argen.bounds import MAX_SCALED, check_size
from argen.jobs.queue import Forbidden, Progress, Studio
from argen.jobs.store import DONE, WAITING, SavedImage
from argen.metadata import encoded
from argen.registry import nearest
from argen.request import Request as GenerationRequest
from argen.server.errors import check_method
from argen.server.guard import Owner, StudioDep, Viewer
from samplers.errors import InvalidValue

router = APIRouter(tags=["queue"])
NAMES = tuple(item.name for item in fields(GenerationRequest))


def parse_request(values: dict[str, Any]) -> GenerationRequest:
    """Parse a generation request from JSON.

    Raises:
        ValueError: an unknown field, a value of the wrong type or out of bounds.
    """
    unknown = [name for name in values if name not in NAMES]
    if unknown:
        raise ValueError(
            f"unknown field {unknown[0]!r}: expected some of {', '.join(NAMES)}{nearest(unknown[0], NAMES)}"
        )
    try:
        job_request = GenerationRequest.from_dict(values)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"a field has a value of the wrong kind ({error})") from error
    return job_request


def job_json(progress: Progress) -> dict:
    """Convert a job to JSON."""
    names = "id", "state", "stage", "decided", "cells", "forward_passes", "seconds", "error", "created", "place", "eta"
    images = [image.id for image in progress.images]
    return {name: getattr(progress, name) for name in names} | {
        "progress": progress.share,
        "request": progress.request.to_dict(),
        "images": images,
    }


def check_finished(progress: Progress) -> Progress:
    """Raises:
    HTTPException: the job failed, or was cancelled.
    """
    if progress.state != DONE:
        raise HTTPException(400 if progress.error else 409, progress.error or f"the job was {progress.state}")
    return progress


def pixels_of(size: str) -> tuple[int, int] | None:
    """Parse "512x512" to its numbers; "auto" or "" to None, the image's own size.

    Raises:
        ValueError: an invalid size, or one above the limit.
    """
    if size in ("", "auto"):
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not match:
        raise InvalidValue(f"size is {size[:40]!r}: expected auto, or e.g. 512x512", "size")
    return check_size((int(match[1]), int(match[2])), MAX_SCALED)


def embedded_request(studio: Studio, saved: SavedImage) -> GenerationRequest | None:
    """Return the request to embed in an image's file; None if metadata is off."""
    return saved.request if studio.store.metadata else None


@router.get("/health")
def health(studio: StudioDep):
    """Whether jobs are run; 503 where they are not. Needs no key."""
    status = {
        "status": "ok" if studio.alive else "failed",
        "paused": studio.paused,
        "waiting": studio.store.count(WAITING),
    }
    return JSONResponse(status, 200 if studio.alive else 503)


@router.post("/api/jobs", status_code=201)
def submit(studio: StudioDep, owner: Owner, values: Annotated[dict[str, Any], Body()]):
    return {"id": studio.submit(parse_request(values), owner)}


@router.get("/api/jobs")
def list_jobs(studio: StudioDep, owner: Owner):
    return {"paused": studio.paused, "jobs": [job_json(progress) for progress in studio.queue(owner)]}


@router.get("/api/jobs/{id}")
def job(studio: StudioDep, owner: Owner, id: str):
    return job_json(studio.progress(id, owner=owner))


@router.delete("/api/jobs/{id}")
def cancel(studio: StudioDep, owner: Owner, id: str):
    studio.cancel(id, owner)
    return {"id": id}


@router.post("/api/jobs/{id}/resume")
def resume(studio: StudioDep, owner: Owner, id: str):
    studio.resume(id, owner)
    return {"id": id}


@router.post("/api/jobs/{id}/again", status_code=201)
def submit_next_seeds(studio: StudioDep, owner: Owner, id: str):
    return {"id": studio.submit_next_seeds(id, owner)}


@router.get("/pictures/{id}.{form}")
def image(studio: StudioDep, owner: Viewer, id: str, form: str, size: str | None = None):
    """Return an image of the owner, or one with a signed link; as PNG in its own size the stored file.

    Args:
        size: e.g. 512x512, to scale it.
    """
    saved = studio.store.image(id)  # the id comes from the client: only those in the database have a file
    if form not in ("png", "jpeg", "webp"):
        raise HTTPException(404, f"there is no {form[:20]} file of an image: expected png, jpeg or webp")
    if owner not in (saved.owner, None):
        raise Forbidden("that image belongs to somebody else")
    pixels, image = pixels_of(size or ""), studio.store.read_image(saved.id)
    if form == "png" and pixels is None:
        return Response(studio.store.file(saved.id).read_bytes(), media_type="image/png")
    data = base64.b64decode(encoded(image, embedded_request(studio, saved), pixels, form))
    return Response(data, media_type=f"image/{form}")


@router.api_route("/api/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"], include_in_schema=False)
def unknown(request: Request, path: str):
    check_method(request, router)
    raise HTTPException(404, f"there is no /api/{path[:100]}: see /openapi.json")
