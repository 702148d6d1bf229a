"""The tab of the tools on diffusers' pipelines: bind, erase and count, each with the picture before and after."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from queue import Queue

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from argen.diffusion import ConceptErasure, CountToken, SemanticBinding
from argen.diffusion.base import unit_noise
from argen.diffusion.prompts import parse, words_of
from argen.diffusion.rece import PRESETS
from argen.diffusion.tome import PRESETS as STRENGTHS
from argen.diffusion.tools import binding, concepts_of, counters, counting, counting_rate, erasing
from argen.ui.context import AppContext, enlarge, user_errors
from argen.words import check_length, check_prompt, parse_count, split_names
from tokenizers_img.pixels import to_pil


class Stopped(Exception):
    """Nobody waits for the picture any more."""


def steps_of(draw: Callable[..., Image.Image]) -> Iterator[float | Image.Image]:
    """What a call of a pipeline is at, from 0 to 1, and at last its picture. When this is left before, the call ends at its
    next step.

    Args:
        draw: makes the call, with the keywords that it is given.
    """
    told: Queue = Queue()
    left = threading.Event()

    def step(pipe, index, time, kwargs):
        if left.is_set():
            raise Stopped
        told.put((index + 1) / pipe.num_timesteps)
        return kwargs

    def work() -> None:
        try:
            told.put(draw(callback_on_step_end=step))
        except Exception as error:
            told.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while isinstance(now := told.get(), float):
            yield now
        if isinstance(now, Exception):
            raise now
        yield now
    finally:
        left.set()
        thread.join()


def drawn(pipe: DiffusionPipeline, prompt: str, asked: dict, call: Callable | None = None) -> Iterator:
    """`steps_of` a call of the pipeline, or of `call` instead.

    Args:
        asked: what the call is given; "generator" is a seed.
    """
    asked = asked | {"generator": torch.Generator().manual_seed(asked["generator"])}
    with closing(steps_of(lambda **more: enlarge((call or pipe)(prompt, **asked, **more).images[0]))) as work:
        yield from work


def understand(prompt: str) -> str:
    """Bindings in a prompt, a line of OBJECT=WORDS for each object."""
    check_prompt(prompt)
    found, words = parse(prompt.strip()), words_of(prompt.strip())
    parts = [[" ".join(words[i] for i in part) for part in (group.noun, group.modifiers)] for group in found.groups]
    return "\n".join("=".join(pair) for pair in parts)


def bind(pipe: DiffusionPipeline, prompt: str, pairs: str, strength: str, asked: dict) -> Iterator[tuple]:
    """(before, after, state) of a bound prompt.

    Args:
        pairs: as `understand` gives them; nothing finds them.
        strength: settings of `SemanticBinding`.
        asked: see `drawn`.
    """
    check_prompt(prompt)
    lines = [line.partition("=") for line in check_length(pairs, "bindings").splitlines() if line.strip()]
    if any(not right.strip() for _, _, right in lines):
        raise ValueError("bindings: expected a line of OBJECT=WORDS for each, e.g. robot=blue")
    parsed = parse(prompt.strip(), {noun.strip(): right.strip() for noun, _, right in lines} or None)
    bound, before = SemanticBinding(pipe), None
    for before in drawn(pipe, parsed.prompt, asked):
        if isinstance(before, float):
            yield None, None, f"before: {before:.0%}"
    for now in drawn(pipe, parsed.prompt, asked, lambda _, **more: bound(parsed, settings=strength, **more)):
        done = isinstance(now, float)
        yield before, None if done else now, f"after: {now:.0%}" if done else str(parsed)


def erase(
    pipe: DiffusionPipeline, model: str, concepts: str, preset: str | None, retained: str, prompt: str, asked: dict
) -> Iterator[tuple]:
    """(before, after, state) of a prompt, with concepts and without; the pipeline is whole again at the end.

    Args:
        concepts, retained: with commas between.
        model, preset: see `erasing`.
        asked: see `drawn`.
    """
    check_prompt(prompt)
    for text, what in ((concepts, "the list of concepts"), (retained, "the list of what must stay")):
        check_length(text, what)
    named, kept = concepts_of(model, [concepts]), split_names([retained])
    erasure, before, told = ConceptErasure(pipe), None, []
    stages = erasure.stages(**erasing(model, named, preset, kept))
    for before in drawn(pipe, prompt.strip(), asked):
        if isinstance(before, float):
            yield None, None, f"before: {before:.0%}"
    try:
        for stage in stages:
            told.append(f"{stage.stage}: {stage.change:.1%} of the text matrices changed")
            yield before, None, "; ".join(told)
        for now in drawn(pipe, prompt.strip(), asked):
            done = isinstance(now, float)
            yield before, None if done else now, f"after: {now:.0%}" if done else "; ".join(told)
    finally:
        erasure.restore()


def count(pipe: DiffusionPipeline, model: str, prompt: str, iterations: int, rate: float, seed: int) -> Iterator[tuple]:
    """(before, best so far, state) of a count token that is optimised.

    Args:
        model: what the pipeline was loaded as, see `argen.diffusion.tools.counters`.
        prompt: as "five apples".
    """
    check_prompt(prompt)
    number, things = parse_count(prompt)
    token = CountToken(pipe, **counters(model, pipe.device), **counting(model, number))
    before, best = None, None
    for step in token.optimise(
        things, number, unit_noise(pipe, torch.Generator().manual_seed(seed)), steps=iterations, learning_rate=rate
    ):
        image = enlarge(to_pil(step.image[0]))
        before, best = before or image, image if step.best else best
        yield before, best, f"step {step.index + 1}: counted {step.count:.1f}, loss {step.loss:.2f}"


TITLE = "Diffusion"


def layout(context: AppContext, tab: gr.Tab) -> None:
    def pipelines(name: str) -> DiffusionPipeline:
        return context.diffusion(context.studio.models.check_pipeline(name))

    def asked(steps, guidance, seed) -> dict:
        return {"num_inference_steps": int(steps), "guidance_scale": guidance, "generator": int(seed)}

    def on_look(prompt) -> str:
        with user_errors():
            return understand(prompt)

    def on_bind(model, prompt, pairs, strength, *how) -> Iterator[tuple]:
        with user_errors():
            yield from bind(pipelines(model.strip()), prompt, pairs or "", strength, asked(*how))

    def on_erase(model, concepts, preset, retained, prompt, *how) -> Iterator[tuple]:
        with user_errors():
            yield from erase(
                pipelines(model.strip()), model.strip(), concepts, preset, retained or "", prompt, asked(*how)
            )

    def on_count(model, prompt, iterations, rate, seed) -> Iterator[tuple]:
        with user_errors():
            pipe = pipelines(model.strip())
            yield from count(pipe, model.strip(), prompt, int(iterations), rate, int(seed))

    gr.Markdown(
        "What a Stable Diffusion (XL) pipeline binds, forbids and counts. The pipeline stays as it is; the command line writes "
        "pipelines and tokens."
    )
    model = gr.Textbox(
        "argen/emoji-sd", label="Pipeline", info="or a folder, or OWNER/NAME on the hub", elem_id="pipeline"
    )
    with gr.Accordion("More", open=False), gr.Row():
        steps = gr.Slider(1, 100, value=25, step=1, label="Steps", elem_id="tool-steps")
        guidance = gr.Slider(1, 15, value=4, step=0.5, label="Guidance")
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")
    with gr.Tab("Bind"):
        prompt = gr.Textbox("a blue robot and a green pizza", label="Prompt", elem_id="bind-prompt")
        pairs = gr.Textbox(label="Bindings", lines=2, placeholder="robot=blue", elem_id="bind-pairs")
        strength = gr.Dropdown(list(STRENGTHS), value=binding("argen/emoji-sd"), label="Settings")
        look = gr.Button("Parse prompt", elem_id="bind-look")
        look.click(on_look, prompt, pairs)
        buttons(on_bind, [model, prompt, pairs, strength, steps, guidance, seed], "bind")
    with gr.Tab("Erase"):
        concepts = gr.Textbox("pizza", label="Concepts, with commas between", elem_id="erase-concepts")
        retained = gr.Textbox(label="What must stay, with commas between")
        preset = gr.Dropdown([("the model's own", None), *PRESETS], value=None, label="Kind")
        shown = gr.Textbox("a pizza", label="Prompt to look at", elem_id="erase-prompt")
        buttons(on_erase, [model, concepts, preset, retained, shown, steps, guidance, seed], "erase")
    with gr.Tab("Count"):
        wanted = gr.Textbox("five apples", label="How many of what", elem_id="count-prompt")
        with gr.Row():
            iterations = gr.Slider(1, 100, value=50, step=1, label="Iterations, at most")
            rate = gr.Slider(0.001, 0.1, value=counting_rate("argen/emoji-sd"), step=0.001, label="Learning rate")
        buttons(on_count, [model, wanted, iterations, rate, seed], "count")


def buttons(run: Callable[..., Iterator[tuple]], inputs: list, name: str) -> None:
    """The lower part of a tool: it runs, it stops, before and after, and what it says."""
    with gr.Row():
        go = gr.Button("Run", variant="primary", elem_id=f"{name}-run")
        stop = gr.Button("Stop")
    with gr.Row():
        before = gr.Image(label="Before", elem_id=f"{name}-before", height=320)
        after = gr.Image(label="After", elem_id=f"{name}-after", height=320)
    state = gr.Markdown(elem_id=f"{name}-state")
    running = go.click(run, inputs, [before, after, state], concurrency_limit=1, concurrency_id="tools")
    stop.click(None, cancels=[running])
