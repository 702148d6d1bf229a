"""The API of AUTOMATIC1111's web UI (``/sdapi/v1``), on the queue, for the clients that speak it.

Clients send a value for every field, so some values mean "not set": the seed -1, a guidance of 7, an unknown sampler. Width and
height scale the image and do not change its content; steps are read by the models that have them. Fields that are not used are
listed in the `comments` of the response's `info`.
"""

import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import psutil
import torch
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request
from fastapi import Body as BodyParam
from PIL import ImageOps
from pydantic import Field
from starlette.exceptions import HTTPException

from argen.bounds import MAX_SCALED, check_pixels, check_size
from argen.hub.cards import reading_of
from argen.images import from_base64
from argen.jobs.queue import Progress, Studio
from argen.jobs.store import CANCELLED, RUNNING
from argen.metadata import encoded, infotext
from argen.registry import samplers
from argen.request import Request as GenerationRequest
from argen.request import rows_of
from argen.server.errors import check_method
from argen.server.guard import Owner, StudioDep
from argen.server.jobs import check_finished, embedded_request
from argen.server.openai import Body
from argen.server.scaling import UPSCALER
from argen.server.submission import prepare, result
from argen.words import number_of
from samplers.settings import settings_of
from tokenizers_img.pixels import to_mask

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
UNCHOSEN_GUIDANCE = 7.0
A1111_SAMPLERS = ("euler", "heun")  # that argen has for continuous latents; clients send these names for every model
EMPTY = (  # lists that are empty in argen
    "schedulers",
    "latent-upscale-modes",
    "sd-vae",
    "sd-modules",
    "loras",
    "hypernetworks",
    "face-restorers",
    "realesrgan-models",
    "prompt-styles",
    "artists",
    "artist-categories",
    "extensions",
    "script-info",
)
UNUSED = {  # fields of a response's `info` that argen does not have
    "subseed": 0,
    "subseed_strength": 0,
    "styles": [],
    "index_of_first_image": 0,
    "extra_generation_params": {},
    "restore_faces": False,
    "face_restoration_model": None,
    "clip_skip": 1,
    "denoising_strength": None,
    "is_using_inpainting_conditioning": False,
}
DESCRIBER = "argen/emoji-seed-lm"  # captions images


def _default_models(request: Request) -> dict[str, str]:
    return request.app.state.models


DefaultModels = Annotated[dict[str, str], Depends(_default_models)]  # owner -> model


