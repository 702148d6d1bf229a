"""The tab *Control*: paint or upload a control image, preview it, and generate images that follow it."""

import gradio as gr
from PIL import Image

from argen.models.annotators import KINDS, annotate, as_image
from argen.request import Control, Request
from argen.ui.context import AppContext, View, user_errors
from argen.ui.inputs import canvas_input

CANVAS = 512  # pixels


TITLE = "Control"


def layout(context: AppContext, tab: gr.Tab) -> None:
    models = context.studio.models
    ids = models.generators(control=True)

    def control(image, kind, strength=1.0) -> Control:
        composite = (image or {}).get("composite")
        if composite is None:
            raise ValueError("there is no control image: draw one, or drop a file on the canvas")
        return Control(composite, kind, strength)

    def preview(model, image, kind) -> Image.Image:
        with user_errors():
            prepared = models(model).prepare(control(image, kind))
            return as_image(annotate(prepared.image, kind))

    def run(model, prompt, image, kind, strength, num, seed, request: gr.Request) -> tuple:
        with user_errors():
            prepared = models(model).prepare(control(image, kind, strength))
            return view.submit(Request(prompt.strip(), model, int(num), int(seed), control=prepared), request)

    with gr.Row():
        with gr.Column(scale=2):
            model = gr.Dropdown(ids, value=ids[0], label="Model")
            prompt = gr.Textbox(label="Prompt", placeholder="a pizza", elem_id="control-prompt")
            image = canvas_input(
                value=Image.new("RGB", (CANVAS, CANVAS), "white"),
                image_mode="RGB",
                canvas_size=(CANVAS, CANVAS),
                label="Draw, or drop an image",
                elem_id="canvas",
            )
            with gr.Row():
                kind = gr.Dropdown(
                    [(f"{name}: {about}", name) for name, (about, _) in KINDS.items()], value="canny", label="Control"
                )
                strength = gr.Slider(0, 2, value=1, step=0.05, label="Strength", info="0: none")
            with gr.Row():
                num = gr.Slider(1, 9, value=4, step=1, label="Images")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
            with gr.Row():
                show_control = gr.Button("Preview control image", elem_id="look")
                generate = gr.Button("Generate", variant="primary", elem_id="control-draw")
            control_image = gr.Image(label="Preprocessed control image", height=256, elem_id="seen")
        view = View(context, "-control")

    show_control.click(preview, [model, image, kind], control_image)
    inputs = [model, prompt, image, kind, strength, num, seed]
    gr.on([generate.click, prompt.submit], run, inputs, view.job_outputs)
