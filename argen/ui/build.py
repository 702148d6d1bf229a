"""The web page and its tabs."""

from functools import cache

import gradio as gr
import torch
from diffusers import DiffusionPipeline

from argen.registry import MODELS, ids, load_diffusion
from argen.ui import control, evaluate, lab, tools
from argen.ui import models as manager
from argen.ui.edit import Edit
from argen.ui.gallery import Gallery
from argen.ui.generate import Create
from argen.ui.jobs import Desk
from argen.ui.many import Many


def build(desk: Desk, device: torch.device) -> gr.Blocks:
    """The page with every generator to choose from; each is loaded when it is first asked for."""
    models = desk.studio.models

    @cache
    def pipelines(name: str) -> DiffusionPipeline:
        pipe = load_diffusion(name).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    generators, tokenizers = ids("generator"), ids("tokenizer")
    free = [name for name in generators if "control" not in MODELS[name].takes]
    controlled = [name for name in generators if "control" in MODELS[name].takes]
    with gr.Blocks(title="argen", analytics_enabled=False) as page:
        gr.Markdown("# argen\nPictures written token by token, from words.")
        with gr.Tab("Generate"):
            create = Create(models, free, desk)
        with gr.Tab("Edit"):
            Edit(models, [name for name in free if MODELS[name].grid], desk)
        with gr.Tab("Control"):
            control.tab(models, controlled, desk)
        with gr.Tab("Many") as tab:
            many = Many(free, desk)
            tab.select(many.restore, None, many.watched)
        with gr.Tab("Gallery") as tab:
            gallery = Gallery(desk)
            tab.select(*gallery.first)
        with gr.Tab("Diffusion"):
            tools.tab(pipelines)
        with gr.Tab("Tokenizers"):
            lab.tab(models, tokenizers, [name for name in tokenizers if MODELS[name].repo is None])
        with gr.Tab("Evaluate"):
            evaluate.tab(desk.studio, free)
        with gr.Tab("Models") as tab:
            tab.select(*manager.tab())
        page.load(create.view.restore, None, create.view.watched)
        page.load(create.presets, None, create.name)
    return page
