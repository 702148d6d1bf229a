"""A1111's routes that scale images (``/sdapi/v1/extra-*``)."""

import math
from typing import Literal

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import Field

from argen.bounds import MAX_SIDE, check_pixels, check_size
from argen.images import from_base64
from argen.jobs.job_progress import ClientDisconnected
from argen.metadata import encoded
from argen.server.openai import Body
from argen.server.submission import prepare

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
UPSCALER = "Lanczos"


class Scaling(Body):
    """How images are scaled: by a factor (resize_mode 0), or to cover a size (1), to which they are cropped."""

    resize_mode: Literal[0, 1] = 0
    upscaling_resize: float = Field(2, gt=0, le=32)
    upscaling_resize_w: int = Field(512, ge=1, le=MAX_SIDE)
    upscaling_resize_h: int = Field(512, ge=1, le=MAX_SIDE)
    upscaling_crop: bool = True


class Upscaled(Scaling):
    """The body of ``extra-single-image``."""

    image: str


class File(Body):
    """An image of a batch."""

    data: str
    name: str = ""


class Batch(Scaling):
    """The body of ``extra-batch-images``."""

    imageList: list[File] = Field(max_length=64)  # noqa: N815, their name


@router.post("/extra-single-image")
async def extra_single_image(request: Request, body: Upscaled):
    (image,) = await scale_images(request, [body.image], body)
    return {"html_info": f"scaled with {UPSCALER}", "image": image}


@router.post("/extra-batch-images")
async def extra_batch_images(request: Request, body: Batch):
    images = await scale_images(request, [file.data for file in body.imageList], body)
    return {"html_info": f"scaled with {UPSCALER}", "images": images}


async def scale_images(request: Request, texts: list[str], body: Scaling) -> list[str]:
    """Scale images in base64 one by one, until the client disconnects.

    Raises:
        ValueError: all of them together are too large.
        ClientDisconnected: the client went away.
    """
    pixels, images = 0, []
    for text in texts:
        if await request.is_disconnected():
            raise ClientDisconnected("the client went away")
        image, size = await prepare(request, decode_image_and_size, text, body)
        pixels += max(math.prod(image.size), math.prod(size))
        check_pixels(pixels)
        images.append(await prepare(request, resize_image, image, size, body))
    return images


def decode_image_and_size(text: str, body: Scaling) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image in base64 -> the image, and the size to scale it to before cropping; with resize_mode 1 it covers both
    requested sides, in the aspect ratio of the image."""
    image = from_base64(text)
    factor = body.upscaling_resize
    if body.resize_mode == 1:
        factor = max(body.upscaling_resize_w / image.width, body.upscaling_resize_h / image.height)
    return image, check_size(tuple(max(1, round(side * factor)) for side in image.size))


def resize_image(image: Image.Image, size: tuple[int, int], body: Scaling) -> str:
    """Scale an image to a size, crop it if requested, and encode it as base64."""
    image = image.resize(size, Image.Resampling.LANCZOS)
    if body.resize_mode == 1 and body.upscaling_crop:
        width, height = body.upscaling_resize_w, body.upscaling_resize_h
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return encoded(image)
