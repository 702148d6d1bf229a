"""Recipe `emoji-seed-encoder`: the picture encoder of `argen/emoji-seed`, which learns to name single pictures."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from argen.data.tables import pixels, read_split
from argen.eval.retrieval import AMONG
from argen.train.judge import settle
from argen.train.loop import Recipe, Schedule, Task
from argen.train.tokens import shares
from tokenizers_img.conv_encoder import ConvEncoder
from tokenizers_img.pixels import from_uint8

SCHEDULES = {
    "cpu": Schedule(steps=3300, batch_size=128, learning_rate=2e-3, warmup=100, weight_decay=0.1),
    "gpu": Schedule(steps=20000, batch_size=512, learning_rate=2e-3, weight_decay=0.05),
}
SIDE = 128  # pixels of the images
DROPOUT, SMOOTHING = 0.2, 0.1
RECOLOURED = 0.1  # of the pictures lose their colours, and as many change them
SETTLING = 30  # batches after which the norms know the averaged weights


def halved(images: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H / 2, W / 2] in [0, 1]."""
    return F.avg_pool2d(from_uint8(images), 2)


def varied(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """[B, 3, S, S] in [0, 1] turned, shrunk or stretched and in other light, by chance; at full strength some lose or change their
    colours, too, and parts are hidden: so that what is seen does not depend on the style."""
    images, device = images.cpu(), images.device

    def chance(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    def about(*shape: int, less: float, more: float) -> Tensor:
        return chance(*shape, low=1 - less * strength, high=1 + more * strength)

    angle, scale = strength * chance(low=-0.25, high=0.25), about(1, less=0.4, more=0.2) * about(2, less=0.1, more=0.1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).unflatten(1, (2, 2))
    places = torch.cat([turn / scale[:, :, None], strength * chance(2, 1, low=-0.12, high=0.12)], dim=2)
    grid = F.affine_grid(places, list(images.shape), align_corners=False)
    out = 1 - F.grid_sample(1 - images, grid, align_corners=False)  # white comes in
    grey = out.mean(dim=1, keepdim=True)
    coloured = (chance(1, 1, 1) > RECOLOURED) | (strength < 1)
    out = grey + (out - grey) * about(1, 1, 1, less=0.5, more=0.4) * coloured
    order = torch.stack([torch.randperm(3, generator=generator) for _ in images])
    order = torch.where(((chance() < RECOLOURED) & (strength >= 1))[:, None], order, torch.arange(3))
    out = out.gather(1, order[:, :, None, None].expand_as(out))
    out = 1 - (1 - out) * about(3, 1, 1, less=0.25, more=0.25)
    out = out.clamp(1e-3, 1) ** about(1, 1, 1, less=0.25, more=0.35)
    if strength >= 1:
        cell = torch.arange(images.shape[-1]) / images.shape[-1]
        down, across = ((cell - chance(1, low=-0.3)).abs() < 0.12 for _ in range(2))
        out = out.masked_fill(down[:, None, :, None] & across[:, None, None, :], 1.0)
    return out.clamp(0, 1).to(device)


class Namer(nn.Module):
    """The encoder, naming what it sees, some of which is hidden from it."""

    def __init__(self, encoder: ConvEncoder):
        super().__init__()
        self.encoder, self.drop = encoder, nn.Dropout(DROPOUT)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 64, 64] in [0, 1] -> logits of the names [B, K]."""
        return self.encoder.head(self.drop(self.encoder.look(2 * images - 1).mean(dim=1)))


class EncoderTask(Task):
    """Args:
    data: folder made by ``argen data emoji``.
    """

    def __init__(self, data: Path):
        table, held_out = read_split(data, "train"), read_split(data, "validation")
        concepts, styles = list(table["concept"]), list(table["style"])
        numbers = {concept: number for number, concept in enumerate(sorted(set(concepts)))}
        self.labels = torch.tensor([numbers[concept] for concept in concepts])
        self.images = halved(torch.from_numpy(pixels(table, SIDE)))
        self.weights = shares(list(zip(concepts, styles, strict=True)))
        rows = [row for row, concept in enumerate(held_out["concept"]) if concept in numbers]
        self.held_out = halved(torch.from_numpy(pixels(held_out, SIDE)))[rows]
        self.held_out_labels = torch.tensor([numbers[held_out["concept"][row]] for row in rows], dtype=torch.long)
        model = Namer(ConvEncoder(names=len(numbers))).to(memory_format=torch.channels_last)
        self.networks: dict[str, nn.Module] = {"model": model}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        indices = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        return {"pixels": varied(self.images[indices], generator), "names": self.labels[indices]}

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        logits = self.networks["model"](batch["pixels"].contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), batch["names"], label_smoothing=SMOOTHING)
        log["loss"] = loss.item()
        yield "model", loss

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Top-1 accuracy of the concept of held-out combinations, among all that were trained and among `AMONG` held-out ones."""
        model = self._model()
        batches = (self.batch(64, torch.Generator().manual_seed(number))["pixels"] for number in range(SETTLING))
        settle(model, batches)
        device = next(model.parameters()).device
        logits = torch.cat([model(part.to(device)).cpu() for part in self.held_out.split(128)])
        correct = logits.gather(1, self.held_out_labels[:, None])
        generator, among = torch.Generator().manual_seed(0), 0
        for score, row, label in zip(correct, logits, self.held_out_labels, strict=True):
            others = self.held_out_labels[self.held_out_labels != label].unique()
            others = others[torch.randperm(len(others), generator=generator)[: AMONG - 1]]
            among += int((row[others] < score).all())
        first, count = int(((logits > correct).sum(dim=1) == 0).sum()), max(1, len(correct))
        return {"named": first / count, f"named among {AMONG}": among / count}

    def sample(self) -> Image.Image:
        """32 pictures of training, as they are seen."""
        images = self.batch(32, torch.Generator().manual_seed(0))["pixels"]
        sheet = rearrange((255 * images).round().to(torch.uint8), "(r c) d h w -> (r h) (c w) d", c=8)
        return Image.fromarray(sheet.numpy())

    def save(self, folder: Path) -> None:
        self._model().encoder.to(torch.bfloat16).save_pretrained(folder)


RECIPE = Recipe(EncoderTask, SCHEDULES)
