"""OpenAI's images API (``/v1/images/generations``, ``/v1/images/edits``, ``/v1/models``), on the queue.

What has no meaning here (quality, style, background ...) is taken and not read; ``size`` scales the image, it does not change what is
drawn. ``seed`` and the sampling settings of `argen.request.Request` are extensions. An answer without ``response_format`` holds
both the image and its address.
"""

import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from typing import Annotated, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from argen.hub.cards import ids
from argen.images import TooLarge, read_image
from argen.jobs.following import last
from argen.jobs.queue import Progress, Studio
from argen.jobs.store import DONE
from argen.metadata import encoded
from argen.request import Request as Asked
from argen.request import rows_of
from argen.server.guard import Here, Links, Owner
from argen.server.jobs import asked, finished, pixels_of, shown
from argen.server.waiting import prepare, queued
from samplers.errors import InvalidValue
from tokenizers_img.pixels import to_mask, upright

router = APIRouter(tags=["OpenAI"])
MAX_NUM = 10  # images of a request
EDITED = 0.75  # share of the cells that are redrawn where no mask says which, the least probable ones
NAMED = "prompt", "model", "num_images", "seed", "control", "tokens"  # settings that have a field of OpenAI's, or none
EXTENSIONS = {  # without their bounds, which the request checks
    name: (field.annotation, field.get_default(call_default_factory=True))
    for name, field in Asked.__pydantic_fields__.items()
    if name not in NAMED
}


class Body(BaseModel):
    """A body in which null, or no name of a model, means what leaving the field out means."""

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given):
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None and (name, value) != ("model", "")}


Extensions = create_model("Extensions", __base__=Body, **EXTENSIONS)  # argen's own settings


class Generation(Extensions):
    """The body of ``/v1/images/generations``: in JSON numbers are numbers, in a form they are read from texts."""

    model_config = ConfigDict(strict=True)

    prompt: str
    model: str = Asked.model
    n: Annotated[int, Field(ge=1, le=MAX_NUM)] = 1
    size: str = "auto"
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    seed: Annotated[int, Field(ge=0)] = Field(default_factory=lambda: random.randrange(2**31))

    @property
    def pixels(self) -> tuple[int, int] | None:
        """See `argen.server.jobs.pixels_of`."""
        return pixels_of(self.size)

    def asked(self) -> Asked:
        """The generation request. Raises as `argen.server.jobs.asked` does."""
        given = {name: getattr(self, name) for name in EXTENSIONS if getattr(self, name) is not None}
        return asked({"prompt": self.prompt, "model": self.model, "num_images": self.n, "seed": self.seed, **given})

    def encode(self, image: Image.Image, request: Asked | None = None) -> str:
        """An image in the size and the format that are asked for, in base64."""
        return encoded(image, request, self.pixels, self.output_format, self.output_compression)


@router.post("/v1/images/generations")
async def generations(request: Request, studio: Here, owner: Owner, body: Generation):
    body.pixels  # noqa: B018, says so if there is no such size
    return await answer(request, studio, owner, body.asked(), body, "image_generation")


@router.post("/v1/images/edits")
async def edits(request: Request, studio: Here, owner: Owner):
    """A multipart form with the fields of a generation, ``image`` (or ``image[]``) and ``mask``: what is transparent in the mask, or
    without one in the image, is redrawn; where nothing is transparent, the least probable cells."""
    async with request.form(max_files=20) as form:
        files = {name: form.getlist(name) for name in ("image", "image[]", "mask")}
        images = [file for file in files["image"] + files["image[]"] if isinstance(file, UploadFile)]
        masks = [file for file in files["mask"] if isinstance(file, UploadFile)]
        given = {name: value for name, value in form.items() if isinstance(value, str) and name not in files and value}
        if len(images) != 1:
            raise InvalidValue(f"image: got {len(images)} images, expected one to edit", "image")
        image = await images[0].read()
        over = await masks[0].read() if masks else None
    try:
        body = Generation.model_validate_strings(given, strict=False)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    body.pixels  # noqa: B018
    return await answer(
        request, studio, owner, await prepare(request, _edited, studio, body, image, over), body, "image_edit"
    )


