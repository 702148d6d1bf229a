"""Published configurations of FlexTok: the sizes of its networks, and a refusal of what argen does not know."""

import ast
import json
from pathlib import Path

from diffusers import AutoencoderKL
from safetensors import safe_open

from tokenizers_img.checkpoint import weight_files
from tokenizers_img.flextok.network import FREQUENCIES

VAE, ALIGNMENT = (
    "vae.vae.",
    "decoder.module_dict.dec_repa_",
)  # prefixes of published keys; the second is of training only
WITHOUT_WEIGHTS = ("PerSampleOp", "BlockWiseSequencePacker", "SequenceUnpacker", "MLPHead")
ENTRIES = {  # entry of a published configuration -> its class, and the settings that must have one value
    "enc_patch_emb": ("PatchEmbedder", {"flatten_patches": False}),
    "enc_posemb_module": ("PositionalEmbeddingAdder", {"posemb_type": "sincos", "posemb_scaling": "absolute"}),
    "enc_register_module": ("Registers1D", {"ordering_mode": "nested"}),
    "enc_transformer": ("FlexTransformer", {}),
    "enc_to_latents": ("LinearHead", {"use_mup_readout": False}),
    "dec_from_latents": ("LinearLayer", {}),
    "dec_registers_posemb_module": (
        "PositionalEmbeddingAdder",
        {"posemb_type": "learnable_sum", "posemb_scaling": "absolute"},
    ),
    "dec_nested_dropout": ("MaskedNestedDropout", {}),
    "dec_latent_dropout": ("LearnedNullCond", {}),
    "dec_noise_patch_emb": ("PatchEmbedder", {"flatten_patches": False}),
    "dec_patches_posemb_module": ("PositionalEmbeddingAdder", {"posemb_type": "sincos", "posemb_scaling": "absolute"}),
    "dec_time_embedder": ("TimestepEmbedder", {"frequency_embedding_size": 2 * FREQUENCIES}),
    "dec_transformer": ("FlexTransformer", {"adaLN_expansion": 2}),
    "dec_to_patches": ("ToPatchesLinearHead", {"use_mup_readout": False}),
    "enc_seq_packer": ("BlockWiseSequencePacker", {"mask_mode": "causal_last"}),
    "dec_seq_packer": ("BlockWiseSequencePacker", {"mask_mode": "full"}),
}


def read_config(path: Path) -> dict:
    """The configuration of a published file: from ``config.json`` beside it, else from inside it."""
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if beside.is_file():
        return json.loads(beside.read_text())
    try:
        with safe_open(weight_files(path)[0], "pt") as file:
            inside = file.metadata() or {}
        return {key: value if key == "_target_" else ast.literal_eval(value) for key, value in inside.items()}
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} holds no configuration ({error}): put its config.json beside it") from error


def sizes_of(config: dict) -> dict:
    """What `FlexTok` takes, of a published configuration.

    Raises:
        ValueError: it names a part or a setting that argen does not know.
    """
    parts = {}
    for side in ("encoder", "decoder"):
        if side not in config or "module_dict" not in config[side]:
            raise ValueError(f"the configuration lacks {side}.module_dict: expected that of a FlexTok")
        parts |= config[side]["module_dict"]
    for name, part in parts.items():
        target = part["_target_"].rpartition(".")[2]
        expected, settings = ENTRIES.get(name, (None, {}))
        if target != expected and not (expected is None and target in WITHOUT_WEIGHTS):
            raise ValueError(f"the configuration names {name}: {part['_target_']}, a part that argen does not know")
        for key, value in settings.items():
            if part.get(key, value) != value:
                raise ValueError(f"the configuration sets {name}.{key} to {part[key]!r}: argen knows {value!r} only")
    missing = [name for name in ENTRIES if name not in parts]
    if missing:
        raise ValueError(f"the configuration lacks {', '.join(missing)}: expected that of a FlexTok")
    encoder, decoder = parts["enc_transformer"], parts["dec_transformer"]
    return {
        "levels": tuple(config["regularizer"]["levels"]),
        "registers": parts["enc_register_module"]["n_max"],
        "encoder_dim": encoder["dim"],
        "encoder_depth": encoder["depth"],
        "encoder_head_dim": encoder.get("head_dim", 64),
        "decoder_dim": decoder["dim"],
        "decoder_depth": decoder["depth"],
        "decoder_head_dim": decoder.get("head_dim", 64),
        "channels": parts["enc_patch_emb"]["channels_in"],
        "patch": parts["enc_patch_emb"]["patch_sizes"][0],
        "grid": parts["enc_posemb_module"]["max_sizes"][0],
        "max_timestep": float(parts["dec_time_embedder"].get("max_timestep", 1000.0)),
        "single_null": bool(parts["dec_latent_dropout"].get("replace_with_single_token", False)),
    }


def vae_sizes(config: dict) -> dict:
    """What `vae_network` takes, of a published configuration."""
    vae = config["vae"]
    return {"latent_channels": vae["latent_channels"], "scaling_factor": vae.get("scaling_factor") or 1.0}


def vae_network(
    latent_channels: int = 16,
    scaling_factor: float = 1.0,
    channels: tuple[int, ...] = (128, 256, 512, 512),
    norm_num_groups: int = 32,
) -> AutoencoderKL:
    """The VAE of the published tokenizers, in Stable Diffusion's layout."""
    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=2,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        sample_size=256,
        scaling_factor=scaling_factor,
    )
