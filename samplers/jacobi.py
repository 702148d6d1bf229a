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
    """Guesses several tokens ahead and checks them in one forward pass: the image of one-by-one sampling in fewer passes.

    The tokens are those of `Sequential` with the same noise, up to ties that rounding decides: keep logits in float32.
    """

    window: int = Field(
        default=16,
        ge=1,
        le=MAX_WINDOW,
        description="tokens that are guessed ahead: more save more passes, and make each pass slower",
    )
    name = "jacobi"
    lossless = True

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.steps.Sequential`."""
        batch, length = tokens.shape
        fixed_tokens = tokens.cpu()
        prefix = int((fixed_tokens >= 0).cumprod(dim=1).sum(dim=1).max())
        guesses = _guessed(fixed_tokens, session.columns)  # of every cell; correct before `decided`
        # [B, 1] number of cells from the first on that are decided
        decided, forward_passes = torch.zeros(batch, 1, dtype=torch.int64), 0
        origins = torch.zeros(batch, length, dtype=torch.int8)
        first, n = decided + START, min(length, prefix + self.window)  # the first token that is read, and how many are
        while (decided < length).any():
            positions = first + torch.arange(n)
            read_tokens = guesses.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, START)
            cells = positions + 1
            logits = session.forward(read_tokens.to(tokens.device), positions)
            sampled = pick(guided(*logits, guidance_scale, cells), sampling, noise, cells).cpu()
            guessed, fixed = guesses.gather(1, cells), fixed_tokens.gather(1, cells)
            sampled = torch.where(fixed >= 0, fixed, torch.where(cells < decided, guessed, sampled))
            # guesses that were read, and correct
            num_correct = (sampled == guessed)[:, :-1].cumprod(dim=1).sum(dim=1, keepdim=True)
            before, decided, forward_passes = decided, cells[:, :1] + num_correct + 1, forward_passes + 1
            new = _before(decided, length) & ~_before(before, length) & (fixed_tokens < 0)
            origins[new] = Origin.ACCEPTED
            origins[new & ~_before(decided - 1, length)] = Origin.DRAWN
            guesses = guesses.scatter(1, cells, sampled)
            guesses = _guessed(
                guesses.where(_before(cells[:, -1:] + 1, length) | (fixed_tokens >= 0), -1), session.columns
            )
            yield Step(
                torch.where(_before(decided, length), guesses, fixed_tokens).to(tokens.device),
                forward_passes,
                origins.clone(),
            )
            n = max(1, min(length - 1, self.window + 1))
            first = (decided - 1).clamp(max=length - 1 - n)


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
