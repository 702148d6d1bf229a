"""The decode loop: a grid of tokens is filled step by step, and every step can be seen, stopped and taken up again.

A sampler drives a `Session` (a network with its prompt and its cache) and yields a `Step` after each pass. It decides
the cells of the grid that are still -1 and keeps the others, so preview, cancel, resume, fork and inpainting are one
loop, called with different grids. Stop iterating to cancel: the last step holds what there is.

Letters in shape comments: B pictures, N cells of a grid (row-major), n tokens of a pass, K vocabulary, R cache rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from samplers.logits import Sampling, draw, guide

START = -1  # the token, and the position, that stands before the first cell


class Session(Protocol):
    """What a discrete generator offers to every sampler: its network, bound to the prompts of B pictures, and a cache.

    Attributes:
        length: N, the cells of one picture.
        cached: entries in the cache, the start token included.
    """

    length: int
    cached: int

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """One pass over n tokens; their keys and values join the cache.

        Args:
            tokens: [B, n] int64, the tokens standing at `positions` (`START` for the start token).
            positions: [n] or [B, n] int64, their cells (`START` for the start token).
            mask: None where each token sees the cache and the tokens up to itself (a chain); else [n, n] bool, which
                of the n new tokens each of them sees beside the cache (a tree; the diagonal is true).

        Returns:
            Logits [B, n, K] for the token that follows each given one, with the prompt and (None where the session has
            no unguided half) without it.
        """

    def keep(self, entries: Tensor) -> None:
        """Rollback: of the cache keep only `entries` ([m] or [B, m] int64, in this order), forget the others."""


@dataclass(frozen=True, slots=True)
class Step:
    """The state after a pass.

    Attributes:
        tokens: [B, N] int64, -1 where nothing is decided yet; a copy that the caller may keep.
        passes: passes of the network so far.
    """

    tokens: Tensor
    passes: int

    @property
    def decided(self) -> int:
        """Cells decided in every picture."""
        return int((self.tokens >= 0).all(dim=0).sum())


GuidanceScale = float | Callable[[int], float]  # one number, or a number for each cell


class Sampler(Protocol):
    """How the undecided cells are filled; `lossless` tells whether the law of the network's own tokens is kept."""

    name: str
    lossless: bool

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, uniforms: Tensor
    ) -> Iterator[Step]: ...


@dataclass(frozen=True)
class Plain:
    """One token a pass, in row-major order."""

    name = "plain"
    lossless = True

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, uniforms: Tensor
    ) -> Iterator[Step]:
        """Fill the cells of `tokens` that are -1.

        Args:
            session: fresh, nothing cached.
            tokens: [B, N] int64, -1 in the cells to fill; not changed.
            uniforms: [B, N] in [0, 1): the number that decides each cell, whatever else is decided in the pass.
        """
        tokens = tokens.clone()
        waiting = [START]  # cells whose tokens the network has not read yet
        passes = 0
        for cell in range(session.length):
            if (tokens[:, cell] >= 0).all():
                waiting.append(cell)
                continue
            logits = next_logits(session, tokens, waiting, guidance_scale, cell)
            drawn = pick(logits, sampling, uniforms[:, cell])
            tokens[:, cell] = torch.where(tokens[:, cell] < 0, drawn.to(tokens.device), tokens[:, cell])
            waiting, passes = [cell], passes + 1
            yield Step(tokens.clone(), passes)


def next_logits(
    session: Session, tokens: Tensor, waiting: list[int], guidance_scale: GuidanceScale, cell: int
) -> Tensor:
    """Let the session read the `waiting` cells; guided float32 logits [B, K] of `cell`."""
    read = torch.stack([tokens[:, c] if c >= 0 else torch.full_like(tokens[:, 0], START) for c in waiting], dim=1)
    conditional, unconditional = session.forward(read, torch.tensor(waiting, device=tokens.device))
    if unconditional is None:
        return conditional[:, -1].float()
    scale = guidance_scale(cell) if callable(guidance_scale) else guidance_scale
    return guide(conditional[:, -1].float(), unconditional[:, -1].float(), scale)


def pick(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """Decide tokens [...] from logits [..., K]: the arg-max at temperature 0, else by `uniforms` [...]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return draw(sampling.filter(logits).softmax(dim=-1), uniforms.to(logits.device))
