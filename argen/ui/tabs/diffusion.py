"""The tab *Diffusion*: tools on diffusers' pipelines (bind, erase, count), each with the image before and after."""

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
from argen.diffusion.model_settings import binding, concepts_of, counters, counting, counting_rate, erasing
from argen.diffusion.prompts import parse, words_of
from argen.diffusion.rece import PRESETS
from argen.diffusion.tome import PRESETS as STRENGTHS
from argen.ui.context import AppContext, enlarge, user_errors
from argen.words import check_length, check_prompt, number_of, parse_count, split_names
from tokenizers_img.pixels import to_pil


class Stopped(Exception):
    """Raised inside a pipeline call that nobody waits for any more."""


def steps_of(draw: Callable[..., Image.Image]) -> Iterator[float | Image.Image]:
    """Yield the progress of a pipeline call, from 0 to 1, and at last its image. Closing the iterator stops the call at its next step.

    Args:
        draw: makes the call, with the keyword arguments that it gets.
    """
    updates: Queue = Queue()
    abandoned = threading.Event()

    def step(pipe, index, time, kwargs):
        if abandoned.is_set():
            raise Stopped
        updates.put((index + 1) / pipe.num_timesteps)
        return kwargs

    def run() -> None:
        try:
            updates.put(draw(callback_on_step_end=step))
        except Exception as error:
            updates.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while isinstance(update := updates.get(), float):
            yield update
        if isinstance(update, Exception):
            raise update
        yield update
    finally:
        abandoned.set()
        thread.join()


def draw_steps(pipe: DiffusionPipeline, prompt: str, arguments: dict, call: Callable | None = None) -> Iterator:
    """Run `steps_of` on a call of the pipeline, or of `call` instead.

    Args:
        arguments: of the call; "generator" is a seed.
    """
    arguments = arguments | {"generator": torch.Generator().manual_seed(arguments["generator"])}
    with closing(
        steps_of(lambda **callback: enlarge((call or pipe)(prompt, **arguments, **callback).images[0]))
    ) as updates:
        yield from updates


def parse_bindings(prompt: str) -> str:
    """Parse the bindings of a prompt -> a line of OBJECT=WORDS for each object."""
    check_prompt(prompt)
    parsed, words = parse(prompt.strip()), words_of(prompt.strip())
    parts = [[" ".join(words[i] for i in part) for part in (group.noun, group.modifiers)] for group in parsed.groups]
    return "\n".join("=".join(pair) for pair in parts)


def bind(pipe: DiffusionPipeline, prompt: str, pairs: str, strength: str, arguments: dict) -> Iterator[tuple]:
    """Yield (before, after, state) of a prompt, without and with binding.

    Args:
        pairs: as `parse_bindings` returns them; if empty, the prompt is parsed.
        strength: settings of `SemanticBinding`.
        arguments: see `draw_steps`.
    """
    check_prompt(prompt)
    lines = [line.partition("=") for line in check_length(pairs, "bindings").splitlines() if line.strip()]
    if any(not right.strip() for _, _, right in lines):
        raise ValueError("bindings: expected a line of OBJECT=WORDS for each, e.g. robot=blue")
    parsed = parse(prompt.strip(), {noun.strip(): right.strip() for noun, _, right in lines} or None)
    bound, before = SemanticBinding(pipe), None
    for before in draw_steps(pipe, parsed.prompt, arguments):
        if isinstance(before, float):
            yield None, None, f"before: {before:.0%}"
    for update in draw_steps(
        pipe, parsed.prompt, arguments, lambda _, **keywords: bound(parsed, settings=strength, **keywords)
    ):
        running = isinstance(update, float)
        yield before, None if running else update, f"after: {update:.0%}" if running else str(parsed)


def erase(
    pipe: DiffusionPipeline, model: str, concepts: str, preset: str | None, retained: str, prompt: str, arguments: dict
) -> Iterator[tuple]:
    """Yield (before, after, state) of a prompt, before and after erasing concepts; the pipeline is restored at the end.

    Args:
        concepts, retained: separated by commas.
        model, preset: see `erasing`.
        arguments: see `draw_steps`.
    """
    check_prompt(prompt)
    for text, what in ((concepts, "the list of concepts"), (retained, "the list of what must stay")):
        check_length(text, what)
    names, retained_names = concepts_of(model, [concepts]), split_names([retained])
    erasure, before, changes = ConceptErasure(pipe), None, []
    stages = erasure.stages(**erasing(model, names, preset, retained_names))
    for before in draw_steps(pipe, prompt.strip(), arguments):
        if isinstance(before, float):
            yield None, None, f"before: {before:.0%}"
    try:
        for stage in stages:
            changes.append(f"{stage.stage}: text matrices changed by {stage.change:.2f} of their norm")
            yield before, None, "; ".join(changes)
        for update in draw_steps(pipe, prompt.strip(), arguments):
            running = isinstance(update, float)
            yield before, None if running else update, f"after: {update:.0%}" if running else "; ".join(changes)
    finally:
        erasure.restore()


