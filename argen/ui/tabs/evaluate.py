"""The tab *Evaluate*: FID-emoji of a generator, or the judge's scores on fixed prompts."""

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from argen.eval import judge, run
from argen.eval.features import encoder_features
from argen.eval.images import open_images
from argen.hub.loading import load
from argen.jobs.queue import Studio
from argen.metadata import save_images
from argen.ui.context import AppContext, user_errors
from argen.ui.widgets import update_choices
from argen.words import number_of
from tokenizers_img.pixels import opaque

FID, JUDGE = "FID-emoji, against the 12,853 training images", "the judge, on its 500 prompts"
BATCH_SIZE = 4  # images; between batches the queue can use the device
MAX_IMAGES = 2000


TITLE = "Evaluate"


def layout(context: AppContext, tab: gr.Tab) -> None:
    studio = context.studio
    names = partial(studio.models.generators, control=False, text=True)
    ids = names()

    def measure(what: str, model: str, num: float, seed: float) -> Iterator[tuple]:
        with user_errors():
            yield from measure_model(studio, what, model, int(num), int(seed or 0))

    with gr.Row():
        with gr.Column(scale=2):
            what = gr.Radio([FID, JUDGE], value=FID, label="Metric", elem_id="eval-what")
            model = gr.Dropdown(ids, value=ids[0], label="Model", elem_id="eval-model")
            num = gr.Slider(
                2, MAX_IMAGES, value=200, step=1, label="Images", info="FID wants 2,000", elem_id="eval-num"
            )
            seed = gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="eval-seed")
            with gr.Row():
                measure_button = gr.Button("Measure", variant="primary", elem_id="eval-go")
                stop = gr.Button("Stop", elem_id="eval-stop")
        with gr.Column(scale=3):
            state = gr.Markdown(elem_id="eval-state")
            table = gr.Dataframe(
                headers=["score", "value", "images measured", "the same of real images"],
                interactive=False,
                show_label=False,
                elem_id="eval",
            )
            first_images = gr.Image(label="The first 64", format="png", interactive=False, elem_id="eval-grid")
    update_choices(tab, model, names)
    running = measure_button.click(measure, [what, model, num, seed], [state, table, first_images], concurrency_limit=1)
    stop.click(lambda: "stopped", None, state, cancels=[running])


def measure_model(studio: Studio, what: str, model: str, num: int, seed: int) -> Iterator[tuple]:
    """Yield (progress, rows of scores, grid of images), the last two once they exist.

    Raises:
        ValueError: the number of images is out of bounds.
    """
    if not 2 <= num <= MAX_IMAGES:
        raise ValueError(f"the number of images is {num}: expected 2 to {MAX_IMAGES:,}")
    yield "loading", None, None
    pipe, started = studio.models(model), time.time()
    if what == JUDGE:
        truths = judge.read_prompts()
        prompts = [truth.prompt for truth in truths]
    else:
        extractor = encoder_features("emoji", load("argen/emoji-clip").to(pipe.device))
        reference = run.read_reference(run.EMOJI, extractor, None)
        prompts = reference.captions
    indices = [index * len(prompts) // num for index in range(num)]  # evenly spread
    images: list[Image.Image] = []
    while len(images) < num:
        rows = range(len(images), min(num, len(images) + BATCH_SIZE))
        generator = [run.generator_of(seed, index) for index in rows]
        with studio.device:
            images += pipe([prompts[indices[index]] for index in rows], generator=generator).images
        left = (time.time() - started) / len(images) * (num - len(images))
        yield f"{len(images)} of {number_of(num, 'image')}, {left:.0f} s left", gr.skip(), gr.skip()
    grid = run.grid([np.asarray(image) for image in images[:64]])
    yield "computing the scores", gr.skip(), grid
    if what == JUDGE:
        network = load("argen/emoji-judge")
        arrays = [np.asarray(opaque(image)) for image in images]
        scores = judge.evaluate(network, arrays, [truths[index] for index in indices])
    else:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "samples").mkdir()
            files = [root / "samples" / f"{index:06d}.png" for index in range(num)]
            save_images([(image, None) for image in images], files)
            samples = open_images(root / "samples")
            scores = run.compare(samples, reference, extractor, ["fid"], root, root / "cache")
    rows = [[name, round(score["value"], 3), score["n"], score.get("judge_on_real")] for name, score in scores.items()]
    notes = "; ".join(score["warning"] for score in scores.values() if "warning" in score)
    yield f"{number_of(num, 'image')} in {time.time() - started:.0f} s{f'; {notes}' if notes else ''}", rows, grid
