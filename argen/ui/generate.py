"""The tab that makes pictures: they grow while they are written, and keep their settings."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import gradio as gr

from argen.data.emoji import STYLES
from argen.metadata import save_pictures
from argen.pipelines.base import TokenPipeline
from argen.request import Request

ANY_STYLE = "any"
PREVIEW_SIDE = 256  # of the shown pictures, in pixels; the files keep the model's size


def tab(pipe: TokenPipeline, data_dir: Path) -> None:
    """Lay the tab out inside the current `gr.Blocks`.

    Args:
        pipe: the generator.
        data_dir: existing folder for finished pictures.
    """

    def run(prompt, style, num, seed, guidance_scale, temperature, top_k, num_candidates) -> Iterator[tuple]:
        text = prompt.strip() if style == ANY_STYLE else f"{prompt.strip()}, {STYLES[style].prompt}"
        try:
            request = Request(
                prompt=text if prompt.strip() else "",
                num_images=int(num),
                seed=int(seed),
                guidance_scale=guidance_scale,
                temperature=temperature,
                top_k=int(top_k),
                num_candidates=int(num_candidates) if num_candidates > num else None,
            )
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), title="That cannot be drawn") from error
        for job in pipe.run(request, every=4):
            if not job.pictures:
                shown = pipe.pictures(job.tokens[: request.num_images])
                yield [_enlarge(picture) for picture in shown], f"{job.progress:.0%}", None
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        paths = [data_dir / f"{stamp}-{index}.png" for index in range(1, len(job.pictures) + 1)]
        save_pictures(list(zip(job.pictures, job.requests, strict=True)), paths)
        settings = [{"file": path.name, **own.to_dict()} for path, own in zip(paths, job.requests, strict=True)]
        state = f"{len(paths)} picture{'s' if len(paths) > 1 else ''} in {data_dir}"
        yield [(str(path), own.prompt) for path, own in zip(paths, job.requests, strict=True)], state, settings

    with gr.Row():
        with gr.Column(scale=2):
            prompt = gr.Textbox(label="Prompt", placeholder="a red apple", autofocus=True, elem_id="prompt")
            with gr.Row():
                style = gr.Dropdown([ANY_STYLE, *STYLES], value=ANY_STYLE, label="Style")
                num = gr.Slider(1, 9, value=4, step=1, label="Pictures")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="picture i has seed + i")
            with gr.Accordion("More", open=False):
                own = pipe.defaults
                guidance = gr.Slider(1, 10, value=own.guidance_scale, step=0.5, label="Guidance", info="1: none")
                temperature = gr.Slider(0, 2, value=own.temperature, step=0.05, label="Temperature")
                top_k = gr.Slider(0, 1024, value=own.top_k, step=1, label="Top-k", info="0: all tokens")
                candidates = gr.Slider(
                    1, 32, value=1, step=1, label="Candidates", info="more than Pictures: the best ones are kept"
                )
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop")
            gr.Examples(["a red apple", "a blue robot", "three yellow ducks", "a cat to the left of a pizza"], prompt)
        with gr.Column(scale=3):
            gallery = gr.Gallery(label="Pictures", columns=2, object_fit="contain", format="png", elem_id="pictures")
            state = gr.Markdown(elem_id="state")
            settings = gr.JSON(label="Settings of each picture, also inside its file", elem_id="settings")

    inputs = [prompt, style, num, seed, guidance, temperature, top_k, candidates]
    drawing = gr.on([go.click, prompt.submit], run, inputs, [gallery, state, settings], concurrency_limit=1)
    stop.click(None, cancels=[drawing])


def _enlarge(picture):
    factor = max(1, PREVIEW_SIDE // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor))