def count(pipe: DiffusionPipeline, model: str, prompt: str, iterations: int, rate: float, seed: int) -> Iterator[tuple]:
    """Yield (before, best so far, state) while a count token is optimised.

    Args:
        model: what the pipeline was loaded as, see `argen.diffusion.model_settings.counters`.
        prompt: e.g. "five apples".
    """
    check_prompt(prompt)
    number, things = parse_count(prompt)
    token = CountToken(pipe, **counters(model, pipe.device), **counting(model, number))
    latents, before, best = unit_noise(pipe, torch.Generator().manual_seed(seed)), None, None
    for step in token.search(things, number, latents, steps=iterations, learning_rate=rate):
        if step.best:
            best, after = step, enlarge(to_pil(step.image[0]))
            before = before or after
        state = f"after {step.index} of {number_of(iterations, 'step')}; shown: counted {best.count:.1f} after {number_of(best.index, 'step')}"
        if step.is_right(number):
            state += ", right"
        yield before, after, state


TITLE = "Diffusion"


def layout(context: AppContext, tab: gr.Tab) -> None:
    def pipelines(name: str) -> DiffusionPipeline:
        return context.diffusion(context.studio.models.check_pipeline(name))

    def call_arguments(steps, guidance, seed) -> dict:
        return {"num_inference_steps": int(steps), "guidance_scale": guidance, "generator": int(seed)}

    def on_parse(prompt) -> str:
        with user_errors():
            return parse_bindings(prompt)

    def on_bind(model, prompt, pairs, strength, *sampling) -> Iterator[tuple]:
        with user_errors():
            yield from bind(pipelines(model.strip()), prompt, pairs or "", strength, call_arguments(*sampling))

    def on_erase(model, concepts, preset, retained, prompt, *sampling) -> Iterator[tuple]:
        with user_errors():
            yield from erase(
                pipelines(model.strip()),
                model.strip(),
                concepts,
                preset or None,
                retained or "",
                prompt,
                call_arguments(*sampling),
            )

    def on_count(model, prompt, iterations, rate, seed) -> Iterator[tuple]:
        with user_errors():
            pipe = pipelines(model.strip())
            yield from count(pipe, model.strip(), prompt, int(iterations), rate, int(seed))

    gr.Markdown(
        "Three tools for Stable Diffusion (XL) pipelines: *Bind* keeps colours with their objects, *Erase* makes a concept undrawable, *Count* "
        "draws an exact number of objects. Each shows the image before and after, and the pipeline stays as it was; to keep the result, use "
        "`argen bind`, `argen erase` or `argen count`."
    )
    model = gr.Textbox(
        "argen/emoji-sd", label="Pipeline", info="or a folder, or OWNER/NAME on the hub", elem_id="pipeline"
    )
    with gr.Accordion("More", open=False), gr.Row():
        steps = gr.Slider(1, 100, value=25, step=1, label="Steps", elem_id="tool-steps")
        guidance = gr.Slider(1, 15, value=4, step=0.5, label="Guidance")
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")
    with gr.Tab("Bind"):
        bind_prompt = gr.Textbox("a blue robot and a green pizza", label="Prompt", elem_id="bind-prompt")
        pairs = gr.Textbox(label="Bindings", lines=2, placeholder="robot=blue", elem_id="bind-pairs")
        strength = gr.Dropdown(list(STRENGTHS), value=binding("argen/emoji-sd"), label="Settings")
        parse_button = gr.Button("Parse prompt", elem_id="bind-look")
        parse_button.click(on_parse, bind_prompt, pairs)
        buttons(on_bind, [model, bind_prompt, pairs, strength, steps, guidance, seed], "bind")
    with gr.Tab("Erase"):
        concepts = gr.Textbox("pizza", label="Concepts, separated by commas", elem_id="erase-concepts")
        retained = gr.Textbox(label="Retained concepts, separated by commas")
        preset = gr.Dropdown([("the model's own", ""), *PRESETS], value="", label="Preset", elem_id="erase-preset")
        erase_prompt = gr.Textbox("a pizza", label="Prompt", elem_id="erase-prompt")
        buttons(on_erase, [model, concepts, preset, retained, erase_prompt, steps, guidance, seed], "erase")
    with gr.Tab("Count"):
        count_prompt = gr.Textbox("five apples", label="Number and object", elem_id="count-prompt")
        with gr.Row():
            iterations = gr.Slider(1, 100, value=50, step=1, label="Iterations, at most")
            rate = gr.Slider(0.001, 0.1, value=counting_rate("argen/emoji-sd"), step=0.001, label="Learning rate")
        buttons(on_count, [model, count_prompt, iterations, rate, seed], "count")


def buttons(run: Callable[..., Iterator[tuple]], inputs: list, name: str) -> None:
    """Lay out the lower part of a tool: Run, Stop, the images before and after, and the state."""
    with gr.Row():
        run_button = gr.Button("Run", variant="primary", elem_id=f"{name}-run")
        stop = gr.Button("Stop")
    with gr.Row():
        before = gr.Image(label="Before", elem_id=f"{name}-before", height=320)
        after = gr.Image(label="After", elem_id=f"{name}-after", height=320)
    state = gr.Markdown(elem_id=f"{name}-state")
    running = run_button.click(run, inputs, [before, after, state], concurrency_limit=1, concurrency_id="tools")
    stop.click(None, cancels=[running])
