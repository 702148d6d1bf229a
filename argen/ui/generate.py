"""The tab that makes pictures: they grow while they are written, and keep their settings."""

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image
from torch import Tensor

from argen.data.emoji import STYLES
from argen.data.imagenet import class_names
from argen.metadata import save_pictures
from argen.pipelines.base import TokenPipeline
from argen.request import Job, Request
from samplers import Lantern
from samplers.steps import Origin

ANY_STYLE = "any"
TINTS = {Origin.ACCEPTED: (0, 160, 60, 110), Origin.RELAXED: (240, 130, 0, 130)}  # RGBA
PREVIEW_SIDE = 256  # of the shown pictures, in pixels; the files keep the model's size
Models = Callable[[str], TokenPipeline]  # id -> the generator


def tab(models: Models, ids: Sequence[str], data_dir: Path) -> None:
    """Lay the tab out inside the current `gr.Blocks`.

    Args:
        models: gives a generator by its id.
        ids: of the generators to choose from; the first is shown.
        data_dir: existing folder for finished pictures.
    """
    shown = models(ids[0])

    def run(
        model,
        prompt,
        style,
        num,
        seed,
        guidance_scale,
        temperature,
        top_k,
        num_candidates,
        sampler,
        k,
        delta,
        steps,
        tokens,
        beams,
    ) -> Iterator[tuple]:
        asked = prompt.strip()
        styled = asked and style != ANY_STYLE and not asked.startswith("class:")
        with refusals():
            pipe = models(model)
            request = Request(
                prompt=f"{asked}, {STYLES[style].prompt}" if styled else asked,
                model=model,
                num_images=int(num),
                seed=int(seed),
                guidance_scale=guidance_scale,
                temperature=temperature,
                top_k=int(top_k),
                num_candidates=int(num_candidates) if num_candidates > num else None,
                num_beams=int(beams) if pipe.ordered and beams else None,
                num_tokens=int(tokens) if pipe.ordered else None,
                steps=int(steps) if pipe.defaults.steps else None,
                sampler=sampler,
                lantern_k=int(k) if sampler == Lantern.name else None,
                lantern_delta=delta if sampler == Lantern.name else None,
            )
        yield from draw(pipe, request, data_dir)

    def choose(model):
        with refusals():
            pipe = models(model)
        own, names = pipe.defaults, classes(pipe)
        emoji = model.startswith("argen/")
        return (
            gr.update(value=ANY_STYLE, visible=emoji),
            own.guidance_scale,
            gr.update(value=own.temperature, visible=not own.steps),
            gr.update(value=own.top_k, visible=not own.steps),
            gr.update(choices=names, value=None, visible=bool(names)),
            gr.update(choices=list(pipe.samplers), value=Request.sampler),
            gr.update(value=own.steps or 1, visible=bool(own.steps)),
            gr.update(value=pipe.length, maximum=max(2, pipe.length), visible=pipe.ordered),
            gr.update(visible=pipe.ordered),
        )

    with gr.Row():
        with gr.Column(scale=2):
            model = gr.Dropdown(list(ids), value=ids[0], label="Model", elem_id="model")
            prompt = gr.Textbox(label="Prompt", placeholder="a red apple", autofocus=True, elem_id="prompt")
            names = classes(shown)
            group = gr.Dropdown(names, value=None, label="Or a class", visible=bool(names), elem_id="class")
            with gr.Row():
                style = gr.Dropdown([ANY_STYLE, *STYLES], value=ANY_STYLE, label="Style")
                num = gr.Slider(1, 9, value=4, step=1, label="Pictures")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="picture i has seed + i")
            with gr.Accordion("More", open=False):
                own = shown.defaults
                guidance = gr.Slider(1, 10, value=own.guidance_scale, step=0.5, label="Guidance", info="1: none")
                temperature = gr.Slider(0, 2, value=own.temperature, step=0.05, label="Temperature")
                top_k = gr.Slider(0, 2048, value=own.top_k, step=1, label="Top-k", info="0: all tokens")
                candidates = gr.Slider(
                    1, 32, value=1, step=1, label="Candidates", info="more than Pictures: the best ones are kept"
                )
                sampler = gr.Dropdown(
                    list(shown.samplers),
                    value=Request.sampler,
                    label="Sampler",
                    info="auto, jacobi: the pictures of plain in fewer passes; lantern: fewer still, relaxed",
                )
                lantern_k = gr.Slider(0, 100, value=Lantern.k, step=1, label="LANTERN k", visible=False)
                lantern_delta = gr.Slider(0, 1, value=0.2, step=0.05, label="LANTERN delta", visible=False)
                steps = gr.Slider(1, 100, value=own.steps or 1, step=1, label="Steps", visible=bool(own.steps))
                tokens = gr.Slider(
                    1,
                    max(2, shown.length),
                    value=shown.length,
                    step=1,
                    label="Tokens",
                    info="the first say most",
                    visible=shown.ordered,
                    elem_id="num-tokens",
                )
                beams = gr.Slider(
                    0,
                    8,
                    value=0,
                    step=1,
                    label="Beams",
                    info="0: no search; else so many of the candidates are gone on with",
                    visible=shown.ordered,
                )
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop")
            gr.Examples(["a red apple", "a blue robot", "three yellow ducks", "a cat to the left of a pizza"], prompt)
        outputs = results("")

    model.change(choose, model, [style, guidance, temperature, top_k, group, sampler, steps, tokens, beams])
    group.input(lambda name: f"class:{name}", group, prompt)
    sampler.change(lambda name: [gr.update(visible=name == Lantern.name)] * 2, sampler, [lantern_k, lantern_delta])
    inputs = [
        model,
        prompt,
        style,
        num,
        seed,
        guidance,
        temperature,
        top_k,
        candidates,
        sampler,
        lantern_k,
        lantern_delta,
        steps,
        tokens,
        beams,
    ]
    drawing = gr.on([go.click, prompt.submit], run, inputs, outputs, concurrency_limit=1)
    stop.click(None, cancels=[drawing])