class Text(Body):
    """The body of ``txt2img``; unknown fields are ignored."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(-1, ge=-1)
    width: int = 512
    height: int = 512
    cfg_scale: float = Field(UNCHOSEN_GUIDANCE, allow_inf_nan=False)
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    sampler_name: str | None = None
    sampler_index: str | None = None  # its older name
    steps: int | None = Field(None, ge=1, le=1000)
    override_settings: dict[str, Any] = {}
    send_images: bool = True
    enable_hr: bool = False
    restore_faces: bool = False
    tiling: bool = False


class ImageArray(Text):
    """The body of ``img2img``."""

    init_images: list[str] = Field(min_length=1)
    mask: str | None = None
    inpainting_mask_invert: bool = False
    denoising_strength: float = Field(0.75, ge=0, le=1)


@router.post("/txt2img")
async def txt2img(request: Request, studio: StudioDep, owner: Owner, default_models: DefaultModels, body: Text):
    job_request = await prepare(
        request, txt2img_request, studio, default_models.get(owner, GenerationRequest.model), body
    )
    return await answer(request, studio, owner, body, job_request)


@router.post("/img2img")
async def img2img(request: Request, studio: StudioDep, owner: Owner, default_models: DefaultModels, body: ImageArray):
    """Inpaint the white part of the mask or, without one, the least probable cells, as many as `denoising_strength` says."""
    job_request = await prepare(
        request, img2img_request, studio, default_models.get(owner, GenerationRequest.model), body
    )
    return await answer(request, studio, owner, body, job_request)


def img2img_request(studio: Studio, model: str, body: ImageArray) -> GenerationRequest:
    image, job_request = from_base64(body.init_images[0]), txt2img_request(studio, model, body)
    mask = to_mask(from_base64(body.mask, "the mask")) if body.mask and body.mask.strip() else None
    with studio.model(job_request.model) as pipe:
        if mask is None:
            grid = pipe.mask_low_confidence(job_request, pipe.read_tokens(image), body.denoising_strength)
        else:
            grid = pipe.without(image, ImageOps.invert(mask) if body.inpainting_mask_invert else mask)
    return replace(job_request, tokens=rows_of(grid))


def txt2img_request(studio: Studio, model: str, body: Text) -> GenerationRequest:
    """Build the generation request of a body, without the values that mean "not set"; `model` is the default."""
    model = str(body.override_settings.get("sd_model_checkpoint") or model)
    check_size((body.width, body.height), MAX_SCALED)
    pipe = studio.models(model)
    job_request = GenerationRequest(
        body.prompt,
        model,
        num_images=body.batch_size * body.n_iter,
        seed=random.randrange(2**32) if body.seed < 0 else body.seed,
        guidance_scale=None if body.cfg_scale == UNCHOSEN_GUIDANCE else body.cfg_scale,
        sampler=sampler_of(body, pipe.samplers) or GenerationRequest.sampler,
        steps=body.steps if pipe.defaults.steps is not None else None,
    )
    check_pixels(body.width * body.height * job_request.num_images)
    return job_request


def sampler_of(body: Text, names: Sequence[str]) -> str | None:
    """Return the sampler that the body names, in any case, with blanks or hyphens, and with settings behind it, e.g. "lantern:k=5".
    None, for the default one, where it is a sampler of A1111's and not in `names`, those that fit the model; one of argen's that does not fit
    is refused later, as everywhere."""
    typed = body.sampler_name or body.sampler_index or ""
    name, colon, settings = typed.partition(":")
    name = re.sub(r"[\s_-]+", "_", name.strip().lower())
    named = bool(colon) or name in names or name in samplers and name not in A1111_SAMPLERS
    return name + colon + settings if named else None


def comments(body: Text, job_request: GenerationRequest) -> list[str]:
    """List the fields of a body that are not used, a line each."""
    sampler = body.sampler_name or body.sampler_index
    images = len(body.init_images) if isinstance(body, ImageArray) else 1
    unread = {
        "negative_prompt": body.negative_prompt.strip(),
        "enable_hr": body.enable_hr,
        "restore_faces": body.restore_faces,
        "tiling": body.tiling,
    }
    lines = [f"{name} is not used: argen's models do not read it" for name, value in unread.items() if value]
    if images > 1:
        lines.append(f"{images} init_images were sent: the first one was used")
    if sampler and sampler_of(body, [job_request.sampler]) is None:
        lines.append(f"there is no sampler {sampler[:60]!r} for this model: {job_request.sampler_text} was used")
    return lines


async def answer(request: Request, studio: Studio, owner: str, body: Text, job_request: GenerationRequest) -> dict:
    """Run a request and return its images; of an interrupted one its previews."""
    progress = await result(request, studio, owner, job_request)
    if progress.state != CANCELLED:
        check_finished(progress)
    return await run_sync(response_json, studio, body, job_request, progress)


def response_json(studio: Studio, body: Text, job_request: GenerationRequest, progress: Progress) -> dict:
    size, requests, notes = (
        (body.width, body.height),
        [saved.request for saved in progress.images],
        comments(body, job_request),
    )
    images = [studio.store.read_image(saved.id) for saved in progress.images]
    embedded: list[GenerationRequest | None] = [embedded_request(studio, saved) for saved in progress.images]
    if progress.state == CANCELLED:
        images = list(progress.preview or [])[: job_request.num_images]
        requests = [job_request.for_image(index) for index in range(len(images))]
        embedded = [None] * len(images)  # these would reproduce finished images
        notes.append(
            f"interrupted at {progress.share:.0%}: {len(images)} of {number_of(job_request.num_images, 'image')}"
        )
    reading = reading_of(job_request.model, job_request.prompt, job_request.literal)
    notes += reading.notes
    texts = [infotext(request, size) for request in requests]
    info = {
        "prompt": job_request.prompt,
        "all_prompts": [request.prompt for request in requests],
        "revised_prompt": reading.text,
        "negative_prompt": "",
        "all_negative_prompts": [""] * len(requests),
        "seed": job_request.seed,
        "all_seeds": [request.seed for request in requests],
        "width": size[0],
        "height": size[1],
        "sampler_name": job_request.sampler_text,
        "cfg_scale": requests[0].guidance_scale if requests else job_request.guidance_scale,
        "steps": requests[0].steps if requests else job_request.steps,
        "batch_size": body.batch_size,
        "sd_model_name": job_request.model,
        "infotexts": texts,
        "comments": notes,
    } | UNUSED
    info |= {
        "all_subseeds": [0] * len(requests),
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(progress.created)),
    }
    files = []
    for image, request, text in zip(images, embedded, texts, strict=True):
        if studio.store.metadata:
            image.info["parameters"] = text
        files.append(encoded(image, request, size))
    parameters = body.model_dump(exclude={"init_images", "mask"})
    return {"images": files if body.send_images else [], "parameters": parameters, "info": json.dumps(info)}


@router.post("/interrogate")
async def interrogate(request: Request, studio: StudioDep, image: Annotated[str, BodyParam(embed=True)]):
    return {"caption": await prepare(request, caption_image, studio, image)}


def caption_image(studio: Studio, text: str) -> str:
    image = from_base64(text)
    with studio.model(DESCRIBER) as pipe:
        return pipe.describe(image, temperature=0.0)


@router.get("/progress")
def progress(studio: StudioDep, owner: Owner):
    jobs = studio.queue(owner)
    current = next((studio.progress(job.id, preview=True) for job in jobs if job.state == RUNNING), None)
    return {
        "progress": current.share if current else 0.0,
        "eta_relative": (current.eta or 0.0) if current else 0.0,
        "state": state(current, len(jobs)),
        "current_image": encoded(current.preview[0]) if current and current.preview else None,
        "textinfo": current.stage if current else None,
    }


@router.post("/interrupt")
@router.post("/skip")
def interrupt(studio: StudioDep, owner: Owner):
    for job in studio.queue(owner):
        if job.state == RUNNING:
            studio.cancel(job.id, owner)
    return {}


@router.get("/options")
def options(owner: Owner, default_models: DefaultModels):
    return {"sd_model_checkpoint": default_models.get(owner, GenerationRequest.model), "samples_format": "png"}


@router.post("/options")
def set_options(
    studio: StudioDep, owner: Owner, default_models: DefaultModels, options: Annotated[dict[str, Any], BodyParam()]
):
    if options.get("sd_model_checkpoint") is not None:
        name = str(options["sd_model_checkpoint"])
        studio.models.check(name)
        default_models[owner] = name
    return {}


@router.get("/sd-models")
def models(studio: StudioDep):
    unknown_fields = {"hash": None, "sha256": None, "filename": "", "config": None}
    return [{"title": name, "model_name": name, **unknown_fields} for name in studio.models.generators()]


@router.post("/refresh-checkpoints")
@router.post("/refresh-vae")
@router.post("/refresh-loras")
@router.post("/unload-checkpoint")
@router.post("/reload-checkpoint")
def nothing_to_do():
    """Do nothing: the list of models is always the newest, and they are loaded on first use."""
    return {}


@router.get("/samplers")
def list_samplers():
    return [{"name": name, "aliases": [], "options": sampler_options(name)} for name in samplers]


def sampler_options(name: str) -> dict[str, str]:
    """The settings of a sampler with their defaults, as they are typed behind its name."""
    declared = settings_of(samplers[name]).values()
    return {setting.name: str(setting.default).lower() for setting in declared if setting.kind}


@router.get("/upscalers")
def upscalers():
    none = {"model_name": None, "model_path": None, "model_url": None}
    return [{"name": UPSCALER, "scale": 4.0, **none}]


@router.get("/scripts")
def scripts():
    return {"txt2img": [], "img2img": []}


@router.get("/embeddings")
def embeddings():
    return {"loaded": {}, "skipped": {}}


@router.get("/memory")
def memory():
    """Return the free, used and total memory in bytes."""
    ram = psutil.virtual_memory()
    cuda: dict[str, Any] = {"error": "no CUDA device"}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        cuda = {"system": {"free": free, "used": total - free, "total": total}}
    return {"ram": {"free": ram.available, "used": ram.total - ram.available, "total": ram.total}, "cuda": cuda}


@router.get("/cmd-flags")
def flags():
    return {}


@router.post("/png-info")
def png_info(image: Annotated[str, BodyParam(embed=True)]):
    items = {name: value for name, value in from_base64(image).info.items() if isinstance(value, str)}
    return {"info": items.get("parameters", ""), "items": items, "parameters": {}}


def empty_list() -> list:
    return []


for name in EMPTY:
    router.add_api_route(f"/{name}", empty_list, methods=["GET"], name=name)


@router.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"], include_in_schema=False)
def unknown(request: Request, path: str):
    check_method(request, router)
    raise HTTPException(404, f"argen has no /sdapi/v1/{path[:100]}")


def state(progress: Progress | None, jobs: int) -> dict:
    """Return the state of a job as A1111 clients expect it."""
    return {
        "skipped": False,
        "interrupted": False,
        "job": progress.id if progress else "",
        "job_count": jobs,
        "job_no": 0,
        "sampling_step": progress.decided if progress else 0,
        "sampling_steps": progress.cells if progress else 0,
    }
