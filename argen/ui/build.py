"""The web page: its tabs, and the server that shows it."""

import socket
from functools import cache
from pathlib import Path

import gradio as gr
from diffusers import DiffusionPipeline

from argen.device import pick
from argen.eval.reconstruction import Tokenizer
from argen.pipelines.base import TokenPipeline
from argen.registry import MODELS, load, load_diffusion
from argen.ui import control, generate, lab, tools


def build(data_dir: Path, device: str | None = None) -> gr.Blocks:
    """The page with every generator to choose from; each is loaded when it is first asked for.

    Args:
        data_dir: where finished pictures are kept; made if it is missing.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    where = pick(device)

    @cache
    def models(name: str) -> TokenPipeline | Tokenizer:
        return load(name).to(where)

    @cache
    def pipelines(name: str) -> DiffusionPipeline:
        pipe = load_diffusion(name).to(where)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    generators = {name: model.takes for name, model in MODELS.items() if model.kind == "generator"}
    free = [name for name, takes in generators.items() if "control" not in takes]
    tokenizers = [name for name, model in MODELS.items() if model.kind == "tokenizer"]
    controlled = [name for name, takes in generators.items() if "control" in takes]
    with gr.Blocks(title="argen", analytics_enabled=False) as page:
        gr.Markdown("# argen\nPictures written token by token, from words.")
        with gr.Tab("Generate"):
            generate.tab(models, free, data_dir)
        with gr.Tab("Control"):
            control.tab(models, controlled, data_dir)
        with gr.Tab("Diffusion"):
            tools.tab(pipelines)
        with gr.Tab("Tokenizers"):
            lab.tab(models, tokenizers, [name for name in tokenizers if MODELS[name].repo is None])
    return page


def launch(host: str, port: int, data_dir: Path, device: str | None = None) -> None:
    """Serve the page until it is interrupted.

    Raises:
        OSError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise OSError(f"cannot serve on {host}:{port} ({error}): choose another --port or --host") from error
    page = build(data_dir, device)
    page.queue().launch(
        server_name=host,
        server_port=port,
        allowed_paths=[str(data_dir.resolve())],
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"argen is at http://{host}:{port} - Ctrl-C stops it", flush=True)
    page.block_thread()
