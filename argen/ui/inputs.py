"""Components that take an image; its file is read by `argen.images`, as everywhere, and not by Gradio.

They are Gradio's own with one method of the instance replaced: Gradio writes a .pyi file beside the source of every subclass.
"""

from pathlib import Path

import gradio as gr
from PIL import Image

from argen.images import read_image
from tokenizers_img.pixels import on_white, upright


def image_input(**settings) -> gr.Image:
    """Create an image input (dropped, pasted or sent); an event gets an RGB or RGBA image of 8 bits, or None.

    Args:
        settings: of `gr.Image`.
    """

    def preprocess(payload) -> Image.Image | None:
        return None if payload is None else read_image(Path(payload.path).read_bytes(), "the image")

    component = gr.Image(type="pil", image_mode=None, **settings)
    component.preprocess = preprocess
    return component


def canvas_input(image_mode: str, **settings) -> gr.ImageEditor:
    """Create an image editor to paint on; an event gets background, layers and composite, each RGBA or None.

    Args:
        image_mode: "RGBA", or "RGB" to have background and composite laid on white.
        settings: of `gr.ImageEditor`.
    """

    def convert(file, flatten_on_white: bool = False) -> Image.Image | None:
        if file is None:
            return None
        data = file if isinstance(file, bytes | bytearray | memoryview) else Path(file.path).read_bytes()
        image = upright(read_image(bytes(data), "the image"))
        return on_white(image) if flatten_on_white and image_mode == "RGB" else image

    component = gr.ImageEditor(type="pil", image_mode=image_mode, **settings)
    component.convert_and_format_image = convert
    return component
