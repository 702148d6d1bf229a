"""Networks out of their folders, and the small files of those that ship: weights as integers of 8 bits, with a scale for each row.

A small file names its tensors as `argen.models.quantized` does, `NAME.qweight` and `NAME.scales`, kernels of convolutions too. They
become numbers when they are read, so that a network computes in whatever precision it is asked for.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from argen.data.emoji import GROUPS
from argen.files import WEIGHTS
from argen.models.clip import TextImageEncoder
from argen.models.quantized import rounded
from argen.registry import resolve
from tokenizers_img.checkpoint import Network, load_strict
from tokenizers_img.mapped import read_safetensors, unfilled

if TYPE_CHECKING:
    from diffusers import ModelMixin


FILE = "diffusion_pytorch_model.safetensors"
FEWEST = 4096  # numbers of a weight that is rounded
CODES = "quantizer."  # whose nearest neighbours are looked for: they stay as they are


def load_network(cls: type["ModelMixin"], folder: Path) -> "ModelMixin":
    """A network of ours or of diffusers in float32, in evaluation mode.

    Raises:
        ValueError: the file lacks tensors, or has others.
    """
    if is_small(folder / FILE):
        network = unfilled(cls.from_config, cls.load_config(folder))
        return load_strict(network, restored(read_safetensors(folder / FILE)), source=folder / FILE)
    model, info = cls.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    return complete(model, info)


def is_small(file: Path) -> bool:
    """Whether a file was written by `save_small`."""
    if not file.is_file():
        return False
    with safe_open(file, "pt") as stored:
        return any(name.endswith(".qweight") for name in stored.keys())  # noqa: SIM118 - no mapping


def save_small(network: "ModelMixin", folder: Path) -> None:
    """Write a network as it ships: weights and kernels as integers of 8 bits with a scale for each of their rows, the rest in bfloat16."""
    config = {key: value for key, value in json.loads(network.to_json_string()).items() if key != "_name_or_path"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem != name and tensor.ndim > 1 and tensor.numel() >= FEWEST and not name.startswith(CODES):
            integers, scales = rounded(tensor.flatten(1), 8, 0)
            state |= {f"{stem}.qweight": integers.view(tensor.shape).contiguous(), f"{stem}.scales": scales}
        else:
            state[name] = (tensor.bfloat16() if tensor.is_floating_point() else tensor).contiguous()
    save_file(state, folder / FILE, {"format": "pt"})


def restored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a small file -> those of the network in float32."""
    numbers = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".qweight")
        if stem != name:
            scales = state[f"{stem}.scales"]
            numbers[f"{stem}.weight"] = tensor * scales.view(-1, *[1] * (tensor.ndim - 1))
        elif not (name.endswith(".scales") and f"{name.removesuffix('.scales')}.qweight" in state):
            numbers[name] = tensor
    return numbers


def read_network(folder: Path, network: str) -> "ModelMixin":
    """`load_network` of the class called "module:Class"."""
    return load_network(resolve(network), folder)


def read_encoder(folder: Path) -> TextImageEncoder:
    """A CLIP with its text tokenizer."""
    from transformers import AutoTokenizer, CLIPModel

    model, info = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return TextImageEncoder(complete(model, info), AutoTokenizer.from_pretrained(folder))


def complete(model: Network, info: dict) -> Network:
    """The network in evaluation mode, if its file had all of it and nothing else.

    Raises:
        ValueError: it had not.
    """
    wrong = [f"{kind.removesuffix('_keys')} {key}" for kind in info for key in info[kind]]
    if wrong:
        raise ValueError(f"does not fit {type(model).__name__}: {'; '.join(wrong[:3])}")
    return model.eval()


def emoji_text() -> dict:
    """How the generators of the emoji family read prompts: arguments of their pipelines."""
    encoder = read_encoder(WEIGHTS / "emoji-clip")
    return {"text_encoder": encoder.clip, "tokenizer": encoder.tokenizer, "groups": list(GROUPS)}
