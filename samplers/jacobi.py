"""Jacobi decoding with fixed noise: the tokens of the sequential sampler in fewer forward passes, for any generator and without training.

With the noise of every cell fixed beforehand, each token is a function of the tokens before it. A window of guesses is put
through that function at once, again and again; from its left end on, what was guessed right is what the sequential sampler writes.
Papers: "Predictive Sampling with Forecasting Autoregressive Models" (arXiv 2002.09928), "Accelerating Auto-regressive
Text-to-Image Generation with Training-free Speculative Jacobi Decoding" (arXiv 2410.01699).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from samplers.logits import Noise, Sampling
from samplers.settings import Field, settings
from samplers.steps import MAX_WINDOW, START, GuidanceScale, Origin, Session, Step, guided, pick


@settings
class Jacobi:
    """Exactly the image of `Sequential` with the same noise (up to ties that rounding decides: keep logits in float32)."""

    window: int = Field(default=16, ge=1, le=MAX_WINDOW, description="cells that are guessed at a time")
    name = "jacobi"
    lossless = True

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.steps.Sequential`."""
        batch, length = tokens.shape
        given = tokens.cpu()
        prefix = int((given >= 0).cumprod(dim=1).sum(dim=1).max())
        guesses = _guessed(given, session.columns)  # of every cell; right before `known`
        known, forward_passes = (
            torch.zeros(batch, 1, dtype=torch.int64),
            0,
        )  # [B, 1] cells from the first on that are decided
        origins = torch.zeros(batch, length, dtype=torch.int8)
        first, n = known + START, min(length, prefix + self.window)  # the first token that is read, and how many are
        while (known < length).any():
            positions = first + torch.arange(n)
            read = guesses.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, START)
            cells = positions + 1
            logits = session.forward(read.to(tokens.device), positions)
            drawn = pick(guided(*logits, guidance_scale, cells), sampling, noise, cells).cpu()
            guessed, fixed = guesses.gather(1, cells), given.gather(1, cells)
            drawn = torch.where(fixed >= 0, fixed, torch.where(cells < known, guessed, drawn))
            right = (
                (drawn == guessed)[:, :-1].cumprod(dim=1).sum(dim=1, keepdim=True)
            )  # guesses that were read, and right
            before, known, forward_passes = known, cells[:, :1] + right + 1, forward_passes + 1
            new = _before(known, length) & ~_before(before, length) & (given < 0)
            origins[new] = Origin.ACCEPTED
            origins[new & ~_before(known - 1, length)] = Origin.DRAWN
            guesses = guesses.scatter(1, cells, drawn)
            guesses = _guessed(guesses.where(_before(cells[:, -1:] + 1, length) | (given >= 0), -1), session.columns)
            yield Step(
                torch.where(_before(known, length), guesses, given).to(tokens.device), forward_passes, origins.clone()
            )
            n = max(1, min(length - 1, self.window + 1))
            first = (known - 1).clamp(max=length - 1 - n)


def _before(cells: Tensor, length: int) -> Tensor:
    """[B, 1] -> [B, length] bool: the cells before."""
    return torch.arange(length) < cells


def _guessed(tokens: Tensor, columns: int) -> Tensor:
    """Fill the cells of [B, N] that are -1: with the token above, in the first row with that to the left, first of all 0."""
    tokens = tokens.clone()
    for cell in range(tokens.shape[1]):
        source = tokens[:, cell - columns] if cell >= columns else tokens[:, cell - 1] if cell else tokens[:, 0] * 0
        tokens[:, cell] = torch.where(tokens[:, cell] < 0, source, tokens[:, cell])
    return tokens
