"""What the tabs share that ask the queue: pictures as they are written, what can be done with a job, and the line."""

import math
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import gradio as gr
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from argen.hub.loading import load_diffusion
from argen.hub.model_cache import ModelCache
from argen.jobs.messages import said
from argen.jobs.queue import LOCAL, Forbidden, Progress, Studio
from argen.jobs.store import CANCELLED, DONE, FAILED, RUNNING, WAITING
from argen.request import Grid, Request
from samplers.steps import Origin
from tokenizers_img.pixels import opaque, upright

TINTS = {Origin.ACCEPTED: (0, 160, 60, 110), Origin.RELAXED: (240, 130, 0, 130)}  # RGBA
PREVIEW_SIDE = 256  # of the shown pictures, in pixels; the files keep the model's size
TICK, LINE_TICK = 0.4, 1.0  # seconds between looks at a job, and at the line


@dataclass(frozen=True)
class AppContext:
    """Where the tabs hand in what is asked.

    Attributes:
        studio: the queue.
        admin: owner who may do what concerns all; None where nobody logs in, so that everybody may.
        device: of the pipelines of the diffusion tools.
        memory: bytes that those may take, see `argen.hub.model_cache.ModelCache`.
    """

    studio: Studio
    admin: str | None = None
    device: torch.device = torch.device("cpu")
    memory: int | None = None

    def owner(self, request: gr.Request) -> str:
        """Who asks: a session is kept under its owner's name, see `argen.server.app.Sessions`."""
        return request.username or LOCAL

    @cached_property
    def diffusion(self) -> ModelCache:
        """The diffusers pipelines of the tools, each loaded when it is first needed."""
        return ModelCache(self.device, load_silent, self.memory)

    def check_admin(self, request: gr.Request) -> None:
        """Raises:
        Forbidden: what concerns all is asked for by somebody else than the administrator.
        """
        if self.admin is not None and self.owner(request) != self.admin:
            raise Forbidden("this concerns everybody here: only the holder of the server's first key may do it")