def _edited(studio: Studio, body: Generation, data: bytes, over: bytes | None) -> Asked:
    """The request for an edit of an image."""
    wanted = body.asked()
    with field("image"):
        image = read_image(data, "image")
    with field("mask"):
        mask = None if over is None else transparent(read_image(over, "mask"))
    with studio.model(wanted.model) as pipe:
        if mask is None and upright(image).getchannel("A").getextrema()[0] == 255:
            grid = pipe.mask_low_confidence(wanted, pipe.read_tokens(image), EDITED)
        else:
            grid = pipe.without(image, mask)
    return replace(wanted, tokens=rows_of(grid))


@router.get("/v1/models")
def models():
    return {"object": "list", "data": [named(name) for name in ids("generator")]}


@router.get("/v1/models/{name:path}")
def model(studio: Here, name: str):
    return named(studio.models.check(name))


@router.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"], include_in_schema=False)
def unknown(request: Request, path: str):
    raise HTTPException(
        404,
        f"unknown request URL: {request.method} /v1/{path[:100]}. There are /v1/images/generations, "
        "/v1/images/edits and /v1/models",
    )


async def answer(request: Request, studio: Studio, owner: str, wanted: Asked, how: Generation, kind: str):
    """What comes back for a request: all at once, or as it is written.

    Args:
        kind: of the events.
    """
    async with AsyncExitStack() as stack:
        partials = how.partial_images if how.stream else 0
        progress = await stack.enter_async_context(queued(request, studio, owner, wanted, partials))
        if how.stream:
            return StreamingResponse(
                events(studio, progress, how, kind, stack.pop_all()), media_type="text/event-stream"
            )
        now = finished(await last(progress))
    here, links = str(request.base_url), request.app.state.links
    data = [await run_sync(datum, studio, saved, how, here, links) for saved in now.images]
    return {"created": int(now.created), "data": data, "usage": usage(now), **told(how)}


def datum(studio: Studio, saved, how: Generation, here: str, links: Links) -> dict:
    """An image of an answer; `here` is the address of this server, and its `links` open without a key for a while."""
    path = f"/pictures/{saved.id}.{how.output_format}"
    address = here.rstrip("/") + links.signed(path, {"size": how.size} if how.pixels else {})
    if how.response_format == "url":
        return {"url": address}
    image = {"b64_json": how.encode(studio.store.opened(saved.id), shown(studio, saved))}
    return image if how.response_format else image | {"url": address}


async def events(
    studio: Studio, progress: AsyncIterator[Progress], how: Generation, kind: str, stack: AsyncExitStack
) -> AsyncIterator[str]:
    """Server-sent events of a job; `stack` is left at their end, which cancels a job that is not over."""
    async with stack:
        sent = 0
        async for now in progress:
            for image in now.partials[sent:]:
                encoded = await run_sync(how.encode, image)
                yield event(f"{kind}.partial_image", how, {"b64_json": encoded, "partial_image_index": sent})
                sent += 1
        if now.state != DONE:
            yield event("error", how, {"error": {"message": now.error or f"the job was {now.state}", "code": None}})
        for saved in now.images:
            image = await run_sync(how.encode, studio.store.opened(saved.id), shown(studio, saved))
            yield event(f"{kind}.completed", how, {"b64_json": image, "usage": usage(now)})


@contextmanager
def field(name: str) -> Iterator[None]:
    """What is wrong meanwhile is said of the field `name`."""
    try:
        yield
    except TooLarge as error:
        error.param = name
        raise
    except ValueError as error:
        raise InvalidValue(str(error), name) from error


def transparent(mask: Image.Image) -> Image.Image:
    """A mask of OpenAI (transparent: redrawn; one without transparency: black) -> one of ours (white: redrawn)."""
    return ImageOps.invert(mask.getchannel("A") if "A" in mask.getbands() else to_mask(mask))


def named(name: str) -> dict:
    return {"id": name, "object": "model", "created": 0, "owned_by": name.partition("/")[0]}


def usage(done: Progress) -> dict:
    """Tokens of the prompt are not counted."""
    written = done.cells * len(done.images)
    none = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": none, "output_tokens": written, "total_tokens": written}


def told(how: Generation) -> dict:
    """What every answer says of its images."""
    return {"size": how.size, "output_format": how.output_format, "quality": "auto", "background": "opaque"}


def event(kind: str, how: Generation, more: dict) -> str:
    own = {"type": kind, "created_at": int(time.time()), **told(how)}
    return f"event: {kind}\ndata: {json.dumps(own | more)}\n\n"
