"""Quantized generators: rounding the network that writes the tokens, and folders that keep it so."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from argen.device import LOADING, silent
from argen.files import new_folder
from argen.models.decoding import FILE
from argen.models.quantized import KEY, Quantization, is_quantized, prepare, read_metadata, stores_quantized
from argen.registry import resolve
from samplers.errors import InvalidValue
from tokenizers_img.mapped import read_safetensors, unfilled

NAMES = {"int8": Quantization(8), "int4": Quantization(4, 32)}
PART = "transformer"
LANGUAGE_MODEL = "LlamaForCausalLM"
LANGUAGE_FILE = "model.safetensors"  # what transformers calls it
OF_ROTATION = "rotation."  # tensors that say how a network was rotated, which it does not need any more


def decoding_network(model: Any, option: str) -> Any:
    """The network of a generator that decodes token by token with a cache of argen's.

    Raises:
        InvalidValue: the model has none; `option` is what asks for it.
    """
    network = getattr(model, PART, model)
    check_decodes(type(network), option)
    return network


def check_decodes(network: type, option: str) -> None:
    """Raises:
    InvalidValue: networks of a class do not decode token by token with a cache of argen's; `option` is what asks for it.
    """
    if not hasattr(network, "compiled"):
        raise InvalidValue(
            f"{option} is for networks that decode token by token, not for a {network.__name__}: leave it out", option
        )


def check_quantizes(network: type) -> None:
    """Raises:
    InvalidValue: networks of a class do not write tokens one after the other.
    """
    if network.__name__ != LANGUAGE_MODEL:
        check_decodes(network, "quantize")


def writing_network(model: Any) -> Any:
    """The network of a generator that writes tokens one after the other, whose weights can be quantized: argen's, or a language model.

    Raises:
        InvalidValue: the model has none.
    """
    network = getattr(model, PART, model)
    check_quantizes(type(network))
    return network


def quantizes(model: Any) -> bool:
    """Whether a model has a network to quantize, not quantized yet."""
    network = getattr(model, PART, model)
    return (hasattr(network, "compiled") or is_language_model(network)) and not quantized(model)


def is_language_model(network: Any) -> bool:
    """Whether a network is a Llama of transformers."""
    return type(network).__name__ == LANGUAGE_MODEL


def digest(network: torch.nn.Module) -> str:
    """SHA-256 of the names and numbers of a network."""
    total = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def save_quantized(
    pipe: Any, metadata: dict[str, Any], folder: Path, tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a quantized pipeline, as ``save_pretrained`` does.

    Args:
        metadata: how it was quantized, for the file of its network.
        tensors: that belong to it, kept in the file alone.

    Raises:
        ValueError: there is something at `folder`.
    """
    with new_folder(folder) as new, silent():
        network = getattr(pipe, PART)
        network.quantization = metadata
        pipe.save_pretrained(new)  # which writes the network as it is
        if tensors:
            write_network(network, new / PART, tensors)


def write_network(network: torch.nn.Module, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    """Put the tensors of a quantized network in the place of those that were saved of it, with how it was quantized.

    Args:
        tensors: that belong to it, kept in the file alone.
    """
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    file = folder / (LANGUAGE_FILE if is_language_model(network) else FILE)
    save_file(state | dict(tensors or {}), file, {"format": "pt", KEY: json.dumps(network.quantization)})


def quantized_file(folder: Path) -> Path | None:
    """The file of the network of a saved pipeline, if that is quantized."""
    file = next((path for name in (FILE, LANGUAGE_FILE) if (path := folder / PART / name).is_file()), None)
    return file if file is not None and stores_quantized(file) else None


def read_quantized(folder: Path) -> torch.nn.Module | None:
    """The quantized network of a saved pipeline; None where it has none.

    Raises:
        ValueError: its tensors do not fit it, or are not what the metadata of the file say; says which.
    """
    file = quantized_file(folder)
    if file is None:
        return None
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata() or {}
    state = {name: tensor for name, tensor in read_safetensors(file).items() if not name.startswith(OF_ROTATION)}
    module, name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[PART]
    network_class = resolve(f"{module}:{name}")
    with LOADING:
        if hasattr(network_class, "load_config"):
            network = unfilled(network_class.from_config, network_class.load_config(folder / PART))
        else:
            network = unfilled(network_class, network_class.config_class.from_pretrained(folder / PART))
    how, content = read_metadata(metadata[KEY]) if KEY in metadata else (None, {})
    prepare(network, state, how)
    network.load_state_dict(state, assign=True)
    network.quantization = content
    return network.eval()


def quantized(model: Any) -> bool:
    """Whether the network of a model is quantized."""
    network = getattr(model, PART, model)
    return isinstance(network, torch.nn.Module) and is_quantized(network)
