"""The decode loop: a grid of tokens is filled step by step, and every step can be seen, stopped and taken up again.

A sampler drives a `Session` (a network with its prompt and its cache) and yields a `Step` after each forward pass. It decides
the cells of the grid that are still -1 and keeps the others, so preview, cancel, resume, fork and inpainting are one
loop, called with different grids. Stop iterating to cancel: the last step holds what there is.

Letters in shape comments: B images, N cells of a grid (row-major), n tokens of a forward pass, K vocabulary, R cache rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from samplers.logits import Noise, Sampling, guide
from samplers.settings import settings

MAX_WINDOW = 16384  # cells
NOT_FINITE = (
    "the network gives numbers that are not finite: its weights are damaged, or too large for float16; load it in another precision, or "
    "fetch it again"
)
START = -1  # the token, and the position, that stands before the first cell


class Session(Protocol):
    """Interface of a discrete generator for samplers: its network, bound to the prompts of B images, and a cache.

    Attributes:
        length: N, the cells of one image.
        columns: cells of a row of its grid.
    """

    length: int
    columns: int

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One forward pass over n tokens; their keys and values join the cache, over what it held from there on.

        Args:
            tokens: [B, n] int64, the tokens standing at `positions` (`START` for the start token).
            positions: [n] or [B, n] int64 on the CPU, their cells (`START` for the start token): of a chain each one more
                than the last, and no more than one behind the cells that are cached.
            mask: None for a chain, in which each token sees all cells up to its own; else [n, n] or, with positions of
                each image, [B, n, n] bool: which of the n tokens each of them sees, beside the cells before the first
                of them (a tree; the diagonal is true).
            seen: [n, N] bool, for cells [n] that are not next to each other: which cells of the image each of them sees,
                itself among them. No `START` among the positions then.

        Returns:
            Logits [B, n, K] for the token that follows each given one, with the prompt and (None where the session has
            no unguided half) without it.
        """

    def keep(self, nodes: Tensor) -> None:
        """Keep the tokens `nodes` of a tree ([m] or [B, m] int64, by their number in the forward pass): they become the chain."""


class Origin(IntEnum):
    """Origin of a cell's token."""

    GIVEN = 0  # or undecided
    DRAWN = 1  # from the network's distribution, in a forward pass that was made for it
    ACCEPTED = 2  # it was guessed, and the network agreed
    RELAXED = 3  # it was guessed, and accepted with the probability of its neighbours only


@dataclass(frozen=True, slots=True)
class Step:
    """The state after a forward pass.

    Attributes:
        tokens: [B, N] int64, -1 where nothing is decided yet; a copy that the caller may keep.
        forward_passes: of the network, so far.
        origins: [B, N] int8 on the CPU, see `Origin`; None where every token was drawn.
        known: cells decided in every image (on average, while others wait), where the sampler knows it without a look at the tokens, for which the CPU would wait for the GPU.
    """

    tokens: Tensor
    forward_passes: int
    origins: Tensor | None = None
    known: int | None = None

    @property
    def decided(self) -> int:
        """Cells decided in every image."""
        return int((self.tokens >= 0).all(dim=0).sum()) if self.known is None else self.known


GuidanceScale = float | Callable[[int], float]  # one number, or a number for each cell


class Sampler(Protocol):
    """Sampler that fills the undecided cells: a class of `samplers.settings.settings`.

    Attributes:
        lossless: whether tokens follow the network's own distribution.
        draws: "latents" where it is a sampler of flows; without it "tokens".
        resumes: "in distribution" where it draws with running random numbers, so that an image that was stopped goes on as another, equally
            probable one; without it "exactly".
        needs: what else a generator must bring, "drafter"; without it nothing.
    """

    @property
    def name(self) -> str: ...

    @property
    def lossless(self) -> bool: ...

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]: ...


@settings
class Sequential:
    """Writes one token in each forward pass of the network, row by row: the reference that the lossless samplers are compared with."""

    name = "sequential"
    lossless = True

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """Fill the cells of `tokens` that are -1.

        Args:
            session: fresh, nothing cached.
            tokens: [B, N] int64, -1 in the cells to fill; not changed.
            noise: what decides each cell.
        """
        tokens = tokens.clone()
        fixed = (tokens >= 0).all(dim=0).tolist()  # the only look at the tokens: the loop does not wait for the device
        waiting = [START]  # cells whose tokens the network has not read yet
        forward_passes, decided = 0, sum(fixed)
        for cell in range(session.length):
            if fixed[cell]:
                waiting.append(cell)
                continue
            logits = next_logits(session, tokens, waiting, guidance_scale, cell)
            sampled = pick(logits, sampling, noise, torch.tensor([cell]))[:, 0]
            tokens[:, cell] = torch.where(tokens[:, cell] < 0, sampled.to(tokens.device), tokens[:, cell])
            waiting, forward_passes, decided = [cell], forward_passes + 1, decided + 1
            yield Step(tokens.clone(), forward_passes, known=decided)


def next_logits(
    session: Session, tokens: Tensor, waiting: list[int], guidance_scale: GuidanceScale, cell: int
) -> Tensor:
    """Let the session read the `waiting` cells; guided float32 logits [B, 1, K] of `cell`."""
    inputs = torch.stack([tokens[:, c] if c >= 0 else torch.full_like(tokens[:, 0], START) for c in waiting], dim=1)
    cond_logits, uncond_logits = session.forward(inputs, torch.tensor(waiting))
    uncond_logits = None if uncond_logits is None else uncond_logits[:, -1:]
    return guided(cond_logits[:, -1:], uncond_logits, guidance_scale, torch.tensor([cell]))


def guided(conditional: Tensor, unconditional: Tensor | None, scale: GuidanceScale, cells: Tensor) -> Tensor:
    """Logits [B, n, K] with and without the prompt -> guided ones, float32, of `cells` ([n] or [B, n]).

    Raises:
        ValueError: the network gives NaN; looked for on a CPU alone, since a GPU would have to be waited for.
    """
    logits = _guided(conditional, unconditional, scale, cells)
    if logits.device.type == "cpu" and logits.isnan().any():
        raise ValueError(NOT_FINITE)
    return logits


def _guided(conditional: Tensor, unconditional: Tensor | None, scale: GuidanceScale, cells: Tensor) -> Tensor:
    if unconditional is None:
        return conditional.float()
    if callable(scale):
        scales = torch.tensor([scale(int(cell)) for cell in cells.flatten()]).reshape(cells.shape)
        by_cell = scales.to(conditional.device, torch.float32)[..., None]
        return guide(conditional.float(), unconditional.float(), by_cell)
    return guide(conditional.float(), unconditional.float(), scale)


def pick(logits: Tensor, sampling: Sampling, noise: Noise, cells: Tensor) -> Tensor:
    """Decide `cells` ([n] or [B, n]) from logits [B, n, K]: tokens [B, n]; the arg-max at temperature 0, else by `noise`."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return noise.draw(sampling.filter(logits), cells)
