"""Speculative Jacobi decoding: the drafts are what the target itself said of these cells in its last pass. No training.

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
from samplers.speculative import Speculative
from samplers.steps import GuidanceScale, Session, Step, check_window
from samplers.trees import Draft, Drafted, Law, Tree


class LastPass:
    """A `samplers.speculative.Drafter`: remembers the laws of the last pass, and what stands in each picture."""

    def begin(self, session: Session) -> "LastPass":
        """See `samplers.speculative.Drafter.begin`."""
        fresh = LastPass()
        fresh.columns, fresh.laws, fresh.left, fresh.written = session.columns, None, None, None
        return fresh

    def read(self, tokens: Tensor, cells: Tensor, nodes: Tensor, ahead: Tensor) -> Tensor:
        """See `samplers.trees.Drafting.read`; the guess is empty."""
        if self.written is None:
            self.written = [{} for _ in tokens]
        for row, (own, where, count) in enumerate(zip(tokens.tolist(), cells.tolist(), ahead.tolist(), strict=True)):
            self.written[row] |= dict(zip(where[:count], own[:count], strict=True))
        self.left = [list(self.laws[row, count:]) for row, count in enumerate(ahead.tolist())]
        return torch.empty(len(tokens), 1, 0)

    def observe(self, tokens: Tensor, logits: Tensor, laws: Tensor) -> None:
        """See `samplers.trees.Drafting.observe`."""
        self.laws = laws


@dataclass(frozen=True)
class Window:
    """A chain of tokens, each drawn from the law that the last pass gave for its cell; where there was none yet, the token
    of the row above (in the first row, the one to the left)."""

    length: int

    def grow(
        self,
        drafting: LastPass,
        hidden: Tensor,
        roots: Tensor,
        tokens: Tensor,
        law: Law,
        numbers: list[Iterator[float]],
    ) -> list[Draft]:
        """See `samplers.trees.Shape.grow`."""
        tree, drafts = Tree((-1, *range(self.length))), []
        for row, (root, token) in enumerate(zip(roots.tolist(), tokens.tolist(), strict=True)):
            found, laws, chances, known = [token], {}, [1.0], dict(drafting.written[row])
            for place in range(self.length):
                cell, given = root + 1 + place, place < len(drafting.left[row])
                if given:
                    one = drafting.left[row][place]
                    guess = law.draw(one, numbers[row])
                else:
                    guess = known.get(cell - drafting.columns, found[-1])
                    one = F.one_hot(torch.tensor(guess), drafting.laws.shape[-1]).float()
                found.append(guess)
                known[cell] = guess
                laws[place] = one
                chances.append(float(one[guess]) if given else 1.0)
            drafts.append(Draft(tree, found, None if law.greedy else Drafted(laws, chances)))
        return drafts


@dataclass(frozen=True)
class SpeculativeJacobi:
    """What is written has the law of `Plain`, though not its tokens; for any generator.

    Args:
        window: cells that are drafted at a time.
        rule: what is accepted.
    """

    window: int = 16
    rule: Rule = Lossless()
    name = "sjd"

    @property
    def lossless(self) -> bool:
        return self.rule.lossless

    def __post_init__(self):
        check_window(self.window)

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.steps.Plain`."""
        sampler = Speculative(Window(self.window), self.rule, drafter=LastPass())
        yield from sampler(session, tokens, sampling, guidance_scale, noise)


@dataclass(frozen=True)
class GroupedJacobi(SpeculativeJacobi):
    """The same with the relaxed rule of grouped speculative decoding: fewer passes, at some loss."""

    rule: Rule = Grouped()
    name = "gsd"
