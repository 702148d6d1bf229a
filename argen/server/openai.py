"""OpenAI's images API (``/v1/images/generations``, ``/v1/images/edits``, ``/v1/models``), on the queue.

What has no meaning here (quality, style, background ...) is taken and not read; ``size`` enlarges, it does not change what is drawn.
``seed`` and the sampling settings of `argen.request.Request` are extensions.
"""

import json
import re
import time
from collections.abc import Iterator
from typing import Annotated, Literal

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.responses import StreamingResponse
from PIL import Image, ImageOps
from pydantic import BaseModel, Field

from argen.registry import ids
from argen.request import Request as Asked
from argen.request import rows_of, to_base64
from argen.server.guard import Here, Owner, check_size, enlarged, read_picture
from argen.server.jobs import asked, check_model, finished
from argen.studio.queue import Progress, Studio
from argen.studio.store import DONE, Saved

router = APIRouter(tags=["OpenAI"])
MOST = 10  # pictures of a request
EXTENSIONS = ("guidance_scale", "temperature", "top_k", "top_p", "sampler", "num_candidates", "num_tokens")


class Generation(BaseModel):
    """The body of ``/v1/images/generations``."""

    prompt: str
    model: str = Asked.model
    n: int = Field(1, ge=1, le=MOST, strict=True)
    size: str = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    seed: int = Field(0, ge=0, strict=True)
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    sampler: str = Asked.sampler
    num_candidates: int | None = None
    num_tokens: int | None = None


def wanted_size(text: str | None) -> tuple[int, int] | None:
    """ "512x512" -> its numbers; "auto" -> None, the model's own.

    Raises:
        ValueError: something else.
    """
    if text in (None, "", "auto"):
        return None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not found:
        raise ValueError(f"size is {text!r}: expected auto, or as 512x512")
    return check_size([int(side) for side in found.groups()])


@router.post("/v1/images/generations")
def generations(request: Request, studio: Here, owner: Owner, body: Generation):
    wanted_size(body.size)
    given = {name: getattr(body, name) for name in EXTENSIONS if getattr(body, name) is not None}
    wish = asked({"prompt": body.prompt, "model": body.model, "num_images": body.n, "seed": body.seed, **given})
    return answer(studio, studio.submit(wish, owner), body, "image_generation", str(request.base_url))


@router.post("/v1/images/edits")
def edits(
    request: Request,
    studio: Here,
    owner: Owner,
    prompt: Annotated[str, Form()],
    image: UploadFile,
    mask: UploadFile | None = None,
    model: Annotated[str, Form()] = Asked.model,
    n: Annotated[int, Form(ge=1, le=MOST)] = 1,
    size: Annotated[str, Form()] = "auto",
    response_format: Annotated[Literal["b64_json", "url"], Form()] = "b64_json",
    stream: Annotated[bool, Form()] = False,
    partial_images: Annotated[int, Form(ge=0, le=3)] = 0,
    seed: Annotated[int, Form(ge=0)] = 0,
):
    """The cells under what is transparent in the mask (without one, in the picture) are written anew."""
    wanted_size(size)
    check_model(model)
    picture = read_picture(image.file.read())
    over = transparent(read_picture(mask.file.read(), "the mask")) if mask is not None else None
    with studio.model(model) as pipe:
        grid = rows_of(pipe.without(picture, over))
    wish = Asked(prompt, model, num_images=n, seed=seed, tokens=grid)
    how = {"size": size, "response_format": response_format, "stream": stream, "partial_images": partial_images}
    body = Generation(prompt=prompt, model=model, n=n, **how)
    return answer(studio, studio.submit(wish, owner), body, "image_edit", str(request.base_url))


@router.get("/v1/models")
def models():
    return {"object": "list", "data": [named(name) for name in ids("generator")]}


@router.get("/v1/models/{name:path}")
def model(name: str):
    check_model(name)
    return named(name)


def answer(studio: Studio, job: str, how: Generation, kind: str, here: str):
    """What comes back for a job: all at once, or as it is written.

    Args:
        kind: of the events.
        here: address of this server.
    """
    if how.stream:
        return StreamingResponse(events(studio, job, how, kind), media_type="text/event-stream")
    done = finished(studio.result(job))
    if how.response_format == "url":
        data = [{"url": f"{here}pictures/{saved.id}.png"} for saved in done.pictures]
    else:
        data = [{"b64_json": shown(studio, saved, how)} for saved in done.pictures]
    return {"created": int(done.created), "data": data, "usage": usage(done)}


def shown(studio: Studio, saved: Saved, how: Generation) -> str:
    return to_base64(enlarged(studio.store.opened(saved.id), wanted_size(how.size)))


def events(studio: Studio, job: str, how: Generation, kind: str) -> Iterator[str]:
    """Server-sent events of a job; a client that goes away cancels it."""
    sent, now = 0, None
    try:
        for now in studio.watch(job, preview=how.partial_images > 0, patience=0.2):
            due = sent < how.partial_images and now.share >= (sent + 1) / (how.partial_images + 1)
            if due and not now.over and now.preview:
                picture = to_base64(enlarged(now.preview[0], wanted_size(how.size)))
                yield event(f"{kind}.partial_image", how, {"b64_json": picture, "partial_image_index": sent})
                sent += 1
        if now.state != DONE:
            yield event("error", how, {"error": {"message": now.error or f"the job was {now.state}", "code": None}})
        for saved in now.pictures:
            yield event(f"{kind}.completed", how, {"b64_json": shown(studio, saved, how), "usage": usage(now)})
    finally:
        if now is None or not now.over:
            studio.cancel(job)


def transparent(mask: Image.Image) -> Image.Image:
    """A mask of OpenAI (transparent: anew; one without transparency: black) -> one of ours (white: anew)."""
    return ImageOps.invert(mask.getchannel("A") if "A" in mask.getbands() else mask.convert("L"))


def named(name: str) -> dict:
    return {"id": name, "object": "model", "created": 0, "owned_by": name.partition("/")[0]}


def usage(done: Progress) -> dict:
    """Tokens of the prompt are not counted."""
    written = done.cells * len(done.pictures)
    return {"input_tokens": 0, "output_tokens": written, "total_tokens": written}


def event(kind: str, how: Generation, more: dict) -> str:
    own = {"type": kind, "created_at": int(time.time()), "size": how.size, "output_format": "png"}
    own |= {"quality": "auto", "background": "opaque"}
    return f"event: {kind}\ndata: {json.dumps(own | more)}\n\n"
