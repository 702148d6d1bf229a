"""A training recipe: the table of the generator, learned from images instead of computed."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from argen.data.tables import pixels, read_split
from argen.hub.cards import Card, write_card
from argen.train.loop import Recipe, Schedule, Task
from argen_mosaic.generator import Bigram, MosaicPipeline
from argen_mosaic.tokenizer import Mosaic
from samplers.steps import START
from tokenizers_img.pixels import from_uint8

SCHEDULES = {
    "cpu": Schedule(steps=400, batch_size=32, learning_rate=0.05, warmup=20),
    "gpu": Schedule(steps=400, batch_size=256, learning_rate=0.05, warmup=20),
}


class BigramTask(Task):
    """Args:
    data: folder made by ``argen data emoji``.
    """

    def __init__(self, data: Path):
        self.tokenizer = Mosaic()
        self.tokens, self.held_out = (self.read_split(data, split) for split in ("train", "validation"))
        self.networks = {"model": Bigram()}  # "model" is averaged, evaluated and saved

    def read_split(self, data: Path, split: str) -> Tensor:
        """Ids of the images of a split [N, 64]."""
        images = from_uint8(torch.from_numpy(pixels(read_split(data, split))))
        size = self.tokenizer.config.image_size
        return self.tokenizer.encode(F.interpolate(images, (size, size), mode="area"))

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The ids of `size` images, drawn by the generator alone, so that a run can be resumed."""
        return {"tokens": self.tokens[torch.randint(len(self.tokens), (size,), generator=generator)]}

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        """The cross-entropy of each token after the one before."""
        loss = self.entropy(self.networks["model"], batch["tokens"])
        log["loss"] = loss.item()
        yield "model", loss

    def entropy(self, network: Bigram, tokens: Tensor) -> Tensor:
        before = F.pad(tokens[:, :-1], (1, 0), value=START)
        return F.cross_entropy(network(before).float().flatten(0, 1), tokens.flatten())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The same of held-out images, in nats."""
        model = self._model()
        return {"held-out loss": self.entropy(model, self.held_out.to(model.device)).item()}

    def sample(self) -> Image.Image:
        pipe = MosaicPipeline(self._model(), self.tokenizer)
        pipe.set_progress_bar_config(disable=True)
        return pipe("anything", generator=torch.Generator().manual_seed(0)).images[0]

    def save(self, folder: Path) -> None:
        """Write the network, and a card with which `argen generate --model` finds how to read it."""
        self._model().save_pretrained(folder)
        about, target = "a trained mosaic", "argen_mosaic.generator:read_trained"
        write_card(Card("mosaic/trained", "generator", about, target, grid=True), folder)


RECIPE = Recipe(BigramTask, SCHEDULES)
