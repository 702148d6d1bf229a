"""Published files of SEED: names of the vision transformer and of the Q-Formers as transformers has them, and what fits together."""

import logging
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
)

from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.hub import download
from tokenizers_img.seed.network import Seed

EVA = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
NORM_EPS = 1e-5  # of the norm after the vision transformer, whose own are 1e-6
logger = logging.getLogger(__name__)


def vision_network(
    image_size: int = 224, dim: int = 1408, depth: int = 39, heads: int = 16, mlp_ratio: float = 4.3637
) -> Blip2VisionModel:
    """The picture encoder, by default ViT-g without its last block; its last norm is SEED's own."""
    config = Blip2VisionConfig(
        hidden_size=dim,
        intermediate_size=int(dim * mlp_ratio),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=14,
        layer_norm_eps=1e-6,
        qkv_bias=True,
    )
    network = Blip2VisionModel(config)
    network.post_layernorm.eps = NORM_EPS
    return network


VISION_NAMES = [  # of the published file -> of transformers
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^ln_vision\.", "post_layernorm."),
]
QFORMER_NAMES = [
    (r"(Q|Reverse_Q)former\.bert\.", r"\1former."),
    (r"former\.embeddings\.LayerNorm\.", "former.layernorm."),
    (r"\.(cross)?attention\.self\.", r".\1attention.attention."),
]


def _renamed(key: str, names: list[tuple[str, str]]) -> str:
    for published, ours in names:
        key = re.sub(published, ours, key)
    return key


def vision_state(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The tensors of a vision transformer and of ``ln_vision`` under the names of transformers; blocks from `depth` on are left out."""
    state = {key.removeprefix("visual_encoder."): value for key, value in state.items()}
    converted = {}
    for key, value in state.items():
        block = re.match(r"blocks\.(\d+)\.", key)
        if key.endswith(("attn.q_bias", "attn.v_bias")) or (block and int(block[1]) >= depth):
            continue
        converted[_renamed(key, VISION_NAMES)] = value
        if key.endswith("attn.qkv.weight"):
            query, other = (state[key.replace("qkv.weight", f"{part}_bias")] for part in "qv")
            bias = torch.cat([query, torch.zeros_like(query), other])
            converted[_renamed(key, VISION_NAMES).replace(".weight", ".bias")] = bias
    return converted


def seed_state(state: dict[str, Tensor], network: Seed) -> dict[str, Tensor]:
    """The tensors that `network` has, out of a published file, under our names; the others are counted in the log."""
    renamed = {_renamed(key, QFORMER_NAMES): value for key, value in state.items()}
    names = network.state_dict().keys()
    num_unused = len([key for key in renamed if key not in names])
    if num_unused:
        logger.info("%d tensors of the file are not part of the tokenizer", num_unused)
    return {key: value for key, value in renamed.items() if key in names}


def head_of(state: dict[str, Tensor]) -> str:
    """Which head a published file has, see `Seed`.

    Raises:
        ValueError: none that is known.
    """
    if "image_down.0.weight" in state:
        return "mlp"
    if "distill_image_proj.weight" in state:
        return "reverse"
    if "distill_text_proj.weight" in state:
        return "text"
    raise ValueError("the file has no head of SEED: expected image_down, distill_image_proj or distill_text_proj")


def from_original(path: str | Path, vision: str | Path | None = None) -> tuple[Seed, Blip2VisionModel]:
    """Load the published ``seed_quantizer.pt`` and the vision transformer.

    Args:
        vision: ``eva_vit_g.pth``; None where the first file has it, too.

    Raises:
        ValueError: a tensor is missing or of another shape.
    """
    state = read_state_dict(path)
    with torch.device("meta"):
        network, encoder = Seed(**sizes_of(state)), vision_network()
    network = load_strict(network, seed_state(state, network), source=path)
    vision_tensors = state if vision is None else read_state_dict(vision)
    vision_weights = {
        key: value.float() for key, value in vision_tensors.items() if vision or key.startswith("visual_encoder.")
    }
    vision_weights = {
        key: value for key, value in vision_weights.items() if not re.match(r"(norm|fc_norm|head)\.", key)
    }
    vision_weights |= {key: value for key, value in state.items() if key.startswith("ln_vision.")}
    return network, load_strict(
        encoder, vision_state(vision_weights, encoder.config.num_hidden_layers), source=vision or path
    )


def eva_file() -> Path:
    """The published vision transformer, out of torch's cache or fetched into it (1.9 GB, MIT).

    Raises:
        ConnectionError: it is not here and cannot be fetched.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / EVA.rpartition("/")[2]
    refusal = f"the image encoder of SEED is not on this machine and could not be fetched: get {EVA} and put it into {path.parent}"
    return download(EVA, path, refusal)


def sizes_of(state: dict[str, Tensor]) -> dict:
    """The sizes of `Seed` that a published file does not share with all others."""
    head = head_of(state)
    layers = {
        int(match[1]) for key in state if (match := re.match(r"Reverse_Qformer\.bert\.encoder\.layer\.(\d+)", key))
    }
    sizes = {"head": head, "reconstruct": "pos_embed" in state}
    return (
        sizes | ({"reverse_layers": max(layers) + 1} if layers else {}) | ({"embedding": 768} if head == "text" else {})
    )
