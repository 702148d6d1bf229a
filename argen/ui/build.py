"""The web page and its tabs."""

import os
from collections.abc import Iterator
from functools import partial

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from gradio.utils import get_upload_folder, is_in_or_equal

from argen.hub.cards import all_cards, ids
from argen.hub.loading import load_diffusion
from argen.hub.model_cache import ModelCache
from argen.ui import control, endpoints, evaluate, lab, tools
from argen.ui import models as manager
from argen.ui.edit import Edit
from argen.ui.gallery import Gallery
from argen.ui.generate import Create
from argen.ui.jobs import AppContext, user_errors
from argen.ui.many import Many

CLEANED_EVERY, KEPT_FOR = 3600, 86400  # seconds: what was uploaded and shown


class Page(gr.Blocks):
    """Blocks whose events take no file but those that were uploaded to them (no path, and no address, that a client has made up), and
    whose errors are one line, wherever in an event they happen."""

    async def process_api(self, *args, **kwargs):
        with user_errors():
            try:
                return await super().process_api(*args, **kwargs)
            except ValueError as error:  # gradio wraps what happens while a component reads or writes a file
                wrapped = type(error).__module__ == "gradio.exceptions" and error.__cause__
                raise wrapped or error from None

    async def preprocess_data(self, block_fn, inputs, state, explicit_call=False):
        for file in files_in(inputs):
            check_uploaded(file)
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def files_in(value) -> Iterator[dict]:
    """Every description of a file inside the inputs of an event."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str) or isinstance(value.get("url"), str):
            yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from files_in(part)


def check_uploaded(file: dict) -> None:
    """Raises:
    gr.Error: the file does not lie among the uploaded ones.
    """
    path = file.get("path")
    if not isinstance(path, str) or "://" in path or not is_in_or_equal(path, get_upload_folder()):
        raise gr.Error("that file was not uploaded: send it to /gradio_api/upload first", title="Invalid request")


def build(context: AppContext, device: torch.device, limit: int | None = None) -> gr.Blocks:
    """The page with every generator to choose from; each is loaded when it is first asked for.

    Args:
        limit: bytes of the pipelines of the diffusion tools, see `argen.hub.model_cache.ModelCache`.
    """
    models = context.studio.models
    os.environ["GRADIO_TEMP_DIR"] = str(context.studio.store.exports.resolve())  # uploads, and copies of what is shown

    def silent(name: str) -> DiffusionPipeline:
        pipe = load_diffusion(name)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    pipelines = ModelCache(device, silent, limit)
    generators, tokenizers = ids("generator"), ids("tokenizer")
    free = [name for name in generators if "control" not in all_cards()[name].takes]
    controlled = [name for name in generators if "control" in all_cards()[name].takes]
    with Page(title="argen", analytics_enabled=False, delete_cache=(CLEANED_EVERY, KEPT_FOR)) as page:
        gr.Markdown("# argen\nImages written token by token, from words.")
        with gr.Tab("Generate"):
            create = Create(models, free, context)
        with gr.Tab("Edit"):
            Edit(models, [name for name in free if all_cards()[name].grid], context)
        with gr.Tab("Control"):
            control.tab(models, controlled, context)
        with gr.Tab("X/Y/Z plot and Batch") as tab:
            many = Many(free, context)
            tab.select(many.restore, None, many.watched)
        with gr.Tab("Gallery") as tab:
            gallery = Gallery(context)
            tab.select(*gallery.first)
        with gr.Tab("Diffusion"):
            tools.tab(lambda name: pipelines(models.check_pipeline(name)))
        with gr.Tab("Tokenizers"):
            lab.tab(
                partial(models, kind="tokenizer"),
                tokenizers,
                [name for name in tokenizers if all_cards()[name].ships],
            )
        with gr.Tab("Evaluate"):
            evaluate.tab(context.studio, free)
        with gr.Tab("Models") as tab:
            tab.select(*manager.tab(context))
        page.load(create.view.restore, None, create.view.watched)
        page.load(create.presets, None, create.name)
        endpoints.Endpoints(context, free, controlled)
    for event in page.fns.values():
        if event.api_name not in endpoints.NAMES:
            event.api_visibility = "private"
    return page
