"""Shared fixtures: golden cases (official inputs and outputs) and the shipped pipeline, loaded once."""

import gzip
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two test processes on two cores: threads of both would wait for each other

os.environ["ARGEN_CACHE"] = tempfile.mkdtemp(prefix="argen-tests-")  # and no features of prompts in the user's own

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import argen

GOLDEN = Path(__file__).parent / "golden"


class Case:
    """One golden case: `weights` in the official layout, `io` the official inputs and outputs, `config`."""

    def __init__(self, name: str):
        self.folder = GOLDEN / name

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "weights.safetensors")

    @property
    def io(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "io.safetensors")

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())


@pytest.fixture
def golden():
    return Case


def published_keys(system: str) -> dict[str, dict[str, list[int]]]:
    """Published name -> {key: shape} of one system."""
    with gzip.open(GOLDEN / system / "published_keys.json.gz") as file:
        return {name: entry["keys"] for name, entry in json.load(file).items()}


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in module.state_dict().items()}


def tiny_pipeline(case: Case) -> DiffusionPipeline:
    """The Stable Diffusion pipeline of a case: random weights in the layout of diffusers."""
    sizes, weights = case.config["components"], case.weights

    def filled(module: torch.nn.Module, name: str, prefix: str = "") -> torch.nn.Module:
        start = f"{name}.{prefix}"
        module.load_state_dict({key[len(start) :]: value for key, value in weights.items() if key.startswith(start)})
        return module.eval()

    scheduler = dict(sizes["scheduler"])
    parts = {
        "unet": filled(UNet2DConditionModel(**sizes["unet"]), "unet"),
        "vae": AutoencoderKL(**sizes["vae"]).eval(),
        "scheduler": getattr(diffusers, scheduler.pop("_class_name"))(**scheduler),
        "tokenizer": CLIPTokenizer.from_pretrained(case.folder / "tokenizer"),
        "text_encoder": filled(CLIPTextModel(CLIPTextConfig(**sizes["text_encoder"])), "text_encoder", "text_model."),
    }
    if any(key.startswith("vae.") for key in weights):
        filled(parts["vae"], "vae")
    if "text_encoder_2" in sizes:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**sizes["text_encoder_2"]))
        components = {
            "text_encoder_2": filled(second, "text_encoder_2"),
            "tokenizer_2": CLIPTokenizer.from_pretrained(case.folder / "tokenizer_2"),
        }
        pipe = StableDiffusionXLPipeline(**parts, **components, add_watermarker=False)
    else:
        components = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pipe():
    """The shipped generator."""
    pipe = argen.load("argen/emoji-parti")
    pipe.set_progress_bar_config(disable=True)
    return pipe
