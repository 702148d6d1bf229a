"""Speculative Jacobi decoding: drafts are drawn from the target's own distributions of its last forward pass. No training.

Paper: "Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding"
(arXiv 2410.01699).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from samplers.logits import Noise, Sampling
from samplers.rules import Grouped, Lossless, Rule
from samplers.settings import Field, settings
from samplers.speculative import Speculative
from samplers.steps import MAX_WINDOW, GuidanceScale, Session, Step
from samplers.trees import Distribution, Draft, Drafted, Tree


class LastPass:
    """A `samplers.speculative.Drafter`: remembers the distributions of the last forward pass, and the tokens of each image."""

    columns: int
    probs: Tensor  # [B, n, K]
    left: list[list[Tensor]]  # those of the cells that were not accepted
    written: list[dict[int, int]]  # cell -> token

    def begin(self, session: Session) -> "LastPass":
        """See `samplers.speculative.Drafter.begin`."""
        fresh = LastPass()
        fresh.columns, fresh.written = session.columns, []
        return fresh

    def read(self, tokens: Tensor, cells: Tensor, nodes: Tensor, ahead: Tensor) -> Tensor:
        """See `samplers.trees.Drafting.read`; the guess is empty."""
        self.written = self.written or [{} for _ in tokens]
        for row, (ids, where, count) in enumerate(zip(tokens.tolist(), cells.tolist(), ahead.tolist(), strict=True)):
            self.written[row] |= dict(zip(where[:count], ids[:count], strict=True))
        self.unused_probs = [list(self.probs[row, count:]) for row, count in enumerate(ahead.tolist())]
        return torch.empty(len(tokens), 1, 0)

    def observe(self, tokens: Tensor, logits: Tensor, probs: Tensor) -> None:
        """See `samplers.trees.Drafting.observe`."""
        self.probs = probs


@dataclass(frozen=True)
class Window:
    """A chain of tokens, each drawn from the distribution that the last forward pass gave for its cell; where there was none yet, the token
    of the row above (in the first row, the one to the left)."""

    length: int

    def grow(
        self,
        drafting: LastPass,
        hidden: Tensor,
        roots: Tensor,
        tokens: Tensor,
        distribution: Distribution,
        numbers: list[Iterator[float]],
    ) -> list[Draft]:
        """See `samplers.trees.Shape.grow`."""
        tree, drafts = Tree((-1, *range(self.length))), []
        for row, (root, token) in enumerate(zip(roots.tolist(), tokens.tolist(), strict=True)):
            guesses, proposal_probs, written = [token], [1.0], dict(drafting.written[row])
            probs: dict[int, Tensor] = {}
            for offset in range(self.length):
                cell, has_draft = root + 1 + offset, offset < len(drafting.unused_probs[row])
                if has_draft:
                    draft_probs = drafting.unused_probs[row][offset]
                    guess = distribution.draw(draft_probs, numbers[row])
                else:
                    guess = written.get(cell - drafting.columns, guesses[-1])
                    draft_probs = F.one_hot(torch.tensor(guess), drafting.probs.shape[-1]).float()
                guesses.append(guess)
                written[cell] = guess
                probs[offset] = draft_probs
                proposal_probs.append(float(draft_probs[guess]) if has_draft else 1.0)
            drafts.append(Draft(tree, guesses, None if distribution.greedy else Drafted(probs, proposal_probs)))
        return drafts


@settings
class SpeculativeJacobi:
    """Drafts several tokens ahead from the last forward pass and keeps those that a random test accepts (speculative Jacobi decoding): fewer
    passes, other images than one by one, equally probable ones."""

    window: int = Field(
        default=16,
        ge=1,
        le=MAX_WINDOW,
        description="tokens that are drafted ahead: more save more passes, and make each pass slower",
    )
    name = "sjd"
    resumes = "in distribution"
    lossless = True

    @property
    def rule(self) -> Rule:
        return Lossless()

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.steps.Sequential`."""
        sampler = Speculative(Window(self.window), self.rule, drafter=LastPass())
        yield from sampler(session, tokens, sampling, guidance_scale, noise)


@settings
class GroupedJacobi(SpeculativeJacobi):
    """Drafts several tokens ahead from the last forward pass, and also accepts a draft that is about as probable as what would be drawn (grouped
    speculative decoding): still fewer passes, at some loss of quality."""

    side: int = Field(
        default=7,
        ge=0,
        le=1024,
        description="how many tokens on each side, in the order of their probabilities, count as interchangeable with one, at most",
    )
    near: float = Field(
        default=0.15, ge=0, le=1, description="how far the probabilities of interchangeable tokens may differ"
    )
    name = "gsd"
    lossless = False

    @property
    def rule(self) -> Rule:
        return Grouped(self.side, self.near)
