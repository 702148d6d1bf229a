"""The API of AUTOMATIC1111's web UI (``/sdapi/v1``), on the queue, for the clients that speak it.

They send a value for everything, so some mean "nobody chose": the seed -1, a guidance of 7, a sampler that is not one of ours.
Width and height enlarge, they do not change what is drawn; steps are read by the models that have some.
"""

import json
import random
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from PIL import ImageOps
from pydantic import BaseModel, Field

from argen.metadata import infotext
from argen.registry import ids
from argen.request import Request as Asked
from argen.request import rows_of, to_base64
from argen.server.guard import Here, Owner, check_size, enlarged, from_base64
from argen.server.jobs import check_model, finished
from argen.studio.queue import Progress, Studio
from argen.studio.store import RUNNING
from samplers import SAMPLERS, SOLVERS

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
UNCHOSEN_GUIDANCE = 7.0
NONE_OF_THOSE = (
    "schedulers",
    "upscalers",
    "latent-upscale-modes",
    "sd-vae",
    "loras",
    "hypernetworks",
    "face-restorers",
)
NONE_OF_THOSE += ("realesrgan-models", "prompt-styles")


def _chosen(request: Request) -> dict[str, str]:
    return request.app.state.models


Chosen = Annotated[dict[str, str], Depends(_chosen)]  # owner -> model


class Text(BaseModel):
    """The body of ``txt2img``; what else a client sends is not read."""

    prompt: str = ""
    seed: int = Field(-1, ge=-1)
    width: int = 512
    height: int = 512
    cfg_scale: float = Field(UNCHOSEN_GUIDANCE, allow_inf_nan=False)
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    sampler_name: str | None = None
    steps: int | None = Field(None, ge=1, le=1000)
    override_settings: dict[str, Any] = {}


class Picture(Text):
    """The body of ``img2img``."""

    init_images: list[str] = Field(min_length=1, max_length=1)
    mask: str | None = None
    inpainting_mask_invert: bool = False
    denoising_strength: float = Field(0.75, ge=0, le=1)


@router.post("/txt2img")
def txt2img(studio: Here, owner: Owner, chosen: Chosen, body: Text):
    return carried_out(studio, owner, body, wish(studio, chosen.get(owner, Asked.model), body))


@router.post("/img2img")
def img2img(studio: Here, owner: Owner, chosen: Chosen, body: Picture):
    """With a mask its white part is written anew, else as many of the least certain cells as the strength says."""
    picture, asked = from_base64(body.init_images[0]), wish(studio, chosen.get(owner, Asked.model), body)
    with studio.model(asked.model) as pipe:
        if body.mask is None:
            grid = pipe.loosened(asked, pipe.read_tokens(picture), body.denoising_strength)
        else:
            mask = from_base64(body.mask, "the mask").convert("L")
            grid = pipe.without(picture, ImageOps.invert(mask) if body.inpainting_mask_invert else mask)
    return carried_out(studio, owner, body, replace(asked, tokens=rows_of(grid)))


def wish(studio: Studio, model: str, body: Text) -> Asked:
    """What is asked for, less what nobody chose; of `model`, if the body names no other."""
    model = str(body.override_settings.get("sd_model_checkpoint") or model)
    check_model(model)
    with studio.model(model) as pipe:
        flows, samplers = pipe.defaults.steps is not None, pipe.samplers
    return Asked(
        body.prompt,
        model,
        num_images=body.batch_size * body.n_iter,
        seed=random.randrange(2**32) if body.seed < 0 else body.seed,
        guidance_scale=None if body.cfg_scale == UNCHOSEN_GUIDANCE else body.cfg_scale,
        sampler=body.sampler_name if body.sampler_name in samplers else Asked.sampler,
        steps=body.steps if flows else None,
    )


def carried_out(studio: Studio, owner: str, body: Text, asked: Asked) -> dict:
    size = check_size((body.width, body.height))
    done = finished(studio.result(studio.submit(asked, owner)))
    pictures = [studio.store.opened(saved.id) for saved in done.pictures]
    own = [saved.request for saved in done.pictures]
    info = {
        "prompt": asked.prompt,
        "all_prompts": [one.prompt for one in own],
        "negative_prompt": "",
        "seed": asked.seed,
        "all_seeds": [one.seed for one in own],
        "width": size[0],
        "height": size[1],
        "sampler_name": asked.sampler,
        "cfg_scale": own[0].guidance_scale,
        "steps": own[0].steps,
        "batch_size": body.batch_size,
        "sd_model_name": asked.model,
        "infotexts": [infotext(one, picture.size) for one, picture in zip(own, pictures, strict=True)],
    }
    shown = [to_base64(enlarged(picture, size)) for picture in pictures]
    return {"images": shown, "parameters": body.model_dump(exclude={"init_images", "mask"}), "info": json.dumps(info)}


@router.get("/progress")
def progress(studio: Here, owner: Owner):
    line = studio.line(owner)
    now = next((studio.progress(one.id, preview=True) for one in line if one.state == RUNNING), None)
    return {
        "progress": now.share if now else 0.0,
        "eta_relative": (now.eta or 0.0) if now else 0.0,
        "state": state(now, len(line)),
        "current_image": to_base64(now.preview[0]) if now and now.preview else None,
        "textinfo": now.stage if now else None,
    }


@router.post("/interrupt")
@router.post("/skip")
def interrupt(studio: Here, owner: Owner):
    for one in studio.line(owner):
        if one.state == RUNNING:
            studio.cancel(one.id, owner)
    return {}


@router.get("/options")
def options(owner: Owner, chosen: Chosen):
    return {"sd_model_checkpoint": chosen.get(owner, Asked.model), "samples_format": "png"}


@router.post("/options")
def choose(owner: Owner, chosen: Chosen, given: Annotated[dict[str, Any], Body()]):
    if "sd_model_checkpoint" in given:
        check_model(str(given["sd_model_checkpoint"]))
        chosen[owner] = str(given["sd_model_checkpoint"])
    return {}


@router.get("/sd-models")
def models():
    own = {"hash": None, "sha256": None, "filename": "", "config": None}
    return [{"title": name, "model_name": name, **own} for name in ids("generator")]


@router.get("/samplers")
def samplers():
    return [{"name": name, "aliases": [], "options": {}} for name in (*SAMPLERS, *SOLVERS)]


@router.get("/scripts")
def scripts():
    return {"txt2img": [], "img2img": []}


@router.get("/cmd-flags")
def flags():
    return {}


@router.post("/png-info")
def png_info(image: Annotated[str, Body(embed=True)]):
    items = {name: value for name, value in from_base64(image).info.items() if isinstance(value, str)}
    return {"info": items.get("parameters", ""), "items": items, "parameters": {}}


for name in NONE_OF_THOSE:
    router.add_api_route(f"/{name}", list, methods=["GET"], name=name, response_model=None)


def state(now: Progress | None, jobs: int) -> dict:
    """What a client of A1111 shows of a job."""
    return {
        "skipped": False,
        "interrupted": False,
        "job": now.id if now else "",
        "job_count": jobs,
        "job_no": 0,
        "sampling_step": now.decided if now else 0,
        "sampling_steps": now.cells if now else 0,
    }
