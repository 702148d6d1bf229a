"""Recipe `emoji-xar`: latents of `emoji-vae`, cell by cell, after a caption or a group of emoji (arXiv 2502.20388)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from argen.models.xar import XAR
from argen.pipelines.xar import XARPipeline
from argen.train.loop import Recipe, Schedule
from argen.train.tokens import LatentsTask

SCHEDULES = {
    "cpu": Schedule(
        steps=6000, batch_size=64, learning_rate=2e-3, warmup=150, weight_decay=0.02, betas=(0.9, 0.96), muon=True
    ),
    "gpu": Schedule(steps=60000, batch_size=512, learning_rate=5e-4, weight_decay=0.02, betas=(0.9, 0.96)),
}
SIZES = {"dim": 256, "encoder_depth": 2, "decoder_depth": 3, "heads": 4, "rank": 48}
X = "cell-4"


class XARTask(LatentsTask):
    """Args:
    x: kind and size of the X, see `argen.models.xar.Entities`: "cell-4" (the shipped one); "cell-1" is a token, "cell-8" the whole image.
    others: see `LatentsTask`.

    Raises:
        ValueError: no such X.
    """

    group_share = 0.1

    def __init__(self, data: Path, scenes: Path, vae: Path, clip: Path, x: str | None = None):
        x = x or X
        kind, _, size = x.partition("-")
        if not size.isdigit():
            raise ValueError(f"unknown X {x!r}: expected a kind and a size, as in cell-4, subsample-2 or scale-2")
        self.options = {"x": x}
        super().__init__(data, scenes, vae, clip)
        grid, width = self.image_tokens.shape[-1], self.clip.config.text_config.hidden_size
        model = XAR(
            **SIZES, grid=grid, kind=kind, size=int(size), channels=self.vae.config.latent_channels, caption_dim=width
        )
        self.networks: dict[str, nn.Module] = {"model": model}

    def more(self, tokens: Tensor, images: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise, and a time for each entity."""
        lengths = self._model().entities.lengths
        times = torch.randn(len(tokens), len(lengths), generator=generator).sigmoid()
        return {"times": times, "noise": torch.randn(len(tokens), sum(lengths), tokens.shape[1], generator=generator)}

    def error(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        model = self._model()
        x, noise = model.entities.patchify(batch["tokens"]), batch["noise"]
        times = batch["times"][:, model.entity, None]
        states, mask = self.encode_text(batch)
        prediction = network((1 - times) * x + times * noise, batch["times"], states, mask=mask.bool())
        return (prediction.float() - (noise - x)).square()

    def pipeline(self) -> XARPipeline:
        return XARPipeline(self._model(), self.vae.vae, self.clip, self.text_tokenizer, list(self.groups))


RECIPE = Recipe(XARTask, SCHEDULES, takes=("scenes", "vae", "clip", "x"))
