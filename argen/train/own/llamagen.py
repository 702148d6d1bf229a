"""`argen train llamagen`: LlamaGen on classes or captions of one's own images, from nothing or from any LlamaGen.

The defaults are those of the official code (github.com/FoundationVision/LlamaGen, autoregressive/train): AdamW (0.9, 0.95), decay 0.05
of matrices, a constant rate of 1e-4, gradients clipped at norm 1, the condition left out in a tenth of the samples.

Letters in shape comments: B samples, N tokens of an image, T condition positions.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from argen.pipelines.llamagen import LlamaGenPipeline
from argen.train.loop import Schedule, Task

SCHEDULE = Schedule(
    steps=10_000,
    batch_size=256,
    learning_rate=1e-4,
    warmup=0,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    ema_decay=0.9999,
    decline="constant",
    decayed="matrices",
    ema_warmup=False,
)
DROPPED = 0.1  # share of the samples whose condition is left out, for guidance
SHOWN = 16  # images of a sample sheet
AT_ONCE = 32  # held-out images


@dataclass
class Examples:
    """Images as a generator learns them.

    Attributes:
        tokens: [n, crops, N]; of several crops one is drawn.
        conditions: of each image: its class as "class:NAME", or its captions, one of which is drawn.
    """

    tokens: Tensor
    conditions: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.conditions)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over logits [B, N, K] of tokens [B, N], in nats."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class LlamaGenTask(Task):
    """Args:
    pipe: the pipeline whose `transformer` is trained.
    examples, held_out: what is trained on, and what is not.
    dropped: share of the samples whose condition is left out.
    """

    def __init__(self, pipe: LlamaGenPipeline, examples: Examples, held_out: Examples, dropped: float = DROPPED):
        self.pipe, self.examples, self.held_out, self.dropped = pipe, examples, held_out, dropped
        self.networks: dict[str, nn.Module] = {"model": pipe.transformer}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Which images, crops and captions, and whose conditions are left out, [B] each."""
        chance = torch.rand(3, size, generator=generator)
        crops = self.examples.tokens.shape[1]
        return {
            "image": torch.randint(len(self.examples), (size,), generator=generator),
            "crop": (chance[0] * crops).long(),
            "caption": chance[1],
            "dropped": chance[2] < self.dropped,
        }

    def read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens [B, N] and conditions of a drawn batch."""
        tokens = self.examples.tokens[batch["image"], batch["crop"]].long()
        captions = [self.examples.conditions[index] for index in batch["image"].tolist()]
        texts = [own[int(chance * len(own))] for own, chance in zip(captions, batch["caption"].tolist(), strict=True)]
        return {"tokens": tokens, "dropped": batch["dropped"], **self.condition(texts)}

    @torch.no_grad()
    def condition(self, texts: list[str]) -> dict[str, Tensor]:
        """What the network reads of classes or captions: "condition", class ids [B] or text features [B, T, C], and "mask" [B, T]."""
        if self.pipe.transformer.config.classes is not None:
            classes = torch.tensor([self.pipe.class_of(text) for text in texts])
            return {"condition": classes, "mask": torch.ones(len(texts), 1, dtype=torch.bool)}
        features, mask = self.pipe.encode_text(texts)
        return {"condition": features, "mask": mask}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean cross-entropy of tokens [B, N], in nats; a caption that is left out keeps its mask, as in the official code."""
        condition, dropped = batch["condition"], batch["dropped"]
        none = self._model().unconditional(condition)
        condition = torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), none, condition)
        return cross_entropy(network(condition, batch["mask"], batch["tokens"]), batch["tokens"])

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        loss = self.loss(self.networks["model"], batch)
        log["loss"] = loss.item()
        yield "model", loss

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss on held-out images, with their first crop and caption."""
        model, total, device = self._model(), 0.0, self._model().device
        for first in range(0, len(self.held_out), AT_ONCE):
            rows = slice(first, first + AT_ONCE)
            texts = [captions[0] for captions in self.held_out.conditions[rows]]
            batch = {
                "tokens": self.held_out.tokens[rows, 0].long(),
                "dropped": torch.zeros(len(texts), dtype=torch.bool),
            }
            batch = {key: value.to(device) for key, value in (batch | self.condition(texts)).items()}
            total += len(texts) * self.loss(model, batch).item()
        return {"held-out loss": total / len(self.held_out)}

    def sample(self) -> Image.Image:
        """Images of the held-out conditions, four in a row."""
        texts = [captions[0] for captions in self.held_out.conditions][:SHOWN]
        random.Random(0).shuffle(texts)
        self.pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(index) for index in range(len(texts))]
        images = self.pipe(texts, generator=generators, output_type="pt").images.float().cpu()
        missing = torch.ones(-len(images) % 4, *images.shape[1:])
        sheet = rearrange(torch.cat([images, missing]), "(r c) d h w -> (r h) (c w) d", c=4)
        return Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())

    def save(self, folder: Path) -> None:
        """Write a folder that `argen.load` reads."""
        self.pipe.save_pretrained(folder)
