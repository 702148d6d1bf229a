"""The tab *Train*: a generator learns one's own images beside the page, see `argen.jobs.trainings`."""

import time
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pandas as pd

from argen.images import open_image
from argen.jobs import trainings
from argen.jobs.access import TRAINED
from argen.jobs.messages import error_message
from argen.jobs.trainings import FAILED, FINISHED, MINI, RUNNING, STOPPED, STOPPING, Plan, State, Trainings
from argen.ui.context import AppContext, user_errors

NEW = "a new small network"
TICK = 1.0  # seconds between updates
STEPS = {False: 500, True: 2000}  # whether a network is new -> steps, and images of a step
BATCH = {False: 8, True: 32}
MOST_SHEETS = 10  # sample sheets of a training, about
HINT = "with a `.txt` file beside each image, a folder for each class, or a `metadata.csv`."
LOSSES = {"loss": "training", "held-out loss": "held-out images"}
COLOURS = {"training": "#9ca3af", "held-out images": "#ea580c"}


TITLE = "Train"


def layout(context: AppContext, tab: gr.Tab) -> None:
    train = Train(context)
    gr.on(None, train.restore, train.name, train.shown, show_progress="hidden")
    tab.select(train.restore, train.name, train.shown, show_progress="hidden")
    tab.select(train.start_choices, [train.recipe, train.init], train.init)


