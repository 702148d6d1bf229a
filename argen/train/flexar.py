"""Recipe `emoji-flextok-ar`: the ordered tokens of `emoji-flextok` after a caption or a group of emoji (arXiv 2604.15453)."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from argen.device import autocast
from argen.models.files import load_network
from argen.models.flexar import FlexAR
from argen.pipelines.flexar import FlexARPipeline
from argen.train.flextok import GUIDANCE, STEPS
from argen.train.loop import Recipe, Schedule
from argen.train.tokens import CaptionsTask, slipped
from tokenizers_img.flextok.network import FlexTok
from tokenizers_img.flextok.tokenizer import FlexTokenizer
from tokenizers_img.pixels import from_uint8

SCHEDULES = {
    "cpu": Schedule(
        steps=4500, batch_size=64, learning_rate=2.5e-3, warmup=120, weight_decay=0.03, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=40000, batch_size=512, learning_rate=1e-3, weight_decay=0.03, betas=(0.9, 0.98)),
}
SIZES = {"dim": 160, "depth": 5, "heads": 5, "hidden": 448, "dropout": 0.1}
NOISE = 0.1  # of the latents: a picture has many sequences, which agree in their first tokens and not in its last ones


class FlexARTask(CaptionsTask):
    """Args:
    vae, flextok: folders of the trained `emoji-vae` and `emoji-flextok`.
    others: see `CaptionsTask`.
    """

    group_share = 0.1

    def __init__(self, data: Path, scenes: Path, vae: Path, flextok: Path, clip: Path):
        self.vae = load_network(AutoencoderKL, vae).requires_grad_(False)
        self.flextok = load_network(FlexTok, flextok).requires_grad_(False)
        super().__init__(data, scenes, clip)
        width = self.clip.config.text_config.hidden_size
        model = FlexAR(self.flextok.fsq.n_embed, self.flextok.config.registers, text_dim=width, **SIZES)
        self.networks: dict[str, nn.Module] = {"model": model}

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 -> latents [B, C, h, w]."""
        tokenizer = FlexTokenizer(self.flextok, self.vae)
        return torch.cat([tokenizer.latents(from_uint8(part)) for part in images.split(64)])

    @torch.no_grad()
    def ids(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> ids [B, N]; in the device's fast precision, which matters less than the noise."""
        with autocast(latents.device):
            return self.flextok.fsq.ids(self.flextok.encode(latents))

    def more(self, tokens: Tensor, images: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Ids of the pictures with a little noise, and those that are read."""
        ids = self.ids(tokens + NOISE * torch.randn(tokens.shape, generator=generator))
        return {"tokens": ids, "read": slipped(ids, generator)}

    def held_out(self, rows: slice) -> dict[str, Tensor]:
        batch = super().held_out(rows)
        ids = self.ids(batch["tokens"])
        return batch | {"tokens": ids, "read": ids}

    def error(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        states, mask = self.encode_text(batch)
        logits = network(states, mask.bool(), batch["read"]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"].flatten(), reduction="none")

    def pipeline(self) -> FlexARPipeline:
        defaults = {"steps": STEPS, "tokenizer_guidance": GUIDANCE}
        return FlexARPipeline(
            self._model(), self.flextok, self.vae, self.clip, self.text_tokenizer, list(self.groups), **defaults
        )


RECIPE = Recipe(FlexARTask, SCHEDULES, takes=("scenes", "vae", "tokenizer", "clip"), tokenizer="emoji-flextok")
