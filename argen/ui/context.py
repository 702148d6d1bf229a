"""Parts that the tabs share: the context of the app, the view of a job, and the table of the queue."""

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
from argen.hub.memory import out_of_memory
from argen.hub.model_cache import ModelCache
from argen.jobs.messages import error_message
from argen.jobs.queue import LOCAL, Forbidden, Progress, Studio
from argen.jobs.store import CANCELLED, DONE, FAILED, RUNNING, WAITING
from argen.request import Grid, Request
from argen.ui.widgets import image_gallery
from samplers.steps import Origin
from tokenizers_img.pixels import opaque, upright

TINTS = {Origin.ACCEPTED: (0, 160, 60, 110), Origin.RELAXED: (240, 130, 0, 130)}  # RGBA
PREVIEW_SIDE = 256  # pixels, at least, of an image on the page; the files keep the model's size
TICK, QUEUE_TICK = 0.4, 1.0  # seconds between updates of a job, and of the queue


@dataclass(frozen=True)
class AppContext:
    """What the tabs need of the app: the queue, its users and the device.

    Attributes:
        studio: the queue.
        admin: owner who may change what concerns all users; None where nobody logs in, so that everybody may.
        device: of the pipelines of the Diffusion tab.
        memory: bytes that these pipelines may take, see `argen.hub.model_cache.ModelCache`.
        chosen: model that another tab has chosen for *Generate*, and when; `argen.ui.build.build` lays it out.
    """

    studio: Studio
    admin: str | None = None
    device: torch.device = torch.device("cpu")
    memory: int | None = None
    chosen: gr.State | None = None

    def owner(self, request: gr.Request) -> str:
        """The owner who sent an event; the sessions of the page carry their names, see `argen.server.guard.Sessions`."""
        return request.username or LOCAL

    @cached_property
    def diffusion(self) -> ModelCache:
        """The diffusers pipelines of the Diffusion tab, each loaded when it is first needed."""
        return ModelCache(self.device, load_silent, self.memory)

    def check_admin(self, request: gr.Request) -> None:
        """Raises:
        Forbidden: the owner is not the administrator.
        """
        if self.admin is not None and self.owner(request) != self.admin:
            raise Forbidden("this concerns everybody here: only the holder of the server's first key may do it")


