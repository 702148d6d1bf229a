"""OpenAI's images API (``/v1/images/generations``, ``/v1/images/edits``, ``/v1/models``), on the queue.

OpenAI's fields without a meaning here (`UNUSED_FIELDS`) are accepted and ignored, unknown ones refused; ``size`` scales the image and does not change
its content. ``seed`` and the sampling settings of `argen.request.Request` are extensions. A response without ``response_format`` has
both the image and its URL.
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

from argen.hub.cards import reading_of
from argen.images import TooLarge, read_image
from argen.jobs.job_progress import final_progress
from argen.jobs.queue import Progress, Studio
from argen.jobs.store import DONE
from argen.metadata import encoded
from argen.registry import nearest
from argen.request import Request as GenerationRequest
from argen.request import rows_of
from argen.server.errors import check_method
from argen.server.guard import Links, Owner, StudioDep
from argen.server.jobs import check_finished, embedded_request, parse_request, pixels_of
from argen.server.submission import prepare, queued
from argen.words import cut
from samplers.errors import InvalidValue
from tokenizers_img.pixels import to_mask, upright

router = APIRouter(tags=["OpenAI"])
MAX_NUM = 10  # images of a request
EDIT_SHARE = 0.75  # share of the cells that are redrawn where no mask says which, the least probable ones
OPENAI_FIELDS = (
    "prompt",
    "model",
    "num_images",
    "seed",
    "control",
    "tokens",
)  # settings that have a field of OpenAI's, or none
UNUSED_FIELDS = ("quality", "style", "background", "moderation", "user", "input_fidelity")  # of OpenAI's
EXTENSIONS = {  # without their bounds, which the request checks
    name: (field.annotation, field.get_default(call_default_factory=True))
    for name, field in GenerationRequest.__pydantic_fields__.items()
    if name not in OPENAI_FIELDS
}


class Body(BaseModel):
    """Base of bodies in which null, or an empty model name, means that the field is left out."""

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values):
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None and (name, value) != ("model", "")}


Extensions = create_model("Extensions", __base__=Body, **EXTENSIONS)  # argen's own settings


class Generation(Extensions):
    """The body of ``/v1/images/generations``: strict types in JSON; in a form, numbers are parsed from text."""

    model_config = ConfigDict(strict=True, extra="allow")  # `to_request` refuses what nobody knows

    prompt: str
    model: str = GenerationRequest.model
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

    def to_request(self) -> GenerationRequest:
        """Convert to a generation request. Raises as `argen.server.jobs.parse_request` does, and of an unknown field."""
        known = [*type(self).model_fields, *UNUSED_FIELDS]
        for name in self.model_extra or {}:
            if name not in UNUSED_FIELDS:
                raise InvalidValue(
                    f"unknown parameter {cut(name)!r}: see docs/serving.md for those there are{nearest(name, known)}",
                    name,
                    "unknown_parameter",
                )
        settings = {name: getattr(self, name) for name in EXTENSIONS if getattr(self, name) is not None}
        return parse_request(
            {"prompt": self.prompt, "model": self.model, "num_images": self.n, "seed": self.seed, **settings}
        )

    def encode(self, image: Image.Image, request: GenerationRequest | None = None) -> str:
        """Encode an image in the requested size and format, as base64."""
        return encoded(image, request, self.pixels, self.output_format, self.output_compression)


@router.post("/v1/images/generations")
async def generations(request: Request, studio: StudioDep, owner: Owner, body: Generation):
    body.pixels  # noqa: B018, raises if the size is invalid
    return await answer(request, studio, owner, body.to_request(), body, "image_generation")


@router.post("/v1/images/edits")
async def edits(request: Request, studio: StudioDep, owner: Owner):
    """Edit an image: a multipart form with the fields of a generation, ``image`` (or ``image[]``) and ``mask``. Transparent parts of
    the mask, or without one of the image, are redrawn; if nothing is transparent, the least probable cells."""
    async with request.form(max_files=20) as form:
        files = {name: form.getlist(name) for name in ("image", "image[]", "mask")}
        images = [file for file in files["image"] + files["image[]"] if isinstance(file, UploadFile)]
        masks = [file for file in files["mask"] if isinstance(file, UploadFile)]
        fields = {name: value for name, value in form.items() if isinstance(value, str) and name not in files and value}
        if len(images) != 1:
            raise InvalidValue(f"image: got {len(images)} images, expected one to edit", "image")
        image = await images[0].read()
        mask = await masks[0].read() if masks else None
    try:
        body = Generation.model_validate_strings(fields, strict=False)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    body.pixels  # noqa: B018
    return await answer(
        request, studio, owner, await prepare(request, _edit_request, studio, body, image, mask), body, "image_edit"
    )


def _edit_request(studio: Studio, body: Generation, data: bytes, mask: bytes | None) -> GenerationRequest:
    """Build the generation request of an edit."""
    job_request = body.to_request()
    with field("image"):
        image = read_image(data, "image")
    with field("mask"):
        parsed_mask = None if mask is None else convert_mask(read_image(mask, "mask"))
    with studio.model(job_request.model) as pipe:
        if parsed_mask is None and upright(image).getchannel("A").getextrema()[0] == 255:
            grid = pipe.mask_low_confidence(job_request, pipe.read_tokens(image), EDIT_SHARE)
        else:
            grid = pipe.without(image, parsed_mask)
    return replace(job_request, tokens=rows_of(grid))


@router.get("/v1/models")
def models(studio: StudioDep):
    return {"object": "list", "data": [model_object(name) for name in studio.models.generators()]}


@router.get("/v1/models/{name:path}")
def model(studio: StudioDep, name: str):
    studio.models.check(name)
    return model_object(name)


@router.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"], include_in_schema=False)
def unknown(request: Request, path: str):
    check_method(request, router)
    raise HTTPException(
        404,
        f"unknown request URL: {request.method} /v1/{path[:100]}. There are /v1/images/generations, "
        "/v1/images/edits and /v1/models",
    )


async def answer(
    request: Request, studio: Studio, owner: str, job_request: GenerationRequest, body: Generation, kind: str
):
    """Run a request and return its images, at once or as a stream of events.

    Args:
        kind: of the events.
    """
    async with AsyncExitStack() as stack:
        partials = body.partial_images if body.stream else 0
        progress = await stack.enter_async_context(queued(request, studio, owner, job_request, partials))
        if body.stream:
            return StreamingResponse(
                events(studio, progress, body, kind, stack.pop_all()), media_type="text/event-stream"
            )
        finished_job = check_finished(await final_progress(progress))
    base_url, links = str(request.base_url), request.app.state.links
    data = [await run_sync(image_datum, studio, saved, body, base_url, links) for saved in finished_job.images]
    return {"created": int(finished_job.created), "data": data, "usage": usage(finished_job), **image_fields(body)}


def image_datum(studio: Studio, saved, body: Generation, base_url: str, links: Links) -> dict:
    """Return an image of a response; `base_url` is that of this server, and its signed `links` need no key for a while."""
    path = f"/pictures/{saved.id}.{body.output_format}"
    address = base_url.rstrip("/") + links.signed(path, {"size": body.size} if body.pixels else {})
    reading = reading_of(saved.request.model, saved.request.prompt, saved.request.literal)
    if body.response_format == "url":
        return {"url": address, "revised_prompt": reading.text}
    image = {
        "revised_prompt": reading.text,
        "b64_json": body.encode(studio.store.read_image(saved.id), embedded_request(studio, saved)),
    }
    return image if body.response_format else image | {"url": address}


async def events(
    studio: Studio, progress: AsyncIterator[Progress], body: Generation, kind: str, stack: AsyncExitStack
) -> AsyncIterator[str]:
    """Yield the server-sent events of a job; closing `stack` at their end cancels a job that is not over."""
    async with stack:
        num_sent = 0
        async for update in progress:
            for image in update.partials[num_sent:]:
                encoded = await run_sync(body.encode, image)
                yield event(f"{kind}.partial_image", body, {"b64_json": encoded, "partial_image_index": num_sent})
                num_sent += 1
        if update.state != DONE:
            yield event(
                "error", body, {"error": {"message": update.error or f"the job was {update.state}", "code": None}}
            )
        for saved in update.images:
            image = await run_sync(body.encode, studio.store.read_image(saved.id), embedded_request(studio, saved))
            yield event(f"{kind}.completed", body, {"b64_json": image, "usage": usage(update)})


@contextmanager
def field(name: str) -> Iterator[None]:
    """Context that attributes errors to the field `name`."""
    try:
        yield
    except TooLarge as error:
        error.param = name
        raise
    except ValueError as error:
        raise InvalidValue(str(error), name) from error


def convert_mask(mask: Image.Image) -> Image.Image:
    """Convert a mask of OpenAI (transparent, or without alpha black: redrawn) to one of argen (white: redrawn)."""
    return ImageOps.invert(mask.getchannel("A") if "A" in mask.getbands() else to_mask(mask))


def model_object(name: str) -> dict:
    return {"id": name, "object": "model", "created": 0, "owned_by": name.partition("/")[0]}


def usage(progress: Progress) -> dict:
    """Return the token counts of a job; those of the prompt are not counted."""
    output_tokens = progress.cells * len(progress.images)
    none = {"image_tokens": 0, "text_tokens": 0}
    return {
        "input_tokens": 0,
        "input_tokens_details": none,
        "output_tokens": output_tokens,
        "total_tokens": output_tokens,
    }


def image_fields(body: Generation) -> dict:
    """Return the fields that describe the images of every response."""
    return {"size": body.size, "output_format": body.output_format, "quality": "auto", "background": "opaque"}


def event(kind: str, body: Generation, fields: dict) -> str:
    common_fields = {"type": kind, "created_at": int(time.time()), **image_fields(body)}
    return f"event: {kind}\ndata: {json.dumps(common_fields | fields)}\n\n"