def load_silent(name: str) -> DiffusionPipeline:
    """A diffusers pipeline without progress bars."""
    pipe = load_diffusion(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class user_errors:
    """Bad input becomes a message on the page."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, ValueError | TypeError | OSError | ModuleNotFoundError | KeyError | sqlite3.Error):
            raise gr.Error(said(error), title="Invalid request", print_exception=False) from error


class View:
    """The column in which a tab's job is seen; lay it out inside the current `gr.Blocks`.

    Attributes:
        watched: outputs of an event that begins a job, for what `begin` gives.
    """

    def __init__(self, context: AppContext, suffix: str = ""):
        self.context, self.studio = context, context.studio
        self.job, self.seen = gr.State(None), gr.State(-1)
        with gr.Column(scale=3):
            self.gallery = gr.Gallery(
                label="Images", columns=2, object_fit="contain", format="png", elem_id=f"pictures{suffix}"
            )
            self.state = gr.Markdown(elem_id=f"state{suffix}")
            with gr.Row():
                stop = gr.Button("Stop", elem_id=f"stop{suffix}")
                resume = gr.Button("Resume", elem_id=f"resume{suffix}")
                again = gr.Button("Generate with next seeds", elem_id=f"again{suffix}")
            with gr.Accordion("Settings of each image, also inside its file", open=False):
                self.settings = gr.JSON(show_label=False, elem_id=f"settings{suffix}")
            with gr.Accordion("How the cells were written", open=False):
                self.cells = gr.Gallery(
                    label="green: guessed and accepted; orange: accepted with its neighbours' probability; plain: drawn",
                    columns=4,
                    object_fit="contain",
                    elem_id=f"cells{suffix}",
                )
        self.timer = gr.Timer(TICK, active=False)
        self.watched = [self.job, self.seen, self.timer]
        shown = [self.gallery, self.state, self.settings, self.cells, self.seen, self.timer]
        self.timer.tick(self.look, [self.job, self.seen], shown, show_progress="hidden", concurrency_limit=None)
        stop.click(self.stop, self.job, None)
        resume.click(self.resume, self.job, self.watched)
        again.click(self.again, self.job, self.watched)

    def begin(self, id: str | None) -> tuple:
        """Values of `watched` that show a job from now on."""
        return id, -1, gr.Timer(active=id is not None)

    def ask(self, asked: Request, request: gr.Request) -> tuple:
        """Put a request into the queue and show it."""
        return self.begin(self.studio.submit(asked, self.context.owner(request)))

    def restore(self, request: gr.Request) -> tuple:
        """Show the job that was asked for last, if it is not over: the page was loaded anew."""
        last = self.studio.store.latest(self.context.owner(request))
        return self.begin(None if last is None or self.studio.progress(last).over else last)

    def stop(self, id: str | None, request: gr.Request) -> None:
        with user_errors():
            if id is not None:
                self.studio.cancel(id, self.context.owner(request))

    def resume(self, id: str | None, request: gr.Request) -> tuple:
        with user_errors():
            if id is None:
                raise ValueError("there is no job here: draw something first")
            self.studio.resume(id, self.context.owner(request))
            return self.begin(id)

    def again(self, id: str | None, request: gr.Request) -> tuple:
        with user_errors():
            if id is None:
                raise ValueError("there is no job here: draw something first")
            return self.begin(self.studio.again(id, self.context.owner(request)))

    def look(self, id: str | None, seen: int) -> tuple:
        """What there is to see of a job now; nothing where nothing is new."""
        still = (gr.skip(),) * 4
        if id is None:
            return *still, seen, gr.Timer(active=False)
        now = self.studio.progress(id, preview=True)
        if not now.over:
            if now.state == RUNNING and now.version == seen:
                return *still, seen, gr.skip()
            images = [enlarge(image) for image in now.preview] if now.preview else gr.skip()
            return images, told(now), gr.skip(), gr.skip(), now.version, gr.skip()
        store, images = self.studio.store, now.images
        if now.state != DONE:
            return gr.skip(), told(now), None, None, seen, gr.Timer(active=False)
        settings = [{"file": f"{saved.id}.png", **readable(saved.request)} for saved in images]
        here = [saved for saved in images if store.file(saved.id).is_file()]
        files = [(str(store.shown(saved.id)), saved.request.prompt) for saved in here]
        cells = [written(store.opened(saved.id), saved.origins) for saved in here if saved.origins]
        where = f" in {store.folder}" if self.context.admin is None else ""  # where all are at this machine
        text = f"{len(images)} image{'s' if len(images) > 1 else ''}{where} ({how(now)})"
        return files, text, settings, cells or None, seen, gr.Timer(active=False)


def line(context: AppContext) -> None:
    """The line, and what can be done with it; inside the current `gr.Blocks`."""
    studio, head = context.studio, ["job", "state", "prompt", "model", "done", "seconds left"]
    chosen, before = gr.State(None), gr.State(None)

    def rows(request: gr.Request, seen: list | None) -> tuple:
        found = [row(one) for one in studio.line(context.owner(request))]
        note = "Queue paused." if studio.paused else f"{len(found)} in the queue."
        note = note if studio.alive else "**Nothing is drawn any more: start argen again.** What waits is kept."
        state = [note, *found]
        return (gr.skip(), gr.skip(), seen) if state == seen else (found, note, state)

    def choose(found, event: gr.SelectData) -> tuple:
        id = found[event.index[0]][0] if found else None
        return id, f"Chosen: {id}"

    def act(do: Callable[[str, str], object]) -> Callable:
        def acted(id: str | None, request: gr.Request) -> None:
            with user_errors():
                if id is None:
                    raise ValueError("no job is chosen: click on one in the table")
                do(id, context.owner(request))

        return acted

    table = gr.Dataframe(headers=head, type="array", interactive=False, show_label=False, elem_id="line")
    note, which = gr.Markdown(elem_id="line-state"), gr.Markdown("Chosen: none", elem_id="line-chosen")
    with gr.Row():
        actions = {
            "Cancel": studio.cancel,
            "Move to top": lambda id, owner: studio.move(id, -(10**9), owner),
            "Move up": lambda id, owner: studio.move(id, -1, owner),
            "Move down": lambda id, owner: studio.move(id, 1, owner),
        }
        for name, do in actions.items():
            gr.Button(name, elem_id=f"line-{name.replace(' ', '-').lower()}").click(act(do), chosen)
        rest = gr.Button("Pause / Resume", elem_id="line-pause")

    def pause(request: gr.Request) -> None:
        with user_errors():
            context.check_admin(request)
            studio.pause(not studio.paused)

    rest.click(pause, None, None)
    table.select(choose, table, [chosen, which])
    gr.Timer(LINE_TICK).tick(rows, before, [table, note, before], show_progress="hidden", concurrency_limit=None)


def row(now: Progress) -> list:
    left = "" if now.eta is None or math.isnan(now.eta) else round(now.eta, 1)
    return [now.id, now.stage or now.state, now.request.prompt, now.request.model, f"{now.share:.0%}", left]


def told(now: Progress) -> str:
    """A job that makes no pictures (yet), in words."""
    if now.state == WAITING:
        return f"waiting, number {now.place} in the queue"
    if now.state == FAILED:
        return f"**Failed:** {now.error}"
    if now.state == CANCELLED:
        return f"stopped at {now.share:.0%}: finished tokens are kept, Resume continues"
    left = f" · {now.eta:.0f} s left" if now.eta is not None else ""
    return f"{now.share:.0%} · {now.stage} · {how(now)}{left}"


def how(now: Progress) -> str:
    a_pass = now.decided / max(1, now.forward_passes)
    return f"{now.request.sampler}: {now.speed:.0f} tokens/s, {a_pass:.1f} tokens per step"


def readable(request: Request) -> dict:
    """The settings of a request without its pictures."""
    control = request.control
    shown = {"kind": control.kind, "strength": control.strength, "size": control.size} if control else None
    return {name: shown if name == "control" else value for name, value in request.given().items()}


def written(image: Image.Image, origins: Grid) -> Image.Image:
    """A picture with each cell in the colour of how it came by its token, rows of `samplers.steps.Origin`."""
    rows = np.array(origins)
    tint = np.zeros((*rows.shape, 4), np.uint8)
    for origin, colour in TINTS.items():
        tint[rows == origin] = colour
    return tinted(image, tint)


def tinted(image: Image.Image, tint: np.ndarray) -> Image.Image:
    """A picture under the colours of its cells, [h, w, 4] RGBA uint8."""
    large = upright(enlarge(image))
    over = Image.fromarray(tint, "RGBA").resize(large.size, Image.Resampling.NEAREST)
    return opaque(Image.alpha_composite(large, over))


def enlarge(image: Image.Image) -> Image.Image:
    """A picture that is large enough to look at."""
    factor = max(1, PREVIEW_SIDE // image.width)
    return image.resize((image.width * factor, image.height * factor))
