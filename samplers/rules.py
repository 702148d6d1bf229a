"""Rules of acceptance: which of the candidates for one cell is kept, and from which law the token is drawn if none is.

Papers: "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), "SpecInfer" (arXiv 2305.09781), SpecTr
(arXiv 2310.15141), grouped speculative decoding (arXiv 2508.07747); LANTERN's rule is in `samplers.lantern`.

Letter in shape comments: K vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Raised(NamedTuple):
    """What a candidate is judged by.

    Attributes:
        likely: its probability under the target's law, raised by what others lend it.
        lenders: those whose probability under the drafter's law counts, too.
        falling: those that fall with it when it is rejected.
    """

    likely: Tensor
    lenders: Tensor
    falling: Tensor


NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Candidates:
    """The children of a node, in the order in which they are tried.

    Attributes:
        nodes, tokens: numbers and tokens of the children.
        law: the drafter's probabilities [K] that they were drawn from; None where a rule chose them, without chance.
        chances: of each, its probability under that law, given that its elder siblings are out of it.
    """

    nodes: Sequence[int]
    tokens: Sequence[int]
    law: Tensor | None
    chances: Sequence[float]


class Choice(NamedTuple):
    """What became of the children of a node.

    Attributes:
        node: the child that is kept, or None.
        relaxed: the plain rule would not have kept it.
        law: probabilities [K] of the token that is drawn where none is kept.
    """

    node: int | None
    relaxed: bool
    law: Tensor


class Rule(Protocol):
    """Which candidate is kept."""

    lossless: bool

    def choose(self, law: Tensor, candidates: Candidates, uniforms: Iterator[float], wipe: str) -> Choice:
        """Choose a child, or none.

        Args:
            law: the target's probabilities [K]; not changed.
            uniforms: gives a number in [0, 1) for each candidate that is looked at.
            wipe: see `verify`.
        """


class OneByOne:
    """Candidates are tried in turn, and after each rejection the law is that of what is left (SpecInfer, EAGLE)."""

    def relax(self, law: Tensor, token: int) -> Raised:
        """How a candidate is judged under the target's probabilities [K]."""
        raise NotImplementedError

    def choose(self, law: Tensor, candidates: Candidates, uniforms: Iterator[float], wipe: str) -> Choice:
        """See `Rule.choose`."""
        law, elder, tried = law.clone(), [], set()
        for node, token, chance in zip(candidates.nodes, candidates.tokens, candidates.chances, strict=True):
            if token in tried:
                continue
            tried.add(token)
            number = next(uniforms)
            if chance <= 0:
                continue
            likely, lenders, falling = self.relax(law, token)
            draft = None
            if candidates.law is not None:
                draft = candidates.law.clone()
                draft[elder] = 0
                draft /= draft.sum()
            if number <= likely / (chance + (0 if draft is None else draft[lenders].sum())):
                return Choice(node, bool(number > law[token] / chance), law)
            if draft is None:
                law[token], law[falling] = 0, 0
            else:
                (draft if wipe == "draft" else law)[falling] = 0
                law = (law - draft).clamp(min=0)
                elder.append(token)
            total = law.sum()
            law = law / total if total > 0 else torch.full_like(law, 1 / len(law))
        return Choice(None, False, law)


@dataclass(frozen=True)
class Lossless(OneByOne):
    """A candidate stands for itself alone: the law of what is written is the target's."""

    lossless = True

    def relax(self, law: Tensor, token: int) -> Raised:
        """See `OneByOne.relax`."""
        return Raised(law[token], NONE, NONE)


@dataclass(frozen=True)
class KSeq(Lossless):
    """SpecTr's k-SEQ (arXiv 2310.15141): k candidates that were drawn independently, each kept with its probability over
    rho times the drafter's; lossless."""

    def choose(self, law: Tensor, candidates: Candidates, uniforms: Iterator[float], wipe: str) -> Choice:
        """See `Rule.choose`.

        Raises:
            ValueError: candidates that were not drawn, or not independently.
        """
        if candidates.law is None or any(
            abs(chance - float(candidates.law[token])) > 1e-6
            for token, chance in zip(candidates.tokens, candidates.chances, strict=True)
        ):
            raise ValueError(
                "the rule k-SEQ is for candidates that are drawn independently: choose the shape IndependentTree"
            )
        count, draft = len(candidates.nodes), candidates.law
        rho = _rho(law, draft, count)
        for node, token in zip(candidates.nodes, candidates.tokens, strict=True):
            if next(uniforms) <= law[token] / (rho * draft[token]):
                return Choice(node, False, law)
        covered = torch.minimum(draft, law / rho)
        beta = covered.sum()
        left = (law - covered * (1 - (1 - beta) ** count) / beta).clamp(min=0) if beta > 0 else law
        return Choice(None, False, left / left.sum() if left.sum() > 0 else law)


def _rho(law: Tensor, draft: Tensor, count: int) -> float:
    """The least divisor, 1 to `count`, that leaves no token with more than its due."""
    low, high = 1.0, float(count)
    for _ in range(40):
        middle = (low + high) / 2
        beta = float(torch.minimum(draft, law / middle).sum())
        low, high = (low, middle) if 1 - (1 - beta) ** count <= middle * beta else (middle, high)
    return high


@dataclass(frozen=True)
class Grouped(OneByOne):
    """Grouped speculative decoding (arXiv 2508.07747): a candidate stands for the tokens that are about as likely as it.

    Args:
        side: so many less likely ones and so many likelier ones, at most.
        near: their probability differs by less than this.
    """

    side: int = 7
    near: float = 0.15
    lossless = False

    def __post_init__(self):
        if self.side < 0 or not 0 <= self.near <= 1:
            raise ValueError(f"side is {self.side} and near {self.near}: expected 0 or more, and 0 to 1")

    def relax(self, law: Tensor, token: int) -> Raised:
        """See `OneByOne.relax`."""
        own = law[token]
        above, below = (law > own).nonzero()[:, 0], ((law <= own) & (law > 0)).nonzero()[:, 0]
        below = below[below != token]
        side = [law[above].topk(min(self.side, len(above)), largest=False), law[below].topk(min(self.side, len(below)))]
        group = torch.cat([above[side[0].indices], below[side[1].indices]])
        group = group[(law[group] - own).abs() < self.near]
        return Raised(own + law[group].sum(), group, NONE)
