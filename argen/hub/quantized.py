"""Quantized generators: rounding the network that writes the tokens, and folders that keep it so."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from argen.device import LOADING, silent
from argen.models.quantized import Quantization, is_quantized, prepare, quantize
from argen.registry import resolve
from samplers.errors import InvalidValue
from tokenizers_img.mapped import read_safetensors, unfilled

NAMES = {"int8": Quantization(8), "int4": Quantization(4, 32)}
PART, FILE, KEY = "transformer", "diffusion_pytorch_model.safetensors", "quantization"


def decoding_network(model: Any, option: str) -> Any:
    """The network of a generator that decodes token by token with a cache of argen's.

    Raises:
        InvalidValue: the model has none; `option` is what asks for it.
    """
    network = getattr(model, PART, model)
    if not hasattr(network, "compiled"):
        name = type(network).__name__
        raise InvalidValue(
            f"{option} is for networks that decode token by token, not for a {name}: leave it out", option
        )
    return network


def quantize_model(model: Any, how: Quantization) -> None:
    """Round the weights of a generator's network, in place.

    Raises:
        InvalidValue: it is quantized already, or writes no tokens with a network of argen's.
    """
    quantize(decoding_network(model, "quantize"), how)


def save_quantized(pipe: Any, how: Quantization, folder: Path) -> None:
    """Write a quantized pipeline, as ``save_pretrained`` does, with how it was quantized in the file of its network."""
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".quantize-") as work, silent():
        new = Path(work) / folder.name  # so that nothing half-written stays behind
        pipe.save_pretrained(new)
        state = {name: tensor.contiguous() for name, tensor in getattr(pipe, PART).state_dict().items()}
        for old in (new / PART).glob("*.safetensors*"):
            old.unlink()
        save_file(state, new / PART / FILE, {"format": "pt", KEY: json.dumps(how.to_dict())})
        new.rename(folder)


def read_quantized(folder: Path) -> torch.nn.Module | None:
    """The quantized network of a saved pipeline; None where it has none."""
    file = folder / PART / FILE
    if not file.is_file():
        return None
    with safe_open(file, "pt") as stored:
        if KEY not in (stored.metadata() or {}):
            return None
    state = read_safetensors(file)
    module, name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[PART]
    network_class = resolve(f"{module}:{name}")
    with LOADING:
        network = unfilled(network_class.from_config, network_class.load_config(folder / PART))
    prepare(network, state)
    network.load_state_dict(state, assign=True)
    return network.eval()


def quantized(model: Any) -> bool:
    """Whether the network of a model is quantized."""
    network = getattr(model, PART, model)
    return isinstance(network, torch.nn.Module) and is_quantized(network)