def classes(pipe: TokenPipeline) -> list[str]:
    """Names of the classes that a generator can be asked for as "class:NAME"."""
    groups = getattr(pipe.config, "groups", None)
    by_class = getattr(pipe.components.get("transformer"), "config", {}).get("classes") == len(class_names())
    return list(class_names()) if by_class else list(groups or [])


def results(suffix: str) -> list:
    """The column of what comes out: gallery, state, settings, and how the cells were written."""
    with gr.Column(scale=3):
        gallery = gr.Gallery(
            label="Pictures", columns=2, object_fit="contain", format="png", elem_id=f"pictures{suffix}"
        )
        state = gr.Markdown(elem_id=f"state{suffix}")
        settings = gr.JSON(label="Settings of each picture, also inside its file", elem_id=f"settings{suffix}")
        with gr.Accordion("How the cells were written", open=False):
            cells = gr.Gallery(
                label="green: guessed and accepted; orange: accepted with its neighbours' probability; plain: drawn",
                columns=4,
                object_fit="contain",
                elem_id=f"cells{suffix}",
            )
    return [gallery, state, settings, cells]


def draw(pipe: TokenPipeline, request: Request, data_dir: Path) -> Iterator[tuple]:
    """Carry a request out and keep its pictures; yields what `results` shows."""
    with refusals():
        started = time.perf_counter()
        for job in pipe.run(request, every=4):
            if not job.pictures:
                shown = pipe.pictures(job.tokens[: request.num_images])
                state = f"{job.progress:.0%} · {_speed(job, time.perf_counter() - started)}"
                yield [enlarge(picture) for picture in shown], state, None, None
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    paths = [data_dir / f"{stamp}-{index}.png" for index in range(1, len(job.pictures) + 1)]
    save_pictures(list(zip(job.pictures, job.requests, strict=True)), paths)
    settings = [{"file": path.name, **_readable(own)} for path, own in zip(paths, job.requests, strict=True)]
    how = f"{request.sampler}: {_speed(job, time.perf_counter() - started)}"
    state = f"{len(paths)} picture{'s' if len(paths) > 1 else ''} in {data_dir} ({how})"
    files = [(str(path), own.prompt) for path, own in zip(paths, job.requests, strict=True)]
    cells = None
    if job.origins is not None:
        cells = [written(picture, one) for picture, one in zip(job.pictures, job.origins, strict=True)]
    yield files, state, settings, cells


def _speed(job: Job, seconds: float) -> str:
    written, saved = len(job.tokens) * job.decided, 1 - job.passes / max(1, job.decided)
    promise = "lossless" if job.lossless else "relaxed"
    fewer = f"{saved:.0%} of the passes saved, " if saved >= 0 else ""
    return f"{written / seconds:.0f} tokens/s, {job.tokens_a_pass:.1f} tokens a pass, {fewer}{promise}"


def written(picture: Image.Image, origins: Tensor) -> Image.Image:
    """A picture with each cell in the colour of how it came by its token, [h, w] of `samplers.steps.Origin`."""
    tint = np.zeros((*origins.shape, 4), np.uint8)
    for origin, colour in TINTS.items():
        tint[(origins == origin).numpy()] = colour
    large = enlarge(picture).convert("RGBA")
    over = Image.fromarray(tint, "RGBA").resize(large.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(large, over).convert("RGB")


class refusals:
    """Bad input becomes a message on the page."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, ValueError | TypeError | OSError | ModuleNotFoundError):
            raise gr.Error(str(error), title="That cannot be drawn") from error


def _readable(request: Request) -> dict:
    control = request.control
    shown = {"kind": control.kind, "strength": control.strength, "size": control.size} if control else None
    return {name: shown if name == "control" else value for name, value in request.given().items()}


def enlarge(picture: Image.Image) -> Image.Image:
    """A picture that is large enough to look at."""
    factor = max(1, PREVIEW_SIDE // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor))
