"""The tab *X/Y/Z plot and Batch*: one prompt under several settings, and tables of requests."""

from pathlib import Path

import gradio as gr

from argen.jobs.store import DONE, OVER
from argen.jobs.tables import Axis, axis_names, expand_axes, grid_image, read_table, settings_csv
from argen.request import Request
from argen.ui.context import TICK, AppContext, user_errors
from argen.ui.widgets import update_choices
from argen.words import number_of

NONE = "none"


TITLE = "X/Y/Z plot and Batch"


def layout(context: AppContext, tab: gr.Tab) -> None:
    plot = Plot(context)
    tab.select(plot.restore, None, plot.grid_outputs)
    for model in plot.models:
        update_choices(tab, model, plot.names)


class Plot:
    """The tab, laid out inside the current `gr.Blocks`.

    Attributes:
        models: dropdowns of models.
    """

    def __init__(self, context: AppContext):
        self.context, self.studio = context, context.studio
        ids = self.names()
        grid_state = gr.State(None)  # the axes, and the ids of the jobs
        names = axis_names()
        gr.Markdown("### X/Y/Z plot: one prompt under several settings")
        with gr.Row():
            with gr.Column(scale=2):
                model = gr.Dropdown(ids, value=ids[0], label="Model", elem_id="grid-model")
                prompt = gr.Textbox(label="Prompt", placeholder="a pizza", elem_id="grid-prompt")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="grid-seed")
                fields = [model, prompt, seed]
                for letter, what, first in (
                    ("x", "columns", "guidance_scale"),
                    ("y", "rows", "seed"),
                    ("z", "tables", NONE),
                ):
                    with gr.Row():
                        fields.append(
                            gr.Dropdown(
                                [NONE, *names], value=first, label=f"{letter.upper()}, {what}", elem_id=f"axis-{letter}"
                            )
                        )
                        fields.append(
                            gr.Textbox(
                                {"x": "1, 2, 3", "y": "0, 1"}.get(letter, ""),
                                label=f"Values of {letter.upper()}",
                                info="with commas between; prompts and samplers with |",
                                elem_id=f"values-{letter}",
                            )
                        )
                generate = gr.Button("Generate grid", variant="primary", elem_id="draw-grid")
            with gr.Column(scale=3):
                page = gr.Image(label="Grid", format="png", interactive=False, elem_id="grid")
                state = gr.Markdown(elem_id="grid-state")
                table = gr.File(label="CSV with the settings of each image", visible=False, elem_id="grid-table")
        timer = gr.Timer(TICK, active=False)
        self.grid_outputs = [grid_state, timer]
        generate.click(self.start, fields, self.grid_outputs)
        timer.tick(
            self.refresh, grid_state, [page, state, table, timer], show_progress="hidden", concurrency_limit=None
        )

        gr.Markdown("### Batch: a table of requests")
        with gr.Row():
            with gr.Column(scale=2):
                file = gr.File(
                    label="CSV with the settings' names in its first line, or JSON lines",
                    file_types=[".csv", ".jsonl"],
                    elem_id="batch-file",
                )
                default_model = gr.Dropdown(ids, value=ids[0], label="Default model", elem_id="batch-model")
                queue_rows = gr.Button("Queue all rows", variant="primary", elem_id="batch-go")
            with gr.Column(scale=3):
                batch_status = gr.Markdown(
                    "The images will appear in the gallery. Waiting jobs are on disk and resume after a restart.",
                    elem_id="batch-state",
                )
        self.models = [model, default_model]
        queue_rows.click(self.queue_rows, [file, default_model], batch_status)

    def names(self) -> list[str]:
        return self.studio.models.generators(control=False)

    def start(self, request: gr.Request, model: str, prompt: str, seed: float, *fields: str) -> tuple:
        """Queue every combination of the axes."""
        with user_errors():
            axes = [
                Axis.parse(f"{name}={values}")
                for name, values in zip(fields[::2], fields[1::2], strict=True)
                if name != NONE
            ]
            requests = expand_axes(Request(prompt.strip(), model=model, seed=int(seed or 0)), axes)
            ids = self.studio.submit_all(requests, self.context.owner(request))
            self.studio.store.keep_grid(self.context.owner(request), [(axis.name, axis.values) for axis in axes], ids)
            return (axes, ids), gr.Timer(active=True)

    def restore(self, request: gr.Request) -> tuple:
        """Show the latest grid whenever the tab is opened, since the page may have been loaded again."""
        last = self.studio.store.last_grid(self.context.owner(request))
        if last is None:
            return None, gr.Timer(active=False)
        axes, ids = last
        return ([Axis(name, tuple(values)) for name, values in axes], ids), gr.Timer(active=True)

    def refresh(self, grid_state: tuple | None) -> tuple:
        """Return the grid once all of its jobs are over, until then how many are done."""
        if grid_state is None:
            return gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=False)
        axes, ids = grid_state
        states = [self.studio.store.job(id)["state"] for id in ids]  # cheap, since this runs on every tick
        done = states.count(DONE)
        if not OVER.issuperset(states):
            return gr.skip(), f"{done} of {number_of(len(ids), 'image')}", gr.skip(), gr.skip()
        jobs = [self.studio.progress(id) for id in ids]
        if missing := [job for job in jobs if not job.images]:
            reason = missing[0].error or (missing[0].state if missing[0].state != DONE else "deleted")
            message = f"**{len(missing)} of {len(jobs)} images are missing:** {reason}"
            return None, message, gr.update(visible=False), gr.Timer(active=False)
        saved = [job.images[0] for job in jobs]
        csv = self.studio.store.export("grid.csv")
        csv.write_text(
            settings_csv([image.request for image in saved], [f"{image.id}.png" for image in saved]), encoding="utf-8"
        )
        grid = grid_image([self.studio.store.read_image(image.id) for image in saved], axes)
        return (
            grid,
            f"{number_of(done, 'image')}, also in the gallery",
            gr.update(value=str(csv), visible=True),
            gr.Timer(active=False),
        )

    def queue_rows(self, request: gr.Request, path: str | None, model: str) -> str:
        """Queue the rows of a file."""
        with user_errors():
            if path is None:
                raise ValueError("there is no table: drop a CSV or JSON lines file")
            requests = read_table(Path(path), model=model)
            self.studio.submit_all(requests, self.context.owner(request))
        verb = "is" if len(requests) == 1 else "are"
        return f"{number_of(len(requests), 'request')} {verb} in the queue; the images will be in the gallery."
