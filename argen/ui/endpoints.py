"""Named endpoints of the page for `gradio_client`; the events of the tabs are private."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import gradio as gr
from anyio.to_thread import run_sync
from PIL import Image

from argen.eval.reconstruction import decoded, encoded
from argen.hub.cards import all_cards, ids
from argen.jobs.job_progress import final_progress, follow
from argen.jobs.store import DONE
from argen.models.annotators import KINDS
from argen.registry import samplers
from argen.request import Control, Request, rows_of, setting_of
from argen.ui.context import AppContext, display_settings, user_errors
from argen.ui.inputs import image_input
from tokenizers_img.pixels import to_pil

DESCRIBER, TOKENIZER = "argen/emoji-seed-lm", "argen/emoji-vitvqgan"
NAMES = ("generate", "edit", "control", "describe", "reconstruct", "models")


class Endpoints:
    """The endpoints, as hidden components inside the current `gr.Blocks`."""

    def __init__(self, context: AppContext):
        self.context, self.studio = context, context.studio
        names = self.studio.models.generators
        free, grids, controlled = names(control=False), names(control=False, grid=True), names(control=True)
        with gr.Column(visible=False):
            kinds = gr.Dropdown(list(KINDS), value="canny", label="Control")
            tokenizers = gr.Dropdown(ids("tokenizer"), value=TOKENIZER, label="Tokenizer")
            sampling = _number("Guidance"), _number("Temperature"), _number("Top-k"), _sampler(), _number("Candidates")
            _add(self.generate, [_prompt(), _model(free), *_numbers(), *sampling], _results())
            mask = _image("Mask, white: redrawn; none: what is transparent in the image")
            sampling = _number("Guidance"), _number("Temperature"), _sampler()
            _add(self.edit, [_image(), mask, _prompt(), _model(grids), *_numbers(), *sampling], _results())
            strength = gr.Number(1, label="Strength")
            _add(self.control, [_image(), _prompt(), _model(controlled), kinds, strength, *_numbers()], _results())
            _add(self.describe, [_image(), gr.Textbox("", label="Question")], gr.Textbox(label="Text"))
            _add(self.reconstruct, [_image(), tokenizers], gr.Image(label="Image", format="png"))
            _add(self.models, [], gr.JSON(label="Models"))

    async def run(self, generation_request: Request, request: gr.Request) -> tuple[list[tuple[str, str]], list[dict]]:
        """Run a request -> its files with their prompts, and the settings of each."""
        id = await run_sync(self.studio.submit, generation_request, self.context.owner(request))
        try:
            progress = await final_progress(follow(self.studio, id))
        finally:
            if not self.studio.closing:
                self.studio.cancel(id)  # does nothing to a job that is over
        if progress.state != DONE:
            raise ValueError(progress.error or f"the job was {progress.state}")
        files = [
            (str(self.studio.store.link_for_download(saved.id)), saved.request.prompt) for saved in progress.images
        ]
        return files, [display_settings(saved.request) for saved in progress.images]

    async def generate(
        self,
        request: gr.Request,
        prompt,
        model,
        num_images,
        seed=None,
        guidance_scale=None,
        temperature=None,
        top_k=None,
        sampler=Request.sampler,
        num_candidates=None,
    ) -> tuple:
        """Generate images from a prompt -> images, and the settings of each."""
        with user_errors():
            sampling = {"guidance_scale": guidance_scale, "temperature": temperature, "sampler": sampler}
            sampling |= {"top_k": top_k, "num_candidates": num_candidates}
            return await self.run(_generation_request(prompt, model, num_images, seed, **sampling), request)

    async def edit(
        self,
        request: gr.Request,
        image,
        mask,
        prompt,
        model,
        num_images,
        seed=None,
        guidance_scale=None,
        temperature=None,
        sampler=Request.sampler,
    ) -> tuple:
        """Redraw a part of an image -> images, and the settings of each."""
        with user_errors():
            sampling = {"guidance_scale": guidance_scale, "temperature": temperature, "sampler": sampler}
            generation_request = _generation_request(prompt, model, num_images, seed, **sampling)
            _check(image)

            def masked_request() -> Request:
                with self.studio.model(model) as pipe:
                    return replace(generation_request, tokens=rows_of(pipe.without(image, mask)))

            return await self.run(await run_sync(masked_request), request)

    async def control(self, request: gr.Request, image, prompt, model, kind, strength, num_images, seed=None) -> tuple:
        """Generate images that follow the edges, the depth or the segments of an image -> images, and the settings of each."""
        with user_errors():
            _check(image)
            control = Control(image, kind, strength)
            prepared = await run_sync(lambda: self.studio.models(model).prepare(control))
            return await self.run(_generation_request(prompt, model, num_images, seed, control=prepared), request)

    def describe(self, image, question) -> str:
        """Describe an image."""
        with user_errors(), self.studio.model(DESCRIBER) as pipe:
            _check(image)
            return pipe.describe(image, question or "", temperature=0.0)

    def reconstruct(self, image, tokenizer) -> Image.Image:
        """Turn an image into tokens and back."""
        with user_errors(), self.studio.model(tokenizer, "tokenizer") as network:
            _check(image)
            pixels, tokens = encoded(network, image)
            return to_pil(decoded(network, tokens, pixels)[0].cpu())

    def models(self) -> list[dict]:
        """List the models."""
        listed = [{"id": name, "kind": card.kind, "about": card.about} for name, card in all_cards().items()]
        trained = [name for name in self.studio.models.generators() if name not in all_cards()]
        return listed + [{"id": name, "kind": "generator", "about": "trained on this page"} for name in trained]


def _add(function: Callable, inputs: list, outputs) -> None:
    gr.Button(visible=False).click(function, inputs, outputs, api_name=function.__name__, concurrency_limit=None)


def _prompt() -> gr.Textbox:
    return gr.Textbox(label="Prompt")


def _model(names: Sequence[str]) -> gr.Dropdown:
    """The model; `argen.jobs.access.ModelAccess` checks its name, which a training may have got since the page was made."""
    return gr.Dropdown(list(names), value=names[0], label="Model", allow_custom_value=True)


def _numbers() -> tuple[gr.Number, gr.Number]:
    return gr.Number(1, label="Images"), gr.Number(None, label="Seed; none or -1: random, reported in the settings")


def _number(label: str) -> gr.Number:
    return gr.Number(None, label=f"{label}; none: the model's own")


def _sampler() -> gr.Dropdown:
    return gr.Dropdown(list(samplers), value=Request.sampler, label="Sampler", allow_custom_value=True)


def _image(label: str = "Image") -> gr.Image:
    return image_input(label=label)


def _results() -> list:
    return [gr.Gallery(label="Images", format="png"), gr.JSON(label="Settings of each")]


def _generation_request(prompt: str, model: str, num_images: float, seed: float | None, **settings) -> Request:
    settings |= {"num_images": num_images, "seed": random.randrange(2**32) if seed in (None, -1) else seed}
    settings = {
        name: value if name == "control" else setting_of(name).lenient(value) for name, value in settings.items()
    }
    return Request(prompt.strip(), model, **settings)


def _check(image: Image.Image | None) -> None:
    """Raises:
    ValueError: there is none.
    """
    if image is None:
        raise ValueError("image is missing: expected an image file")
