"""Networks out of their folders: those that ship."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from argen.data.emoji import GROUPS
from argen.files import WEIGHTS
from argen.models.clip import TextImageEncoder
from argen.registry import resolve
from tokenizers_img.checkpoint import Network

if TYPE_CHECKING:
    from diffusers import ModelMixin


def load_network(cls: type["ModelMixin"], folder: Path) -> "ModelMixin":
    """A network of ours or of diffusers in float32, in evaluation mode.

    Raises:
        ValueError: the file lacks tensors, or has others.
    """
    model, info = cls.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    return complete(model, info)


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