def load_silent(name: str) -> DiffusionPipeline:
    """Load a diffusers pipeline that shows no progress bars."""
    pipe = load_diffusion(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class user_errors:
    """Context in which errors of the user become messages on the page."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> None:
        if message := out_of_memory(error):
            raise gr.Error(message, title="Out of memory", print_exception=False) from error
        if isinstance(error, ValueError | TypeError | OSError | ModuleNotFoundError | KeyError | sqlite3.Error):
            raise gr.Error(error_message(error), title="Invalid request", print_exception=False) from error


class View:
    """Column that shows the job of a tab: its images, progress, settings and buttons; laid out inside the current `gr.Blocks`.

    Attributes:
        job_outputs: outputs of an event that starts a job, for the values that `watch` returns.
    """

    def __init__(self, context: AppContext, suffix: str = ""):
        self.context, self.studio = context, context.studio
        self.job, self.seen_version = gr.State(None), gr.State(-1)
        with gr.Column(scale=3):
            self.gallery = image_gallery("Images", columns=2, format="png", elem_id=f"pictures{suffix}")
            self.state = gr.Markdown(elem_id=f"state{suffix}")
            with gr.Row():
                stop_button = gr.Button("Stop", elem_id=f"stop{suffix}")
                resume_button = gr.Button("Resume", elem_id=f"resume{suffix}")
                next_seeds = gr.Button("Generate with next seeds", elem_id=f"again{suffix}")
            with gr.Accordion("Settings of each image, also inside its file", open=False):
                self.settings = gr.JSON(show_label=False, elem_id=f"settings{suffix}")
            with gr.Accordion("Origin of the tokens", open=False):
                self.cells = image_gallery(
                    "green: draft accepted; orange: draft accepted with its neighbours' probability; untinted: sampled",
                    columns=4,
                    elem_id=f"cells{suffix}",
                )
        self.timer = gr.Timer(TICK, active=False)
        self.job_outputs = [self.job, self.seen_version, self.timer]
        outputs = [self.gallery, self.state, self.settings, self.cells, self.seen_version, self.timer]
        self.timer.tick(
            self.refresh, [self.job, self.seen_version], outputs, show_progress="hidden", concurrency_limit=None
        )
        stop_button.click(self.cancel_job, self.job, None)
        resume_button.click(self.resume_job, self.job, self.job_outputs)
        next_seeds.click(self.generate_next_seeds, self.job, self.job_outputs)

    def watch(self, id: str | None) -> tuple:
        """Return the values of `job_outputs` that show a job from now on."""
        return id, -1, gr.Timer(active=id is not None)

    def submit(self, generation_request: Request, request: gr.Request) -> tuple:
        """Put a request into the queue and show it."""
        return self.watch(self.studio.submit(generation_request, self.context.owner(request)))

    def restore(self, request: gr.Request) -> tuple:
        """Show the latest job if it is not over, after the page was loaded again."""
        last = self.studio.store.latest_job(self.context.owner(request))
        return self.watch(None if last is None or self.studio.progress(last).over else last)

    def cancel_job(self, id: str | None, request: gr.Request) -> None:
        with user_errors():
            if id is not None:
                self.studio.cancel(id, self.context.owner(request))

    def resume_job(self, id: str | None, request: gr.Request) -> tuple:
        with user_errors():
            if id is None:
                raise ValueError("there is no job yet: generate an image first")
            self.studio.resume(id, self.context.owner(request))
            return self.watch(id)

    def generate_next_seeds(self, id: str | None, request: gr.Request) -> tuple:
        with user_errors():
            if id is None:
                raise ValueError("there is no job yet: generate an image first")
            return self.watch(self.studio.submit_next_seeds(id, self.context.owner(request)))

    def refresh(self, id: str | None, seen_version: int) -> tuple:
        """Return the current state of a job for the components of the view; `gr.skip()` where nothing has changed."""
        unchanged = (gr.skip(),) * 4
        if id is None:
            return *unchanged, seen_version, gr.Timer(active=False)
        progress = self.studio.progress(id, preview=True)
        if not progress.over:
            if progress.state == RUNNING and progress.version == seen_version:
                return *unchanged, seen_version, gr.skip()
            images = [enlarge(image) for image in progress.preview] if progress.preview else gr.skip()
            return images, status_text(progress), gr.skip(), gr.skip(), progress.version, gr.skip()
        store, images = self.studio.store, progress.images
        if progress.state != DONE:
            return gr.skip(), status_text(progress), None, None, seen_version, gr.Timer(active=False)
        settings = [{"file": f"{saved.id}.png", **display_settings(saved.request)} for saved in images]
        present = [saved for saved in images if store.file(saved.id).is_file()]
        files = [(str(store.link_for_download(saved.id)), saved.request.prompt) for saved in present]
        cells = [origin_overlay(store.read_image(saved.id), saved.origins) for saved in present if saved.origins]
        folder = f" in {store.folder}" if self.context.admin is None else ""  # only where all users sit at this machine
        text = f"{len(images)} image{'s' if len(images) > 1 else ''}{folder} ({speed_text(progress)})"
        return files, text, settings, cells or None, seen_version, gr.Timer(active=False)


def queue_table(context: AppContext) -> None:
    """Lay out the queue and its buttons inside the current `gr.Blocks`."""
    studio, headers = context.studio, ["job", "state", "prompt", "model", "done", "seconds left"]
    selected_id, last_state = gr.State(None), gr.State(None)

    def refresh(request: gr.Request, last_state: list | None) -> tuple:
        jobs = [queue_row(job) for job in studio.queue(context.owner(request))]
        note = "Queue paused." if studio.paused else f"{len(jobs)} in the queue."
        note = note if studio.alive else "**The queue has stopped: restart argen.** Waiting jobs are kept."
        state = [note, *jobs]
        return (gr.skip(), gr.skip(), last_state) if state == last_state else (jobs, note, state)

    def select(rows, event: gr.SelectData) -> tuple:
        id = rows[event.index[0]][0] if rows else None
        return id, f"Chosen: {id}"

    def for_selection(action: Callable[[str, str], object]) -> Callable:
        def handler(id: str | None, request: gr.Request) -> None:
            with user_errors():
                if id is None:
                    raise ValueError("no job is selected: click on one in the table")
                action(id, context.owner(request))

        return handler

    table = gr.Dataframe(headers=headers, type="array", interactive=False, show_label=False, elem_id="line")
    note, selection = gr.Markdown(elem_id="line-state"), gr.Markdown("Chosen: none", elem_id="line-chosen")
    with gr.Row():
        actions = {
            "Cancel": studio.cancel,
            "Move to top": lambda id, owner: studio.move(id, -(10**9), owner),
            "Move up": lambda id, owner: studio.move(id, -1, owner),
            "Move down": lambda id, owner: studio.move(id, 1, owner),
        }
        for name, action in actions.items():
            gr.Button(name, elem_id=f"line-{name.replace(' ', '-').lower()}").click(for_selection(action), selected_id)
        pause_button = gr.Button("Pause / Resume", elem_id="line-pause")

    def toggle_pause(request: gr.Request) -> None:
        with user_errors():
            context.check_admin(request)
            studio.pause(not studio.paused)

    pause_button.click(toggle_pause, None, None)
    table.select(select, table, [selected_id, selection])
    gr.Timer(QUEUE_TICK).tick(
        refresh, last_state, [table, note, last_state], show_progress="hidden", concurrency_limit=None
    )


def queue_row(progress: Progress) -> list:
    seconds_left = "" if progress.eta is None or math.isnan(progress.eta) else round(progress.eta, 1)
    return [
        progress.id,
        progress.stage or progress.state,
        progress.request.prompt,
        progress.request.model,
        f"{progress.share:.0%}",
        seconds_left,
    ]


def status_text(progress: Progress) -> str:
    """Describe the state of a job that has no finished images (yet)."""
    if progress.state == WAITING:
        return f"waiting, number {progress.place} in the queue"
    if progress.state == FAILED:
        return f"**Failed:** {progress.error}"
    if progress.state == CANCELLED:
        return f"stopped at {progress.share:.0%}: finished tokens are kept, Resume continues"
    seconds_left = f" · {progress.eta:.0f} s left" if progress.eta is not None else ""
    return f"{progress.share:.0%} · {progress.stage} · {speed_text(progress)}{seconds_left}"


def speed_text(progress: Progress) -> str:
    tokens_per_step = progress.decided / max(1, progress.forward_passes)
    return f"{progress.request.sampler}: {progress.speed:.0f} tokens/s, {tokens_per_step:.1f} tokens per step"


def display_settings(request: Request) -> dict:
    """Return the settings of a request as JSON, without its images."""
    control = request.control
    control_settings = {"kind": control.kind, "strength": control.strength, "size": control.size} if control else None
    return {
        name: control_settings if name == "control" else value for name, value in request.explicit_settings().items()
    }


def origin_overlay(image: Image.Image, origins: Grid) -> Image.Image:
    """Tint each cell of an image by the origin of its token, rows of `samplers.steps.Origin`."""
    rows = np.array(origins)
    tint = np.zeros((*rows.shape, 4), np.uint8)
    for origin, colour in TINTS.items():
        tint[rows == origin] = colour
    return overlay(image, tint)


def overlay(image: Image.Image, tint: np.ndarray) -> Image.Image:
    """Lay the colours of cells, [h, w, 4] RGBA uint8, over an image."""
    large = upright(enlarge(image))
    over = Image.fromarray(tint, "RGBA").resize(large.size, Image.Resampling.NEAREST)
    return opaque(Image.alpha_composite(large, over))


def enlarge(image: Image.Image) -> Image.Image:
    """Scale a small image up by a whole factor, to about `PREVIEW_SIDE` pixels."""
    factor = max(1, PREVIEW_SIDE // image.width)
    return image.resize((image.width * factor, image.height * factor))
