"""Rules of acceptance: which of the candidates for one cell is kept, and from which distribution the token is drawn if none is.

Papers: "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), "SpecInfer" (arXiv 2305.09781), SpecTr
(arXiv 2310.15141), grouped speculative decoding (arXiv 2508.07747); LANTERN's rule is in `samplers.lantern`.

Letter in shape comments: K vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic.config import JsonDict
from torch import Tensor


class Raised(NamedTuple):
    """Acceptance criteria of a candidate.

    Attributes:
        likely: its probability under the target's distribution, plus that of its neighbours.
        neighbours: tokens whose probability under the drafter's distribution counts, too.
        rejected_ids: tokens that are rejected with it.
    """

    likely: Tensor
    neighbours: Tensor
    rejected_ids: Tensor


NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Candidates:
    """The children of a node, in the order in which they are tried.

    Attributes:
        nodes, tokens: numbers and tokens of the children.
        probs: the drafter's probabilities [K] that they were drawn from; None where a rule chose them, without chance.
        proposal_probs: of each, its probability under `probs`, given that its earlier siblings are excluded.
    """

    nodes: Sequence[int]
    tokens: Sequence[int]
    probs: Tensor | None
    proposal_probs: Sequence[float]


class Choice(NamedTuple):
    """Outcome for the children of a node.

    Attributes:
        node: the child that is accepted, or None.
        relaxed: the lossless rule would not have accepted it.
        probs: probabilities [K] of the token that is drawn where none is accepted.
    """

    node: int | None
    relaxed: bool
    probs: Tensor


@runtime_checkable
class Rule(Protocol):
    """Acceptance rule for the candidates of a node."""

    lossless: bool

    def choose(self, probs: Tensor, candidates: Candidates, uniforms: Iterator[float], reject_in: str) -> Choice:
        """Choose a child, or none.

        Args:
            probs: the target's probabilities [K]; not changed.
            uniforms: gives a number in [0, 1) for each candidate that is looked at.
            reject_in: see `verify`.
        """


class OneByOne:
    """Candidates are tried in turn, and after each rejection the residual distribution is used (SpecInfer, EAGLE)."""

    def relax(self, probs: Tensor, token: int) -> Raised:
        """Acceptance criteria of a candidate under the target's probabilities [K]."""
        raise NotImplementedError

    def choose(self, probs: Tensor, candidates: Candidates, uniforms: Iterator[float], reject_in: str) -> Choice:
        """See `Rule.choose`."""
        probs = probs.clone()
        earlier: list[int] = []
        tried: set[int] = set()
        for node, token, proposal_prob in zip(
            candidates.nodes, candidates.tokens, candidates.proposal_probs, strict=True
        ):
            if token in tried:
                continue
            tried.add(token)
            number = next(uniforms)
            if proposal_prob <= 0:
                continue
            likely, neighbours, rejected_ids = self.relax(probs, token)
            draft = None
            if candidates.probs is not None:
                draft = candidates.probs.clone()
                draft[earlier] = 0
                draft /= draft.sum()
            if number <= likely / (proposal_prob + (0 if draft is None else draft[neighbours].sum())):
                return Choice(node, bool(number > probs[token] / proposal_prob), probs)
            if draft is None:
                probs[token], probs[rejected_ids] = 0, 0
            else:
                (draft if reject_in == "draft" else probs)[rejected_ids] = 0
                probs = (probs - draft).clamp(min=0)
                earlier.append(token)
            total = probs.sum()
            probs = probs / total if total > 0 else torch.full_like(probs, 1 / len(probs))
        return Choice(None, False, probs)


@dataclass(frozen=True)
class Lossless(OneByOne):
    """A candidate stands for itself alone: tokens follow the target's distribution."""

    lossless = True

    def relax(self, probs: Tensor, token: int) -> Raised:
        """See `OneByOne.relax`."""
        return Raised(probs[token], NONE, NONE)


@dataclass(frozen=True)
class KSeq(Lossless):
    """SpecTr's k-SEQ (arXiv 2310.15141): k candidates that were drawn independently, each kept with its probability over
    rho times the drafter's; lossless."""

    def choose(self, probs: Tensor, candidates: Candidates, uniforms: Iterator[float], reject_in: str) -> Choice:
        """See `Rule.choose`.

        Raises:
            ValueError: candidates that were not drawn, or not independently.
        """
        if candidates.probs is None or any(
            abs(proposal_prob - float(candidates.probs[token])) > 1e-6
            for token, proposal_prob in zip(candidates.tokens, candidates.proposal_probs, strict=True)
        ):
            raise ValueError(
                "the rule k-SEQ is for candidates that are drawn independently: choose the shape IndependentTree"
            )
        count, draft = len(candidates.nodes), candidates.probs
        rho = _rho(probs, draft, count)
        for node, token in zip(candidates.nodes, candidates.tokens, strict=True):
            if next(uniforms) <= probs[token] / (rho * draft[token]):
                return Choice(node, False, probs)
        covered = torch.minimum(draft, probs / rho)
        beta = covered.sum()
        residual = (probs - covered * (1 - (1 - beta) ** count) / beta).clamp(min=0) if beta > 0 else probs
        return Choice(None, False, residual / residual.sum() if residual.sum() > 0 else probs)


def _rho(probs: Tensor, draft: Tensor, count: int) -> float:
    """The least divisor, 1 to `count`, that leaves no token with more than its due."""
    low, high = 1.0, float(count)
    for _ in range(40):
        middle = (low + high) / 2
        beta = float(torch.minimum(draft, probs / middle).sum())
        low, high = (low, middle) if 1 - (1 - beta) ** count <= middle * beta else (middle, high)
    return high


@dataclass(frozen=True)
class Grouped(OneByOne):
    """Grouped speculative decoding (arXiv 2508.07747): a candidate stands for the tokens that are about as likely as it.

    Args:
        side: so many less probable and so many more probable ones, at most.
        near: their probability differs by less than this.
    """

    side: int = 7
    near: float = 0.15
    lossless = False

    def __post_init__(self):
        if self.side < 0 or not 0 <= self.near <= 1:
            raise ValueError(f"side is {self.side} and near {self.near}: expected 0 or more, and 0 to 1")

    def relax(self, probs: Tensor, token: int) -> Raised:
        """See `OneByOne.relax`."""
        prob = probs[token]
        above, below = (probs > prob).nonzero()[:, 0], ((probs <= prob) & (probs > 0)).nonzero()[:, 0]
        below = below[below != token]
        side = [
            probs[above].topk(min(self.side, len(above)), largest=False),
            probs[below].topk(min(self.side, len(below))),
        ]
        group = torch.cat([above[side[0].indices], below[side[1].indices]])
        group = group[(probs[group] - prob).abs() < self.near]
        return Raised(prob + probs[group].sum(), group, NONE)


RULES: dict[str, Rule] = {"lossless": Lossless(), "k-seq": KSeq(), "grouped": Grouped()}
RULE_CHOICES: JsonDict = {"choices": list(RULES)}
RuleName = Literal["lossless", "k-seq", "grouped"]


def rule_of(rule: Rule | str) -> Rule:
    """A rule, or the one of a name."""
    return RULES[rule] if isinstance(rule, str) else rule