class Train:
    """The tab, laid out inside the current `gr.Blocks`.

    Attributes:
        name: dropdown of the trainings.
        recipe, init: what a new one learns with, and starts from.
        shown: outputs of an event that shows a training, for the values of `show`.
    """

    def __init__(self, context: AppContext):
        self.context, self.trainings = context, Trainings(context.studio.models)
        self.seen = gr.State(None)  # what the page shows, so that nothing is drawn twice
        with gr.Row():
            with gr.Column(scale=2):
                fields, start = self.inputs()
            with gr.Column(scale=3):
                stop, resume, use = self.view()
                with gr.Accordion("Delete", open=False):
                    typed = gr.Textbox(label="Its name again", elem_id="train-typed")
                    delete = gr.Button("Delete this training", variant="stop", elem_id="train-delete")
        self.timer = gr.Timer(TICK, active=False)
        self.buttons = [stop, resume, use]
        drawn = [self.state, self.curve, self.caption, self.sample, *self.buttons, self.seen, self.timer]
        self.shown = [self.name, *drawn]
        quiet = {"show_progress": "hidden"}  # or an error covers all that is shown
        start.click(self.start, fields, self.shown, **quiet)
        self.name.input(self.show, self.name, self.shown, **quiet)
        self.timer.tick(self.refresh, [self.name, self.seen], drawn, **quiet, concurrency_limit=None)
        stop.click(self.stop, self.name, self.shown, **quiet)
        resume.click(self.resume, self.name, self.shown, **quiet)
        delete.click(self.delete, [self.name, typed], [*self.shown, typed], **quiet)
        if context.chosen is not None:
            use.click(self.use, self.name, context.chosen)

    def inputs(self) -> tuple[list[gr.components.Component], gr.Button]:
        """Lay out what a new training is asked with -> the inputs of `start`, and its button."""
        local = self.context.admin is None  # all users sit at this machine
        gr.Markdown(f"Learn your own images: a .zip{' or a folder' if local else ''} {HINT}")
        file = gr.File(label="Images: a .zip", file_types=[".zip"], height=140, elem_id="train-file")
        images = [file]
        if local:
            images.append(gr.Textbox(label="Or a folder of this machine", elem_id="train-folder"))
        look = gr.Button("Look at the images", elem_id="train-look")
        report = gr.Textbox(label="What there is", lines=4, visible=False, interactive=False, elem_id="train-report")
        with gr.Row():
            self.recipe = gr.Dropdown(list(trainings.PARTS), label="Recipe", min_width=120, elem_id="train-recipe")
            lora = gr.Number(16, precision=0, minimum=1, maximum=256, label="LoRA rank", min_width=120)
            steps = gr.Number(STEPS[False], precision=0, minimum=1, label="Steps", min_width=120, elem_id="train-steps")
        first = next(iter(trainings.PARTS))
        choices = named(self.trainings.shipped(first), first)
        self.init = gr.Dropdown(
            choices, value=choices[0][1], allow_custom_value=True, label="Start from", elem_id="train-init"
        )
        with gr.Accordion("Advanced", open=False), gr.Row():
            batch = gr.Number(BATCH[False], precision=0, minimum=1, label="Batch size", info="images of a step")
            rate = gr.Number(0, minimum=0, label="Learning rate", info="0: the recipe's", elem_id="train-rate")
        name = gr.Textbox(label="Name", placeholder="icons", max_lines=1, elem_id="train-name")
        start = gr.Button("Start", variant="primary", elem_id="train-start")
        look.click(self.look, images, report)
        self.recipe.input(self.start_choices, [self.recipe, self.init], self.init)
        self.init.input(self.defaults, self.init, [lora, steps, batch], show_progress="hidden")
        return [name, self.recipe, self.init, lora, steps, batch, rate, *images], start

    def view(self) -> tuple[gr.Button, gr.Button, gr.Button]:
        """Lay out what shows a training -> its buttons."""
        self.name = gr.Dropdown([], label="Training", elem_id="train-which")
        self.state = gr.Markdown("No training yet.", elem_id="train-state")
        self.curve = gr.LinePlot(
            x="step",
            y="loss",
            color="of",
            color_map=COLOURS,
            color_title="loss of",
            height=340,
            show_label=False,
            visible=False,
            elem_id="train-curve",
        )
        self.caption = gr.Markdown("Samples, after captions or classes of held-out images", visible=False)
        self.sample = gr.Image(format="png", show_label=False, visible=False, interactive=False, elem_id="train-sample")
        with gr.Row():
            stop = gr.Button("Stop", interactive=False, elem_id="train-stop")
            resume = gr.Button("Resume", interactive=False, elem_id="train-resume")
            use = gr.Button("Use in Generate", interactive=False, elem_id="train-use")
        return stop, resume, use

    def start_choices(self, recipe: str, init: str, request: gr.Request) -> dict:
        """Update what a recipe can start from."""
        if not self.allowed(request):
            return gr.skip()
        choices = named(self.trainings.starts(recipe), recipe)
        known = init in (value for _, value in choices)
        return gr.update(choices=choices, value=init if known else choices[0][1])

    def allowed(self, request: gr.Request) -> bool:
        """Whether who asks may see trainings."""
        return self.context.admin in (None, self.context.owner(request))

    def defaults(self, init: str) -> tuple:
        """Update rank, steps and batch size for a model to start from."""
        new = init == MINI
        return gr.update(visible=not new), STEPS[new], BATCH[new]

    def images(self, file: str | None, folder: str = "") -> tuple[Path, Path | None]:
        """Where the images lie, and the uploaded file if it is one."""
        if file is not None:
            if Path(file).suffix.lower() != ".zip":
                raise ValueError(f"{Path(file).name} is a file of another kind: expected a .zip")
            return Path(file), Path(file)
        if not folder.strip():
            where = ", or type the path of a folder" if self.context.admin is None else ""
            raise ValueError(f"there are no images: drop a .zip{where}")
        return Path(folder.strip()).expanduser(), None

    def look(self, request: gr.Request, *images) -> dict:
        """Report what the images are."""
        with user_errors():
            self.context.check_admin(request)
            path, upload = self.images(*images)
            report = trainings.look(path).report()
        return gr.update(value=str(replace(report, path=Path(path.name) if upload else path)), visible=True)

    def start(self, request: gr.Request, name, recipe, init, lora, steps, batch, rate, *images) -> tuple:
        """Begin a training and show it."""
        with user_errors():
            self.context.check_admin(request)
            path, upload = self.images(*images)
            every = max(trainings.Plan.every, min(500, -(-int(steps or 1) // MOST_SHEETS)))
            rank = None if init == MINI else lora
            rate = float(rate) if rate else None
            gr.Info("The images are looked at.", duration=3)
            plan = Plan(recipe, str(path), init, steps, rank, batch or None, rate, every)
            self.trainings.start((name or "").strip(), plan, upload)
            return self.show(name.strip(), request)

    def stop(self, name: str | None, request: gr.Request) -> tuple:
        with user_errors():
            self.context.check_admin(request)
            self.trainings.stop(selected(name))
            return self.show(name, request)

    def resume(self, name: str | None, request: gr.Request) -> tuple:
        with user_errors():
            self.context.check_admin(request)
            self.trainings.resume(selected(name))
            return self.show(name, request)

    def delete(self, name: str | None, typed: str, request: gr.Request) -> tuple:
        with user_errors():
            self.context.check_admin(request)
            self.trainings.delete(selected(name), typed)
            return (*self.show(None, request), "")

    def use(self, name: str | None, request: gr.Request) -> tuple[str, float]:
        """Choose what was trained in the tab *Generate*."""
        with user_errors():
            self.context.check_admin(request)
            result = f"{TRAINED}{selected(name)}"
            self.context.studio.models.check(result)
        return result, time.time()

    def restore(self, name: str | None, request: gr.Request) -> tuple:
        """Show the chosen training, or the newest one, after the page was loaded or the tab was opened."""
        names = self.trainings.names()
        return self.show(name if name in names else None, request)

    def show(self, name: str | None, request: gr.Request) -> tuple:
        """Return the values of `shown`; of the newest training where none is named."""
        if not self.allowed(request):
            return gr.skip(), "Only the holder of the server's first key trains here.", *[gr.skip()] * 8
        names = self.trainings.names()
        name = name or next(iter(names), None)
        return gr.update(choices=names, value=name), *self.refresh(name, None, request)

    def refresh(self, name: str | None, seen: tuple | None, request: gr.Request) -> tuple:
        """Return state, curve, sample sheet and buttons of a training; `gr.skip()` where nothing has changed."""
        if not self.allowed(request):
            return *[gr.skip()] * 8, gr.Timer(active=False)
        if name is None:
            hidden, idle = gr.update(value=None, visible=False), gr.update(interactive=False)
            return (
                "No training yet.",
                hidden,
                gr.update(visible=False),
                hidden,
                idle,
                idle,
                idle,
                None,
                gr.Timer(active=False),
            )
        with user_errors():
            state = self.trainings.state(name)
        now = name, state.status, len(state.log), state.step, str(state.sample)
        timer = gr.Timer(active=state.status in (RUNNING, STOPPING))
        if seen is not None and tuple(seen) == now:
            return describe(state), *[gr.skip()] * 6, now, timer
        sheet = None if state.sample is None else open_image(state.sample)
        caption, sample = gr.update(visible=sheet is not None), gr.update(value=sheet, visible=sheet is not None)
        return describe(state), curve(state), caption, sample, *buttons(state), now, timer


def named(models: list[str], recipe: str) -> list[tuple[str, str]]:
    """The choices of what a training starts from."""
    new = [] if trainings.PARTS[recipe] is None else [(NEW, MINI)]
    return [*((name, name) for name in models), *new]


def selected(name: str | None) -> str:
    if name is None:
        raise ValueError("there is no training: start one first")
    return name


def buttons(state: State) -> list[dict]:
    """Which of *Stop*, *Resume* and *Use in Generate* can be pressed."""
    on = [state.status in (RUNNING, STOPPING), state.status in (STOPPED, FAILED), state.status == FINISHED]
    return [gr.update(interactive=each) for each in on]


def curve(state: State) -> dict:
    """The losses of a training, of steps and of held-out images."""
    rows = [(entry["step"], entry[key], of) for key, of in LOSSES.items() for entry in state.log if key in entry]
    table = pd.DataFrame(rows, columns=["step", "loss", "of"])
    return gr.update(value=table, visible=len(state.log) > 1, x_lim=[0, state.plan.steps])


def describe(state: State) -> str:
    """The state of a training in a line."""
    steps, last = f"{state.plan.steps:,}", state.log[-1] if state.log else {}
    scores = "".join(f" · {key} {last[key]:.3g}" for key in LOSSES if key in last)
    if state.status == RUNNING and not state.log:
        return f"reading the images and loading {NEW if state.plan.init == MINI else state.plan.init}"
    if state.status == RUNNING:
        left = "" if state.left is None else f" · {duration(state.left)} left"
        return f"step {state.step:,} of {steps}{scores}{left}"
    if state.status == STOPPING:
        return f"stopping, at about step {state.step:,} of {steps}; *Stop* again ends it at once"
    if state.status == FINISHED:
        return f"finished: {steps} steps{scores}. *Generate* has it as `{TRAINED}{state.name}`."
    kept = "nothing is kept yet, and *Resume* begins anew"
    if state.kept is not None:
        kept = f"step {state.kept:,} of {steps} is kept, and *Resume* goes on from there"
    if state.status == FAILED:
        return f"**Failed:** {error_message(ValueError(state.error))}\n\n{kept}"
    return f"stopped: {kept}"


def duration(seconds: float) -> str:
    """ "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
