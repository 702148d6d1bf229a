"""Shared fixtures: golden cases (official inputs and outputs) and the shipped pipeline, loaded once."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


@pytest.fixture(scope="session")
def pipe():
    """The shipped generator."""
    pipe = argen.load("argen/emoji-parti")
    pipe.set_progress_bar_config(disable=True)
    return pipe
