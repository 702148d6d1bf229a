"""LoRA in training, through peft: small factors beside the linear layers of a frozen network."""

import json
from pathlib import Path

import torch
from torch import nn

from argen.models.lora import write_adapter
from samplers.errors import InvalidValue

RANKS = (1, 256)
LAYERS = {  # class of the network -> its layers that are changed, as a regular expression for the whole name
    "LlamaGen": r"layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w1|w2|w3))",
    "Parti": r"(encoder|decoder)_layers\.\d+\.(\w+_attn\.(q|k|v|out)_proj|mlp\.(up|down)_proj)",
    "ControlAR": r"layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w1|w2|w3))",
    "XAR": r"(encoder|decoder)_blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q|k|v|out)_proj|mlp\.(fc1_g|fc1_x|fc2))",
    "LlamaForCausalLM": r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
    "FlexAR": r"models\.ar_image_model\.trunk\.blocks\.\d+\.(attn|self_attn|cross_attn|mlp)\.(qkv|proj|Wq|Wk|Wv|fc1|fc2|fc3)",
}

# of SEED-LLaMA's code: rank 16 has alpha 32, and these layers are trained whole; one table that is both stays as it is
LLAMA = {"lora_dropout": 0.05, "modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"]}
TABLES = ["embed_tokens", "lm_head"]


def inject(network: nn.Module, rank: int, alpha: float | None = None) -> dict:
    """Freeze a network and put factors of a rank beside its layers -> the settings of peft.

    Args:
        alpha: of the factors, see peft; None for that of the network's own recipe.

    Raises:
        InvalidValue: the rank is out of bounds, or there is no list of the network's layers.
        ModuleNotFoundError: peft is not installed.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not RANKS[0] <= rank <= RANKS[1]:
        raise InvalidValue(f"lora is {rank}: expected a rank from {RANKS[0]} to {RANKS[1]}", "lora")
    layers = LAYERS.get(type(network).__name__)
    if layers is None:
        raise InvalidValue(f"lora is for {', '.join(LAYERS)}, not for a {type(network).__name__}: leave it out", "lora")
    network.requires_grad_(False)
    further, scale = {}, 1
    if type(network).__name__ == "LlamaForCausalLM":
        tables = [] if network.config.tie_word_embeddings else TABLES
        further, scale = LLAMA | {"modules_to_save": LLAMA["modules_to_save"] + tables}, 2
    config = LoraConfig(r=rank, lora_alpha=alpha or scale * rank, target_modules=layers, **further)
    inject_adapter_in_model(config, network)
    return json.loads(json.dumps(config.to_dict(), default=_plain))


def _plain(value: object) -> object:
    """Sets and names of peft's settings for JSON."""
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))


def save(network: nn.Module, config: dict, base: str, digest: str, folder: Path) -> None:
    """Write the factors and the layers that were trained, in bfloat16."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(network)
    write_adapter(folder, config, {name: value.to(torch.bfloat16) for name, value in state.items()}, base, digest)
