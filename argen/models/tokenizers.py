"""Image tokenizers out of their folders, as the cards name them; each imports what it alone needs."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from argen.bounds import MAX_SIDE, check
from argen.files import WEIGHTS
from argen.models.files import load_network, read_encoder
from tokenizers_img.hub import hub_folder

if TYPE_CHECKING:
    from tokenizers_img.flextok.tokenizer import FlexTokenizer
    from tokenizers_img.kl_vae import KLVAE
    from tokenizers_img.llamagen_vq import LlamaGenVQ
    from tokenizers_img.seed.tokenizer import SeedTokenizer, UnCLIP
    from tokenizers_img.vit_vqgan import ViTVQGAN

EMOJI_FLOW = {"steps": 12, "guidance_scale": 3.0}  # of emoji-flextok, from tokens to an image
SEED_FILE = "seed_quantizer.pt"
UNCLIP_FILES = (
    "*.json",
    "*/*.json",
    "*/*.txt",
    "text_encoder/model.safetensors",
    "*/diffusion_pytorch_model.safetensors",
    "image_normalizer/*",
)  # without its image encoder, since SEED gives the embeddings of images


def read_vitvqgan(folder: Path, size: str) -> "ViTVQGAN":
    """The released ``.ckpt`` of a folder; `size` is "small" or "base"."""
    from tokenizers_img.vit_vqgan import ViTVQGAN

    files = sorted(folder.glob("*.ckpt"))
    if len(files) != 1:
        raise FileNotFoundError(f"{len(files)} .ckpt files in {folder}: expected one")
    return ViTVQGAN.from_original(files[0], size)


def read_llamagen_vq(folder: Path, name: str) -> "LlamaGenVQ":
    """`name` is that of the released file, e.g. "vq_ds16_c2i"."""
    from tokenizers_img.llamagen_vq import LlamaGenVQ

    stride = int(name.split("_")[1].removeprefix("ds"))
    return LlamaGenVQ.from_original(folder / f"{name}.pt", stride)


def read_saved_vq(folder: Path, image_size: int) -> "LlamaGenVQ":
    """A VQ of LlamaGen as `argen train llamagen-vq` writes it.

    Args:
        image_size: side of the images it was trained at, in pixels.

    Raises:
        ValueError: a size that its stride does not divide.
    """
    from diffusers import VQModel

    from tokenizers_img.llamagen_vq import LlamaGenVQ

    tokenizer = LlamaGenVQ(load_network(VQModel, folder), image_size)
    if not isinstance(image_size, int) or not 0 < image_size <= MAX_SIDE or image_size % tokenizer.stride:
        raise ValueError(f"image_size is {image_size}: expected a multiple of {tokenizer.stride}, at most {MAX_SIDE}")
    return tokenizer


def read_flextok(folder: Path) -> "FlexTokenizer":
    """A released FlexTok, with its configuration beside it."""
    from tokenizers_img.flextok.tokenizer import FlexTokenizer

    return FlexTokenizer.from_original(folder / "model.safetensors")


def read_emoji_flextok(folder: Path) -> "FlexTokenizer":
    """argen/emoji-flextok."""
    from diffusers import AutoencoderKL

    from tokenizers_img.flextok.network import FlexTok
    from tokenizers_img.flextok.tokenizer import FlexTokenizer

    return FlexTokenizer(
        load_network(FlexTok, folder), load_network(AutoencoderKL, WEIGHTS / "emoji-vae"), **EMOJI_FLOW
    )


def read_saved_flextok(folder: Path, steps: int, guidance_scale: float) -> "FlexTokenizer":
    """A FlexTok as `argen train flextok` writes it, its VAE in the folder `vae`.

    Args:
        steps, guidance_scale: of its flow, from tokens to an image.

    Raises:
        ValueError: one of them is out of bounds.
    """
    from diffusers import AutoencoderKL

    from tokenizers_img.flextok.network import FlexTok
    from tokenizers_img.flextok.tokenizer import FlexTokenizer

    check("steps", steps)
    check("guidance_scale", guidance_scale)
    vae = load_network(AutoencoderKL, folder / "vae")
    return FlexTokenizer(load_network(FlexTok, folder), vae, steps, guidance_scale)


def read_vae(folder: Path) -> "KLVAE":
    """A VAE in diffusers' layout."""
    from diffusers import AutoencoderKL

    from tokenizers_img.kl_vae import KLVAE

    return KLVAE(load_network(AutoencoderKL, folder))


def read_kl16(folder: Path) -> "KLVAE":
    """The released KL-16."""
    from tokenizers_img.kl_vae import KLVAE

    return KLVAE.from_original(folder / "kl16.ckpt")


def read_seed(folder: Path) -> "SeedTokenizer":
    """The released SEED-2; its vision transformer may lie beside the file."""
    from tokenizers_img.seed import checkpoint
    from tokenizers_img.seed.tokenizer import SeedTokenizer

    vision = folder / "eva_vit_g.pth"
    vision = vision if vision.is_file() else checkpoint.eva_file()
    network, encoder = checkpoint.from_original(folder / SEED_FILE, vision)
    return SeedTokenizer(network, encoder, _published_unclip)


def read_emoji_seed(folder: Path) -> "SeedTokenizer":
    """argen/emoji-seed."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    from argen.models.emoji_diffusion import EMOJI_SEED, unclip
    from tokenizers_img.conv_encoder import ConvEncoder, TwoEncoders
    from tokenizers_img.seed.network import Seed
    from tokenizers_img.seed.tokenizer import SeedTokenizer

    encoder = read_encoder(WEIGHTS / "emoji-clip")
    decoder = unclip(
        load_network(UNet2DConditionModel, folder / "unet"),
        load_network(StableUnCLIPImageNormalizer, folder / "image_normalizer"),
        load_network(AutoencoderKL, WEIGHTS / "emoji-vae"),
        encoder.clip,
        encoder.tokenizer,
    )
    vision = TwoEncoders(encoder.clip.vision_model, load_network(ConvEncoder, folder / "vision"))
    return SeedTokenizer(load_network(Seed, folder), vision, decoder, **EMOJI_SEED)


def read_saved_seed(folder: Path) -> "SeedTokenizer":
    """A SEED that was saved with its language model."""
    from tokenizers_img.seed.tokenizer import SeedTokenizer

    return SeedTokenizer.from_pretrained(folder, _published_unclip)


def _published_unclip() -> "UnCLIP":
    from tokenizers_img.seed.tokenizer import UnCLIP, unclip_repository

    folder, unread = hub_folder(unclip_repository(), UNCLIP_FILES), {"feature_extractor": None, "image_encoder": None}
    return UnCLIP.from_pretrained(folder, torch_dtype=torch.float32, **unread)
