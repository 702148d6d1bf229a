"""What looks at pictures, by name: `inception` (FID as published), `clip:<id>` and `emoji` (ours); numbers of different
names are different metrics and are never mixed."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from argen.eval import inception
from argen.eval.images import RESIZES, ImageArray, prepared
from argen.models.clip import TextImageEncoder
from argen.words import cut
from tokenizers_img.hub import model_folder
from tokenizers_img.pixels import from_pil


@dataclass(frozen=True)
class Extractor:
    """Attributes:
    name: "inception", "clip:<id>" or "emoji".
    protocol: how pictures come to the network's size: a name of `RESIZES`, or the encoder's own way.
    weights: SHA-256 of what the features depend on.
    arrays: names of the arrays that `look` gives; the first are the features themselves.
    prepare: picture [H, W, 3] uint8 -> the network's input, without the batch.
    look: inputs [B, ...] -> {array: [B, D]}.
    """

    name: str
    protocol: str
    weights: str
    arrays: tuple[str, ...]
    prepare: Callable[[ImageArray], Tensor]
    look: Callable[[Tensor], dict[str, Tensor]]

    def called(self, metric: str) -> str:
        """The name of a metric on these features, as in "FID" or "FID-emoji"."""
        return metric if self.name == "inception" else f"{metric}-{self.name}"


def check_protocol(protocol: str) -> None:
    """Raises:
    ValueError: no protocol in `RESIZES` has this name.
    """
    if protocol not in RESIZES:
        raise ValueError(f"unknown protocol {cut(protocol)!r}: expected one of {', '.join(RESIZES)}")


def inception_features(weights: Path | None, protocol: str, device: torch.device) -> Extractor:
    """Args:
    weights: the published file, or its tensors as ``.safetensors``; None: from torch's cache, or fetched.
    protocol: "adm", "pytorch-fid", "clean" or "torchmetrics".
    """
    check_protocol(protocol)
    path = weights or inception.find_weights()
    network = inception.FIDInception.from_original(path).to(device, memory_format=torch.channels_last)

    def look(batch: Tensor) -> dict[str, Tensor]:
        with torch.backends.cudnn.flags(allow_tf32=False):  # TF32 moves the numbers
            out = network(batch.to(device, memory_format=torch.channels_last))
        return {"features": out["2048"], "spatial": out["spatial"], "logits": out["logits_unbiased"]}

    prepare = partial(prepared, protocol=protocol, size=inception.SIZE)
    return Extractor("inception", protocol, inception.sha256(path), ("features", "spatial", "logits"), prepare, look)


def encoder_features(name: str, encoder: TextImageEncoder) -> Extractor:
    """The projected picture embedding of a text/picture encoder of ours."""
    vision = encoder.clip.config.vision_config

    def look(batch: Tensor) -> dict[str, Tensor]:
        return {"features": encoder.embed_pixels(batch, normalise=False)}

    def prepare(image: ImageArray) -> Tensor:
        return from_pil(Image.fromarray(image), vision.image_size)

    return Extractor(name, f"lanczos-{vision.image_size}", weights_digest(encoder.clip), ("features",), prepare, look)


def clip_features(name: str, clip: "PublishedCLIP") -> Extractor:
    """The projected picture embedding of a published CLIP of transformers."""

    def look(batch: Tensor) -> dict[str, Tensor]:
        return {"features": clip.embed_pixels(batch)}

    return Extractor(f"clip:{name}", "its own", weights_digest(clip.model), ("features",), clip.prepare, look)


class PublishedCLIP:
    """A published CLIP, with its own way to read pictures and prompts.

    Args:
        name: a hub id or a folder.

    Raises:
        ConnectionError: it is not on this machine and cannot be fetched.
    """

    def __init__(self, name: str, device: torch.device):
        try:
            folder = model_folder(name)
            self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
            self.processor, self.tokenizer = (
                part.from_pretrained(folder) for part in (CLIPImageProcessorPil, CLIPTokenizer)
            )
        except OSError as error:
            raise ConnectionError(
                f"the CLIP {name} is not on this machine and could not be fetched: connect to the network, give a "
                "folder that holds it, or use emoji, which ships"
            ) from error

    def prepare(self, image: ImageArray) -> Tensor:
        """[H, W, 3] uint8 -> [3, h, w]."""
        return self.processor(Image.fromarray(image), return_tensors="pt").pixel_values[0]

    @torch.no_grad()
    def embed_pixels(self, batch: Tensor) -> Tensor:
        """Pictures [B, 3, h, w] from `prepare` -> [B, E]."""
        return self.model.visual_projection(self.model.vision_model(batch.to(self.model.device)).pooler_output)

    @torch.no_grad()
    def embed_text(self, prompts: list[str], prefix: str = "") -> Tensor:
        """[P, E]; `prefix` is put before each prompt's tokens as `with_prefix` says."""
        read = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, **read).input_ids
        if prefix:
            tokens = with_prefix(tokens, self.tokenizer([prefix], **read).input_ids)
        return self.model.text_projection(self.model.text_model(tokens.to(self.model.device)).pooler_output)


def with_prefix(tokens: Tensor, prefix: Tensor) -> Tensor:
    """Rows [P, 77] of prompts with the words of `prefix` [1, 77] before theirs, cut to 77 (LlamaGen's CLIP score)."""
    start, end = tokens[:, :1], prefix.max()
    words = prefix[:, 1 : int((prefix[0] == end).nonzero()[0])]
    rows = torch.cat([start, words.expand(len(tokens), -1), tokens[:, 1:]], dim=1)[:, : tokens.shape[1]]
    rows[:, -1] = torch.where(rows[:, -1] == 0, rows[:, -1], end)
    return rows


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of the tensors of a network, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
