"""The web page and its tabs."""

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal

from argen.registry import reason, tabs
from argen.ui import endpoints
from argen.ui.context import AppContext, user_errors

logger = logging.getLogger(__name__)
# Gradio lays the captions of a gallery over the lower corner of its images
STYLE = ".thumbnail-item .caption-label { position: static; display: block; max-width: 100%; border: none; text-align: center; }"
STYLE += " .thumbnail-item:has(.caption-label) { display: flex; flex-direction: column; }"
STYLE += " .thumbnail-item:has(.caption-label) img { flex: 1; min-height: 0; }"
TO_TOP = "() => { window.scrollTo(0, 0); return []; }"
CLEAN_EVERY, KEEP_FOR = 3600, 86400  # seconds: uploaded and served files


class Page(gr.Blocks):
    """Blocks whose events take uploaded files only, never a path or URL that a client made up, and whose errors are one line, wherever
    in an event they happen."""

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
    """Yield every description of a file inside the inputs of an event."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str) or isinstance(value.get("url"), str):
            yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from files_in(part)


def check_uploaded(file: dict) -> None:
    """Raises:
    gr.Error: the file is not in the upload folder.
    """
    path = file.get("path")
    if not isinstance(path, str) or "://" in path or not is_in_or_equal(path, get_upload_folder()):
        raise gr.Error("that file was not uploaded: send it to /gradio_api/upload first", title="Invalid request")


def lay_out(name: str, module: Any, context: AppContext, tab: gr.Tab) -> None:
    """Fill a tab; one of a package whose layout raises is hidden, with a warning."""
    try:
        module.layout(context, tab)
    except Exception as error:
        if name in tabs.built_in:
            raise
        tab.visible = False
        logger.warning("the tab %s (%s) is left out (%s): update or uninstall it", name, module.__name__, reason(error))


def build(context: AppContext) -> gr.Blocks:
    """Build the page with every tab of the registry; models are loaded when they are first used."""
    os.environ["GRADIO_TEMP_DIR"] = str(context.studio.store.exports.resolve())  # uploads, and copies of served files
    with Page(title="argen", analytics_enabled=False, delete_cache=(CLEAN_EVERY, KEEP_FOR)) as page:
        gr.Markdown("# argen\nImages written token by token, from words.")
        context = replace(context, chosen=gr.State(None))
        with gr.Tabs() as bar:
            for name, module in tabs.items():
                with gr.Tab(module.TITLE, id=name) as tab:
                    lay_out(name, module, context, tab)
        context.chosen.change(lambda: gr.Tabs(selected="generate"), None, bar, js=TO_TOP, show_progress="hidden")
        endpoints.Endpoints(context)
        gr.HTML(f"<style>{STYLE}</style>", padding=False)
    for event in page.fns.values():
        if event.api_name not in endpoints.NAMES:
            event.api_visibility = "private"
    return page
