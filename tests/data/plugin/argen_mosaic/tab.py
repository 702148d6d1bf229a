"""The tab *Palette*: the most frequent colours of an image."""

import gradio as gr

from argen.ui.context import AppContext, user_errors
from argen.ui.inputs import image_input
from argen_mosaic.palette import colours

TITLE = "Palette"


def layout(context: AppContext, tab: gr.Tab) -> None:
    def name(image) -> str:
        with user_errors():
            return ", ".join(colours(image, 4))

    image, text = image_input(label="Image", elem_id="palette-image"), gr.Textbox(label="Colours")
    image.change(name, image, text)
