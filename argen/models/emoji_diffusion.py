"""The small diffusion pipelines of the emoji family, put together of what ships: Stable Diffusion, and SEED's unCLIP."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import CLIPModel, CLIPTextModel, PreTrainedTokenizerFast

from argen.files import WEIGHTS
from argen.models.files import load_network, read_encoder
from tokenizers_img.seed.tokenizer import UnCLIP

NOISE = {  # reaches zero signal (arXiv 2305.08891), because the pictures have a white ground
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "steps_offset": 1,
}
SAMPLED = {"num_inference_steps": 25, "guidance_scale": 4.0, "guidance_rescale": 0.7}  # pictures of emoji-sd
EMOJI_SEED = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "squashed": False, "guidance_scale": 3.0}


def assembled(
    unet: UNet2DConditionModel, vae: AutoencoderKL, clip: CLIPModel, tokenizer: PreTrainedTokenizerFast
) -> StableDiffusionPipeline:
    """A pipeline in diffusers' own layout; it reads texts with the text half of `clip`, with all of their padding."""
    kwargs = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae, text_half(clip), tokenizer, unet, DDIMScheduler(**NOISE), **kwargs)


def text_half(clip: CLIPModel) -> CLIPTextModel:
    with torch.random.fork_rng():
        encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.eval()


def unclip(
    unet: UNet2DConditionModel,
    normalizer: StableUnCLIPImageNormalizer,
    vae: AutoencoderKL,
    clip: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
) -> UnCLIP:
    """A pipeline that draws picture embeddings of `clip`; its U-Net reads no text."""
    return UnCLIP(
        feature_extractor=None,
        image_encoder=None,
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer,
        text_encoder=text_half(clip),
        unet=unet,
        scheduler=DDIMScheduler(**NOISE),
        vae=vae,
    )


def read_sd(folder: Path) -> StableDiffusionPipeline:
    """argen/emoji-sd."""
    encoder = read_encoder(WEIGHTS / "emoji-clip")
    networks = load_network(UNet2DConditionModel, folder), load_network(AutoencoderKL, WEIGHTS / "emoji-vae")
    return assembled(*networks, encoder.clip, encoder.tokenizer)
