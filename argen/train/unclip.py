"""Recipe `emoji-seed-decoder`: picture embeddings back to latents of `emoji-vae` (unCLIP, arXiv 2204.06125).

Half of them are those of `emoji-clip`, half what `emoji-seed` makes of a picture's tokens. As `emoji-sd` it knows the 65 things of
`argen.data.scenes.COMMON`, and shows of another picture what is nearest to it among these.
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from torch import Tensor, nn

from argen.data.scenes import COMMON
from argen.models.clip import TextImageEncoder
from argen.models.emoji_diffusion import EMOJI_SEED, NOISE, unclip
from argen.models.files import load_network
from argen.train.loop import Recipe, Schedule
from argen.train.sd import velocity_error
from argen.train.tokens import LatentsTask, paired
from tokenizers_img.conv_encoder import ConvEncoder, TwoEncoders
from tokenizers_img.pixels import from_uint8
from tokenizers_img.seed.network import Seed
from tokenizers_img.seed.tokenizer import SeedTokenizer, UnCLIP

SCHEDULES = {
    "cpu": Schedule(
        steps=3000, batch_size=64, learning_rate=1.2e-3, warmup=150, weight_decay=0.01, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=60000, batch_size=512, learning_rate=4e-4, weight_decay=0.01),
}
UNET = {
    "block_out_channels": (176,),
    "layers_per_block": 1,
    "down_block_types": ("AttnDownBlock2D",),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D",),
    "attention_head_dim": 44,
    "norm_num_groups": 16,
    "class_embed_type": "projection",
}
DROPPED = 0.1  # of the embeddings, so that guidance has something to go away from
DISTURBED = 300  # steps of the noising schedule: embeddings of tokens that were written are never quite right
SAMPLED = {"num_inference_steps": 20, "guidance_scale": 3.0}


class UnCLIPTask(LatentsTask):
    """Args:
    tokenizer: folder of the trained `emoji-seed`.
    others: see `LatentsTask`.
    """

    scenes_share = 0.5
    only = COMMON

    def __init__(self, data: Path, scenes: Path, tokenizer: Path, vae: Path, clip: Path):
        super().__init__(data, scenes, vae, clip)
        seed = load_network(Seed, tokenizer)
        conv = load_network(ConvEncoder, tokenizer / "vision")
        self.seed = SeedTokenizer(seed, TwoEncoders(self.clip.vision_model, conv), **EMOJI_SEED).eval()
        self.seed.requires_grad_(False)
        channels, side = self.image_tokens.shape[1:3]
        width = self.clip.config.projection_dim
        model = UNet2DConditionModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            projection_class_embeddings_input_dim=2 * width,
            cross_attention_dim=width,
            **UNET,
        )
        self.networks: dict[str, nn.Module] = {"model": model.to(memory_format=torch.channels_last)}
        self.noise = DDIMScheduler(**NOISE)
        self.normalizer = StableUnCLIPImageNormalizer(width)
        some = self.clip_embeds(self.images[:: max(1, len(self.images) // 2000)])
        self.normalizer.mean.data, self.normalizer.std.data = some.mean(0, keepdim=True), some.std(0, keepdim=True)
        self.normalizer.requires_grad_(False)
        self.disturbing = self.pipeline().image_noising_scheduler

    @torch.no_grad()
    def clip_embeds(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 -> embeddings by `emoji-clip` [B, E], not normalised."""
        encoder = TextImageEncoder(self.clip, self.text_tokenizer)
        parts = (from_uint8(part) for part in images.split(64))
        return torch.cat([encoder.embed_pixels(part, normalise=False) for part in parts])

    @torch.no_grad()
    def seed_embeds(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 -> embeddings decoded from their tokens [B, E]."""
        parts = (self.seed.encode(from_uint8(part)) for part in images.split(64))
        return torch.cat([self.seed.network.decode(part) for part in parts])

    def more(
        self, tokens: Tensor, images: Tensor | None, scenes: Tensor | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Noise, a time for each picture, and its embedding, of the odd ones by their tokens, with noise of its own; held-out
        pictures come in order."""
        pixels = torch.cat([images, self.scene_images[scenes]]) if images is not None else self.held_out_rows
        times = torch.randint(self.noise.config.num_train_timesteps, (len(tokens),), generator=generator)
        levels = torch.randint(DISTURBED, (len(tokens),), generator=generator)
        embeds = torch.empty(len(pixels), self.clip.config.projection_dim)
        embeds[::2], embeds[1::2] = self.clip_embeds(pixels[::2]), self.seed_embeds(pixels[1::2])
        embeds = self.normalizer.scale(embeds)
        embeds = self.disturbing.add_noise(embeds, torch.randn(embeds.shape, generator=generator), levels)
        embeds = self.normalizer.unscale(embeds)
        level = get_timestep_embedding(levels, embeds.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
        dropped = torch.rand(len(tokens), 1, generator=generator) < DROPPED
        labels = torch.where(dropped, 0.0, torch.cat([embeds, level], dim=1))
        return {"times": times, "noise": torch.randn(tokens.shape, generator=generator), "labels": labels}

    def held_out(self, rows: slice) -> dict[str, Tensor]:
        self.held_out_rows = self.held_out_images[rows]
        return super().held_out(rows)

    def error(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return velocity_error(self.noise, network, batch, None, class_labels=batch["labels"])

    def pipeline(self) -> UnCLIP:
        return unclip(self._model(), self.normalizer, self.vae.vae, self.clip, self.text_tokenizer)

    def sample(self) -> Image.Image:
        """Held-out pictures, and under each what their tokens give."""
        pipe, images = self.pipeline(), self.held_out_images[:: max(1, len(self.held_out_images) // 16)][:16]
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        device = self._model().device
        noise = torch.randn(len(images), *self.image_tokens.shape[1:], generator=generator).to(device)
        kwargs = {"image_embeds": self.seed_embeds(images).to(device), "prompt": [""] * len(images), "latents": noise}
        generated = pipe.to(device)(**kwargs, **SAMPLED, generator=generator, output_type="pt").images.cpu()
        return paired(images, (255 * generated).round().byte().permute(0, 2, 3, 1))

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.normalizer.save_pretrained(folder / "image_normalizer")


RECIPE = Recipe(UnCLIPTask, SCHEDULES, takes=("scenes", "tokenizer", "vae", "clip"), tokenizer="emoji-seed")
