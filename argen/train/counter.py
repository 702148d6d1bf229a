"""Recipe `emoji-counter`: how many things a scene shows, and where, for the count token of `argen.diffusion`."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from argen.data.tables import pixels, read_split
from argen.models.counter import DENSITY, Counter
from argen.train.loop import Recipe, Schedule, Task
from tokenizers_img.pixels import from_uint8

SCHEDULES = {
    "cpu": Schedule(steps=2000, batch_size=64, learning_rate=2e-3, warmup=100, weight_decay=0.01),
    "gpu": Schedule(steps=10000, batch_size=256, learning_rate=2e-3, weight_decay=0.01),
}
SIZE = 128  # pixels on a side of the images
SIGMA = 1.2  # cells, of what one thing becomes
SINGLE_SHARE = 0.15  # of a batch shows icons alone, many of which have several parts
COUNT_WEIGHT = 0.05  # of the error of the sum beside that of the cells, which are scaled up by
SCALE = 20.0


def target(centres: list[tuple[float, float]]) -> Tensor:
    """Middles (x, y) in [0, 1] -> a density [28, 28] with a sum of one for each."""
    cells = torch.arange(DENSITY) + 0.5
    density = torch.zeros(DENSITY, DENSITY)
    for x, y in centres:
        gaussian = torch.outer(*((-0.5 * ((cells - DENSITY * at) / SIGMA).square()).exp() for at in (y, x)))
        density += gaussian / gaussian.sum()
    return density


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 3, S, S] in [0, 1] as generators draw: some soft, with noise and other colours."""
    order = torch.stack([torch.randperm(3, generator=generator) for _ in images])
    images = images.gather(1, order[:, :, None, None].expand_as(images))
    soft = F.interpolate(F.avg_pool2d(images, 4), images.shape[2:], mode="bilinear", align_corners=False)
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = 0.08 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (images.lerp(soft, share) + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


class CounterTask(Task):
    """Args:
    data, scenes: folders made by ``argen data emoji`` and ``argen data scenes``.
    """

    def __init__(self, data: Path, scenes: Path):
        self.singles = torch.from_numpy(pixels(read_split(data, "train"), SIZE))
        self.single = target([(0.5, 0.5)])
        self.scenes, self.targets = self.read_split(scenes, "train")
        self.held_out, self.held_out_targets = self.read_split(scenes, "validation")
        self.networks: dict[str, nn.Module] = {"model": Counter()}

    def read_split(self, scenes: Path, split: str) -> tuple[Tensor, Tensor]:
        """Pictures [N, H, W, 3] uint8 and their densities [N, 28, 28]."""
        table = read_split(scenes, split)
        images, densities = torch.from_numpy(pixels(table, SIZE)), []
        for things in table["objects"]:
            boxes = torch.tensor([thing["box"] for thing in json.loads(things)]) / table[0]["image"].width
            densities.append(target([((a + c) / 2, (b + d) / 2) for a, b, c, d in boxes.tolist()]))
        return images, torch.stack(densities)

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        alone = int(size * SINGLE_SHARE)
        indices = torch.randint(len(self.scenes), (size - alone,), generator=generator)
        single_indices = torch.randint(len(self.singles), (alone,), generator=generator)
        images = from_uint8(torch.cat([self.scenes[indices], self.singles[single_indices]]))
        densities = torch.cat([self.targets[indices], self.single.expand(alone, -1, -1)])
        flip = (torch.rand(size, 1, 1, generator=generator) < 0.5).expand_as(densities)
        densities = torch.where(flip, densities.flip(2), densities)
        images = torch.where(flip[:, None, :1, :1], images.flip(3), images)
        return {"pixels": blurred(images, generator), "density": densities}

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        error = self.networks["model"](batch["pixels"]).float() - batch["density"]
        cells, total = SCALE * error.square().mean(), error.sum(dim=(1, 2)).abs().mean()
        log |= {"cells": cells.item(), "count": total.item()}
        yield "model", cells + COUNT_WEIGHT * total

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean error of the count on held-out scenes, and the share of exact ones after rounding."""
        model = self._model()
        parts = self.held_out.split(64)
        counts = torch.cat([model(from_uint8(part).to(model.device)).float().sum(dim=(1, 2)).cpu() for part in parts])
        targets = self.held_out_targets.sum(dim=(1, 2))
        exact = (counts.round() == targets.round()).float().mean()
        return {"held-out error": (counts - targets).abs().mean().item(), "exact": exact.item()}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """32 held-out scenes, their densities in red."""
        model = self._model()
        images = from_uint8(self.held_out[:: max(1, len(self.held_out) // 32)][:32])
        density = model(images.to(model.device)).float().cpu()[:, None]
        heat = F.interpolate(density, images.shape[2:], mode="nearest").clamp(0, 0.1) * 10
        images = torch.cat([images[:, :1], images[:, 1:] * (1 - heat)], dim=1)
        sheet = torch.cat([torch.cat(list(row), dim=2) for row in images.split(8)], dim=1)
        return Image.fromarray((sheet * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())

    def save(self, folder: Path) -> None:
        self._model().to(torch.bfloat16).save_pretrained(folder)


RECIPE = Recipe(CounterTask, SCHEDULES, takes=("scenes",))
