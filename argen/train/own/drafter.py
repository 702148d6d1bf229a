"""`argen train drafter`: the EAGLE drafter of a LlamaGen or a ControlAR, on one's own images, for the samplers "speculative" and "lantern".

The defaults are those of LANTERN's code (github.com/jadohu/LANTERN): AdamW (0.9, 0.95), decay 0.01 of everything, gradients clipped at the value 0.5, noise on
the hidden states that are read, a loss on hidden states and a tenth of one on tokens. That code writes the target's hidden states to disk
first, a megabyte an image; here they are made in the step that needs them.

Letters in shape comments: B samples, T condition positions, N tokens of an image, D width.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argen.models.drafter import Drafter
from argen.models.layers import causal_mask
from argen.models.llamagen import LlamaGen
from argen.pipelines.controlar import ControlARPipeline
from argen.pipelines.llamagen import LlamaGenPipeline
from argen.train.loop import Schedule
from argen.train.own.controlar import ControlARTask, check_control
from argen.train.own.llamagen import LlamaGenTask, with_classes
from argen.train.own.options import OwnOptions
from argen.train.own.run import OwnRecipe
from argen.train.own.start import start_of
from argen.train.own.tokens import AT_ONCE, Examples, check_conditions, examples_of
from argen.train.sources import Source
from samplers.errors import InvalidValue

SCHEDULE = Schedule(
    steps=10_000,
    batch_size=4,
    learning_rate=1e-4,
    warmup=100,
    betas=(0.9, 0.95),
    weight_decay=0.01,
    grad_clip=0.5,
    clip="value",
    ema_decay=0.0,
    decline="linear",
    floor=0.0,
)
NOISE = 0.2 * 512  # range of the noise, of a sequence of one position
ON_TOKENS = 0.1  # weight of the loss on tokens
WIDER = 4  # the feed-forward layer than the network, at most


class DrafterTask(LlamaGenTask):
    """Args:
    pipe: of the target.
    others: see `OwnTokensTask`.
    """

    shards = False

    def __init__(self, pipe: LlamaGenPipeline, examples: Examples, held_out: Examples, options: OwnOptions):
        super().__init__(pipe, examples, held_out, options)
        self.target = pipe.transformer.eval().requires_grad_(False)
        self.networks = {"model": drafter_of(self.target).train()}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Also where the noise of each sample comes from."""
        return super().batch(size, generator) | {"noise": torch.randint(2**62, (size,), generator=generator)}

    def read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Also the noise [B, T + N, D]."""
        shape = self.positions(), self.target.config.dim
        chance = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in batch["noise"].tolist()]
        return super().read(batch) | {"noise": (torch.stack(chance) - 0.5) * NOISE / shape[0]}

    def positions(self) -> int:
        """T + N."""
        by_class = self.target.config.classes is not None
        return (1 if by_class else self.target.config.caption_length) + self.target.length

    @torch.no_grad()
    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """The target's hidden states [B, T + N, D], of condition and tokens."""
        condition, tokens = self.conditioned(batch), batch["tokens"]
        first, after = self.added(batch)
        prefix, scores, prefixes = self.target.condition(self.target.cls_embedding(condition), batch["mask"], first)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        visible = causal_mask(len(positions), len(positions), tokens.device)
        return torch.cat(
            [prefix, self.target.decode(tokens, positions, visible, scores, prefixes, control=after)], dim=1
        )

    def added(self, batch: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What control adds to the stream, see `LlamaGen.condition` and `LlamaGen.decode`."""
        return None, None

    def parts(self, network: nn.Module, hidden: Tensor, noise: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all positions but the first token's, [B, N - 1] each: the smooth L1 distance of the guesses, the cross-entropy of the distribution
        that they lead to, and whether its most probable token is the target's."""
        before = hidden.shape[1] - tokens.shape[1]  # T
        read = hidden + noise
        guesses = network(read[:, :before], read[:, before - 1 : -1], tokens)[:, 1:]
        targets = hidden[:, before + 1 :]
        distance = F.smooth_l1_loss(guesses.float(), targets.float(), reduction="none").mean(dim=-1)
        logits, guessed = (self.target.output(states).float() for states in (targets, guesses))
        surprise = -(logits.softmax(dim=-1) * guessed.log_softmax(dim=-1)).sum(dim=-1)
        return distance, surprise, (logits.argmax(dim=-1) == guessed.argmax(dim=-1)).float()

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        parts = self.parts(self.networks["model"], self.hidden(batch), batch["noise"], batch["tokens"])
        distance, surprise, agreed = (part.mean() for part in parts)
        log |= {"distance": distance.item(), "surprise": surprise.item(), "agreement": agreed.item()}
        yield "model", distance + ON_TOKENS * surprise

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Share of the tokens of held-out images whose most probable value drafter and target agree on."""
        agreed, device = [], self._model().device
        for first in range(0, len(self.held_out), AT_ONCE):
            batch = {key: value.to(device) for key, value in self.held_out_batch(first).items()}
            hidden = self.hidden(batch)
            agreed.append(self.parts(self._model(), hidden, torch.zeros_like(hidden), batch["tokens"])[2])
        return {"held-out agreement": torch.cat(agreed).mean().item()}

    def save(self, folder: Path) -> None:
        """Write the pipeline with its drafter."""
        self.pipe.register_modules(drafter=self._model())
        self.pipe.save_pretrained(folder)


class ControlARDrafterTask(DrafterTask, ControlARTask):
    """The drafter of a ControlAR, which follows control images."""

    def added(self, batch: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """See `DrafterTask.added`: that of the first cell, and that of the cells after each token; the last token has its own."""
        control = self.target.control(batch["control"]).masked_fill(batch["dropped"][None, :, None, None], 0)
        return control[:, :, :1], torch.cat([control[:, :, 1:], control[:, :, -1:]], dim=2)


def drafter_of(target: LlamaGen) -> Drafter:
    """A drafter with random weights, but the target's head as its table of tokens, which stays as it is."""
    config = target.config
    hidden = target.layers[0].feed_forward.w1.weight.shape[0]
    drafter = Drafter(config.n_embed, config.grid, config.dim, config.heads, min(hidden, WIDER * config.dim))
    drafter.embed_tokens.weight.data = target.output.weight.data.clone()
    drafter.embed_tokens.requires_grad_(False)
    return drafter


def prepare(options: OwnOptions, source: Source, held: Source) -> DrafterTask:
    """See `argen.train.own.run.OwnRecipe.prepare`."""
    check_conditions(source)
    if options.init is None:
        raise InvalidValue("a drafter guesses the tokens of a model: give --init a LlamaGen or a ControlAR", "init")
    pipe = start_of(options, source, LlamaGenPipeline, LlamaGen, "LlamaGen", with_classes)
    crops = "ten:1.1" if source.classes is not None else "center"
    task = DrafterTask
    if isinstance(pipe, ControlARPipeline):
        check_control(options)
        task, crops = ControlARDrafterTask, "center"
    return task(pipe, *examples_of(pipe, options, source, held, crops), options)


RECIPE = OwnRecipe(prepare, SCHEDULE)
