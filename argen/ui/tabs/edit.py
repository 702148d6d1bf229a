"""The tab *Edit*: inpainting, outpainting and variations on the token grid of an image."""

import re
from collections.abc import Callable
from dataclasses import replace

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from argen.pipelines.base import TokenPipeline
from argen.pipelines.editing import masked_cells
from argen.registry import samplers_of
from argen.request import Grid, Request, rows_of
from argen.ui.context import AppContext, View, user_errors
from argen.ui.inputs import canvas_input
from argen.ui.widgets import SamplerSettings, update_choices
from argen.words import check_length
from tokenizers_img.pixels import on_white, upright

CANVAS = 512  # pixels
SIDES = {"right": (0, 1), "left": (0, -1), "bottom": (1, 0), "top": (-1, 0)}  # rows, columns by which the image moves


TITLE = "Edit"


def layout(context: AppContext, tab: gr.Tab) -> None:
    edit = Edit(context)
    update_choices(tab, edit.model, edit.names)


class Edit:
    """The tab, laid out inside the current `gr.Blocks`, for generators whose tokens form a grid.

    Attributes:
        model: dropdown of them.
    """

    def __init__(self, context: AppContext):
        self.context, models = context, context.studio.models
        ids = self.names()
        with gr.Row():
            with gr.Column(scale=2):
                self.model = model = gr.Dropdown(ids, value=ids[0], label="Model", elem_id="edit-model")
                prompt = gr.Textbox(label="Prompt", placeholder="a red apple", elem_id="edit-prompt")
                latest, source = gr.Button("Use latest image", elem_id="edit-latest"), gr.State(None)
                image = canvas_input(
                    image_mode="RGBA",
                    canvas_size=(CANVAS, CANVAS),
                    label="Image (paint the selection)",
                    elem_id="edit-canvas",
                )
                with gr.Row():
                    num = gr.Slider(1, 9, value=4, step=1, label="Images")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                with gr.Accordion("More", open=False):
                    defaults = models(ids[0]).defaults
                    guidance = gr.Slider(
                        0, 10, value=defaults.guidance_scale, step=0.5, label="Guidance", info="1: none"
                    )
                    temperature = gr.Slider(0, 2, value=defaults.temperature, step=0.05, label="Temperature")
                    sampler = gr.Dropdown(samplers_of("tokens"), value=Request.sampler, label="Sampler")
                    sampling = SamplerSettings(samplers_of("tokens"), "edit-")
                locked = gr.Checkbox(
                    False, label="Invert selection", info="keep these cells, redraw the rest", elem_id="edit-locked"
                )
                cell_numbers = gr.Textbox(
                    label="Cells by number, in addition to the painted ones",
                    info="rows x columns from the top left, e.g. 3-5 x 2-7; several between commas",
                    elem_id="edit-cells",
                )
                inpaint_button = gr.Button("Inpaint selection", variant="primary", elem_id="edit-paint")
                share = gr.Slider(0.05, 1, value=0.25, step=0.05, label="Share of the cells")
                variation_button = gr.Button("Variation (resample low-confidence tokens)", elem_id="edit-vary")
                prefix_share = gr.Slider(0.05, 0.95, value=0.5, step=0.05, label="Share of the tokens, from the first")
                continue_button = gr.Button("Keep prefix and continue", elem_id="edit-fork")
                with gr.Row():
                    side = gr.Radio(list(SIDES), value="right", label="Side")
                    num_cells = gr.Slider(1, 7, value=2, step=1, label="Cells")
                outpaint_button = gr.Button("Outpaint", elem_id="edit-extend")
            self.view = View(context, "-edit")
        inputs = [model, prompt, image, num, seed, source, guidance, temperature, sampler, *sampling.widgets]
        self.sampling = sampling
        sampler.input(sampling.updates, sampler, sampling.widgets, show_progress="hidden")
        model.input(
            lambda name: [models(name).defaults.guidance_scale, models(name).defaults.temperature],
            model,
            [guidance, temperature],
        )
        latest.click(self.use_latest, None, [image, prompt, source])
        inpaint_button.click(self.handler_for(inpaint), [*inputs, locked, cell_numbers], self.view.job_outputs)
        variation_button.click(self.handler_for(variation), [*inputs, share], self.view.job_outputs)
        continue_button.click(self.handler_for(keep_prefix), [*inputs, prefix_share], self.view.job_outputs)
        outpaint_button.click(self.handler_for(outpaint), [*inputs, side, num_cells], self.view.job_outputs)

    def names(self) -> list[str]:
        return self.context.studio.models.generators(control=False, grid=True)

    def use_latest(self, request: gr.Request) -> tuple:
        """Return (the latest image, its prompt, its id)."""
        with user_errors():
            matches = self.context.studio.store.images(owner=self.context.owner(request), limit=1)
            if not matches:
                raise ValueError("there is no image yet: draw one, or drop a file on the canvas")
            side = upright(self.context.studio.store.read_image(matches[0].id))
        factor = max(1, CANVAS // max(side.size))
        return side.resize((side.width * factor, side.height * factor)), matches[0].request.prompt, matches[0].id

    def stored_tokens(self, source: str | None, request: gr.Request) -> Grid | None:
        """Return the stored tokens of an image of this owner; None where there is none (any more)."""
        if source is None:
            return None
        try:
            saved = self.context.studio.store.image(source)
        except KeyError:
            return None
        return saved.tokens if saved.owner == self.context.owner(request) else None

    def handler_for(self, change: Callable[..., Tensor]) -> Callable:
        """Create the handler of a button.

        Args:
            change: pipeline, request, tokens of the image, canvas and the button's own options -> a grid [1, h, w] with -1 in the
                cells to generate.
        """

        def handler(
            request: gr.Request, model, prompt, canvas, num, seed, source, guidance, temperature, sampler, *values
        ) -> tuple:
            count = len(self.sampling.widgets)
            sampler_values, options = values[:count], values[count:]
            with user_errors():
                sampling = {"guidance_scale": guidance, "temperature": temperature, "sampler": sampler}
                sampling["sampler_args"] = self.sampling.arguments(sampler, sampler_values)
                generation_request = Request(prompt.strip(), model, int(num), int(seed), **sampling)
                with self.context.studio.model(model) as pipe:
                    tokens = pipe.read_tokens(background_image(canvas), self.stored_tokens(source, request))
                    grid = change(pipe, generation_request, tokens, canvas, *options)
                return self.view.submit(replace(generation_request, tokens=rows_of(grid)), request)

        return handler


def inpaint(
    pipe: TokenPipeline, generation_request: Request, tokens: Tensor, canvas: dict | None, locked: bool, numbers: str
) -> Tensor:
    """Mask the selected cells (painted or numbered) or, with `locked`, all others."""
    image, strokes, cells = background_image(canvas), stroke_mask(canvas), cells_by_number(numbers, pipe.shape_of())
    if strokes.getbbox() or not cells.any():
        cells |= masked_cells(image, strokes, pipe.shape_of())  # says so if there is nothing
    return pipe.canvas.mask(tokens, ~cells if locked else cells)


def variation(
    pipe: TokenPipeline, generation_request: Request, tokens: Tensor, canvas: dict | None, share: float
) -> Tensor:
    """Mask a share of the cells, those with the lowest confidence."""
    return pipe.mask_low_confidence(generation_request, tokens, share)


def keep_prefix(
    pipe: TokenPipeline, generation_request: Request, tokens: Tensor, canvas: dict | None, share: float
) -> Tensor:
    """Mask all but a share of the tokens, counted from the first."""
    cells = torch.arange(tokens[0].numel(), device=tokens.device).view_as(tokens)
    return pipe.canvas.mask(tokens, cells >= round(share * cells.numel()))


def outpaint(
    pipe: TokenPipeline, generation_request: Request, tokens: Tensor, canvas: dict | None, side: str, cells: float
) -> Tensor:
    """Shift the grid, and mask the cells that come in at a side."""
    return shift_tokens(tokens, side, int(cells))


def background_image(canvas: dict | None) -> Image.Image:
    """Return the image under the strokes.

    Raises:
        ValueError: there is none.
    """
    background = (canvas or {}).get("background")
    if background is None:
        raise ValueError("there is no image: take the latest, or drop a file on the canvas")
    return on_white(upright(background))


def stroke_mask(canvas: dict | None) -> Image.Image:
    """Return the mask of the strokes: white on black."""
    size = background_image(canvas).size
    strokes = [np.array(upright(layer).resize(size).getchannel("A")) > 0 for layer in canvas.get("layers") or []]
    mask = np.any(strokes, axis=0) if strokes else np.zeros(size[::-1], bool)
    return Image.fromarray((255 * mask).astype(np.uint8))


def cells_by_number(numbers: str, shape: tuple[int, int]) -> Tensor:
    """Parse cells by number -> [h, w] bool: "3-5 x 2" are those in rows 3 to 5 of column 2, counted from 1."""
    cells = torch.zeros(shape, dtype=torch.bool)
    for part in filter(None, map(str.strip, check_length(numbers, "the list of cells").split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?\s*x\s*(\d+)(?:-(\d+))?", part)
        top, bottom, left, right = (int(match[i] or match[i - 1]) for i in (1, 2, 3, 4)) if match else (0, 0, 0, 0)
        if not (1 <= top <= bottom <= shape[0] and 1 <= left <= right <= shape[1]):
            raise ValueError(
                f"{part!r} names no cells: expected ROWS x COLUMNS of {shape[0]} x {shape[1]}, e.g. 3-5 x 2-7 (both from 1)"
            )
        cells[top - 1 : bottom, left - 1 : right] = True
    return cells


def shift_tokens(tokens: Tensor, side: str, cells: int) -> Tensor:
    """Shift a grid [1, h, w] so that `cells` rows or columns at a side are undecided (-1)."""
    rows, columns = (step * cells for step in SIDES[side])
    if max(abs(rows), abs(columns)) >= min(tokens.shape[1:]):
        raise ValueError(f"{cells} cells are all of the image: expected fewer than {min(tokens.shape[1:])}")
    grid = torch.full_like(tokens, -1)
    overlap = tokens[
        :, max(0, rows) : tokens.shape[1] + min(0, rows), max(0, columns) : tokens.shape[2] + min(0, columns)
    ]
    top, left = max(0, -rows), max(0, -columns)
    grid[:, top : top + overlap.shape[1], left : left + overlap.shape[2]] = overlap
    return grid
