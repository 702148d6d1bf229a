"""The tab that writes a part of a picture anew: cells of its token grid, painted or chosen."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from argen.pipelines.base import TokenPipeline, masked_cells
from argen.request import Request, rows_of
from argen.ui.generate import Models
from argen.ui.jobs import Desk, View, refusals

CANVAS = 512  # pixels
SIDES = {"right": (0, 1), "left": (0, -1), "bottom": (1, 0), "top": (-1, 0)}  # where new cells come: rows, columns


class Edit:
    """The tab; lay it out inside the current `gr.Blocks`.

    Args:
        models: gives a generator by its id.
        ids: of generators whose tokens have a place in the picture.
        desk: where requests are handed in.
    """

    def __init__(self, models: Models, ids: Sequence[str], desk: Desk):
        self.desk = desk
        with gr.Row():
            with gr.Column(scale=2):
                model = gr.Dropdown(list(ids), value=ids[0], label="Model")
                prompt = gr.Textbox(label="Prompt", placeholder="a red apple", elem_id="edit-prompt")
                last = gr.Button("Take the latest picture", elem_id="edit-latest")
                picture = gr.ImageEditor(
                    type="pil",
                    image_mode="RGBA",
                    canvas_size=(CANVAS, CANVAS),
                    label="A picture, and paint on it",
                    elem_id="edit-canvas",
                )
                with gr.Row():
                    num = gr.Slider(1, 9, value=4, step=1, label="Pictures")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                locked = gr.Checkbox(False, label="These cells stay, the rest is written anew", elem_id="edit-locked")
                numbers = gr.Textbox(
                    label="Cells by number, beside those that are painted on",
                    info="rows x columns from the top left, as 3-5 x 2-7; several between commas",
                    elem_id="edit-cells",
                )
                paint = gr.Button("Write these cells anew", variant="primary", elem_id="edit-paint")
                share = gr.Slider(0.05, 1, value=0.25, step=0.05, label="Share of the cells")
                vary = gr.Button("Vary the least certain cells", elem_id="edit-vary")
                first = gr.Slider(0.05, 0.95, value=0.5, step=0.05, label="Share of the tokens, from the first")
                fork = gr.Button("Keep the first tokens, and write on", elem_id="edit-fork")
                with gr.Row():
                    side = gr.Radio(list(SIDES), value="right", label="Side")
                    cells = gr.Slider(1, 7, value=2, step=1, label="Cells")
                extend = gr.Button("Move it, and draw more on that side", elem_id="edit-extend")
            self.view = View(desk, "-edit")
        how = [model, prompt, picture, num, seed]
        last.click(self.latest, None, [picture, prompt])
        paint.click(self.asking(anew), [*how, locked, numbers], self.view.watched)
        vary.click(self.asking(varied), [*how, share], self.view.watched)
        fork.click(self.asking(forked), [*how, first], self.view.watched)
        extend.click(self.asking(extended), [*how, side, cells], self.view.watched)

    def latest(self, request: gr.Request) -> tuple:
        """(the picture that was finished last, its prompt)."""
        with refusals():
            found = self.desk.studio.store.pictures(owner=self.desk.owner(request), limit=1)
            if not found:
                raise ValueError("there is no picture yet: draw one, or drop a file on the canvas")
            side = self.desk.studio.store.opened(found[0].id).convert("RGBA")
        factor = max(1, CANVAS // max(side.size))
        return side.resize((side.width * factor, side.height * factor)), found[0].request.prompt

    def asking(self, change: Callable[..., Tensor]) -> Callable:
        """The handler of a button.

        Args:
            change: the pipeline, the request so far, the canvas and what else the button reads -> a grid [1, h, w], of which a part
                is undecided.
        """

        def handler(request: gr.Request, model, prompt, canvas, num, seed, *how) -> tuple:
            with refusals():
                wish = Request(prompt.strip(), model, int(num), int(seed))
                with self.desk.studio.model(model) as pipe:
                    grid = change(pipe, wish, canvas, *how)
                return self.view.ask(replace(wish, tokens=rows_of(grid)), request)

        return handler


def anew(pipe: TokenPipeline, wish: Request, canvas: dict | None, locked: bool, numbers: str) -> Tensor:
    """Without the cells that are painted on or named or, locked, without the others."""
    picture, strokes, cells = shown(canvas), painted(canvas), named(numbers, pipe.shape_of())
    if strokes.getbbox() or not cells.any():
        cells |= masked_cells(picture, strokes, pipe.shape_of())  # says so if there is nothing
    return pipe.emptied(pipe.read_tokens(picture), ~cells if locked else cells)


def varied(pipe: TokenPipeline, wish: Request, canvas: dict | None, share: float) -> Tensor:
    """Without a share of the cells, the least certain ones."""
    return pipe.loosened(wish, pipe.read_tokens(shown(canvas)), share)


def forked(pipe: TokenPipeline, wish: Request, canvas: dict | None, share: float) -> Tensor:
    """A share of the tokens, from the first."""
    grid = pipe.read_tokens(shown(canvas))
    cells = torch.arange(grid[0].numel(), device=grid.device).view_as(grid)
    return pipe.emptied(grid, cells >= round(share * cells.numel()))


def extended(pipe: TokenPipeline, wish: Request, canvas: dict | None, side: str, cells: float) -> Tensor:
    """Moved, with room at a side."""
    return moved(pipe.read_tokens(shown(canvas)), side, int(cells))


def shown(canvas: dict | None) -> Image.Image:
    """The picture under the strokes.

    Raises:
        ValueError: there is none.
    """
    found = (canvas or {}).get("background")
    if found is None:
        raise ValueError("there is no picture: take the latest, or drop a file on the canvas")
    return found.convert("RGB")


def painted(canvas: dict | None) -> Image.Image:
    """Where there are strokes: white on black."""
    size = shown(canvas).size
    strokes = [np.array(layer.convert("RGBA").resize(size).getchannel("A")) > 0 for layer in canvas.get("layers") or []]
    mask = np.any(strokes, axis=0) if strokes else np.zeros(size[::-1], bool)
    return Image.fromarray((255 * mask).astype(np.uint8))


def named(numbers: str, shape: tuple[int, int]) -> Tensor:
    """Cells by number -> [h, w] bool: "3-5 x 2" are those in rows 3 to 5 of column 2, counted from 1."""
    cells = torch.zeros(shape, dtype=torch.bool)
    for part in filter(None, map(str.strip, numbers.split(","))):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?\s*x\s*(\d+)(?:-(\d+))?", part)
        top, bottom, left, right = (int(found[i] or found[i - 1]) for i in (1, 2, 3, 4)) if found else (0, 0, 0, 0)
        if not (1 <= top <= bottom <= shape[0] and 1 <= left <= right <= shape[1]):
            raise ValueError(
                f"{part!r} names no cells: expected ROWS x COLUMNS of {shape[0]} x {shape[1]}, as 3-5 x 2-7 (both from 1)"
            )
        cells[top - 1 : bottom, left - 1 : right] = True
    return cells


def moved(tokens: Tensor, side: str, cells: int) -> Tensor:
    """A grid [1, h, w] moved so far that so many rows or columns at a side are undecided."""
    rows, columns = (step * cells for step in SIDES[side])
    if max(abs(rows), abs(columns)) >= min(tokens.shape[1:]):
        raise ValueError(f"{cells} cells are all of the picture: expected fewer than {min(tokens.shape[1:])}")
    grid = torch.full_like(tokens, -1)
    kept = tokens[:, max(0, rows) : tokens.shape[1] + min(0, rows), max(0, columns) : tokens.shape[2] + min(0, columns)]
    top, left = max(0, -rows), max(0, -columns)
    grid[:, top : top + kept.shape[1], left : left + kept.shape[2]] = kept
    return grid
