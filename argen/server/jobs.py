"""The queue over HTTP: what argen's own programs use. ``POST /api/jobs`` takes the fields of `argen.request.Request`."""

from dataclasses import fields
from typing import Annotated, Any

from fastapi import APIRouter, Body, HTTPException
from fastapi.responses import FileResponse

from argen.registry import ids
from argen.request import Request as Asked
from argen.server.guard import Here, Owner, from_base64
from argen.studio.queue import NotYours, Progress
from argen.studio.store import DONE

router = APIRouter(tags=["queue"])
NAMES = tuple(item.name for item in fields(Asked))


def asked(given: dict[str, Any]) -> Asked:
    """A request out of JSON.

    Raises:
        ValueError: an unknown field, a value of the wrong kind or out of bounds, an unknown model.
    """
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}: expected some of {', '.join(NAMES)}")
    if (control := given.get("control")) is not None:
        if not isinstance(control, dict) or not isinstance(control.get("picture"), str):
            raise ValueError("control has no picture: expected the base64 of one, and its kind, strength and size")
        from_base64(control["picture"], "the control picture")
    try:
        request = Asked.from_dict(given)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"a field has a value of the wrong kind ({error})") from error
    check_model(request.model)
    return request


def check_model(name: str) -> None:
    """Raises:
    KeyError: no generator has this name.
    """
    known = ids("generator")
    if name not in known:
        raise KeyError(f"there is no model {name!r}: expected one of {', '.join(known)}")


def told(progress: Progress) -> dict:
    """A job as JSON."""
    names = "id", "state", "stage", "decided", "cells", "passes", "seconds", "error", "created", "place", "eta"
    pictures = [picture.id for picture in progress.pictures]
    return {name: getattr(progress, name) for name in names} | {
        "progress": progress.share,
        "request": progress.request.to_dict(),
        "pictures": pictures,
    }


def finished(now: Progress) -> Progress:
    """Raises:
    HTTPException: the job failed, or was cancelled.
    """
    if now.state != DONE:
        raise HTTPException(400 if now.error else 409, now.error or f"the job was {now.state}")
    return now


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


@router.get("/pictures/{id}.png")
def picture(studio: Here, owner: Owner, id: str) -> FileResponse:
    saved = studio.store.picture(id)  # only what is in the database has a file
    if saved.owner != owner:
        raise NotYours("that picture belongs to somebody else")
    return FileResponse(studio.store.file(saved.id), media_type="image/png")
