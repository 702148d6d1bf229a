"""Verification of drafted tokens: which of a tree's tokens the target keeps, and from which law the next one is drawn.

Papers: "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), "SpecInfer" (arXiv 2305.09781, trees of
candidates drawn without replacement), "EAGLE" (arXiv 2401.15077).

Letters in shape comments: M nodes of a tree, K vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """Drafted continuations of one token, the root, which is decided already.

    Args:
        parents: of each node, every one after its parent; -1 for node 0, the root.
    """

    parents: tuple[int, ...]

    @classmethod
    def of_paths(cls, paths: Sequence[Sequence[int]]) -> "Tree":
        """Paths of child numbers from the root, one for each node but the root; every prefix of a path is a path."""
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        numbers = {(): 0} | {path: index for index, path in enumerate(ordered, 1)}
        return cls((-1, *(numbers[path[:-1]] for path in ordered)))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Of each node, in the order in which they are tried."""
        found: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], 1):
            found[parent].append(node)
        return tuple(map(tuple, found))

    @cached_property
    def depths(self) -> Tensor:
        """[M] int64; the root has 0."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return torch.tensor(depths)

    @cached_property
    def mask(self) -> Tensor:
        """[M, M] bool: each node sees its ancestors and itself."""
        seen = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], 1):
            seen[node] |= seen[parent]
        return seen


class Rule(Protocol):
    """Whether a candidate is kept, and what its rejection says about the others.

    The plain rule (`Lossless`) keeps the target's law exactly; others relax it.
    """

    lossless: bool

    def relax(self, law: Tensor, token: int) -> tuple[Tensor, Tensor]:
        """What a candidate is judged by.

        Args:
            law: the target's probabilities [K].

        Returns:
            Its probability, raised by what others lend it; the tokens that fall with it when it is rejected.
        """


@dataclass(frozen=True)
class Lossless:
    """A candidate stands for itself alone: the law of what is written is the target's."""

    lossless = True

    def relax(self, law: Tensor, token: int) -> tuple[Tensor, Tensor]:
        """See `Rule.relax`."""
        return law[token], torch.empty(0, dtype=torch.int64, device=law.device)


@dataclass(frozen=True)
class Drafted:
    """Candidates that were drawn: without replacement, those of one parent from one law.

    Attributes:
        laws: {parent: the drafter's probabilities [K]}.
        chances: of each node, its probability under that law, given that its elder siblings are out of it.
    """

    laws: dict[int, Tensor]
    chances: Sequence[float]


def verify(
    laws: Tensor,
    tree: Tree,
    tokens: Sequence[int],
    rule: Rule,
    uniforms: Iterator[float],
    drafted: Drafted | None = None,
    wipe: str = "draft",
) -> tuple[list[int], Tensor]:
    """Walk down the tree, keeping at each node the first child that is accepted.

    Args:
        laws: the target's probabilities [M, K] of what follows each node.
        tokens: of each node.
        uniforms: gives a number in [0, 1) for each candidate that is looked at.
        drafted: None for candidates that a rule chose (as the likeliest ones), without chance.
        wipe: with `drafted`, what falls with a rejected candidate: its neighbours in the "draft" law, or in the "target"'s.

    Returns:
        The nodes that are kept, the root first; the probabilities [K] of the token after the last of them.
    """
    node, kept = 0, [0]
    while True:
        law, elder = laws[node].clone(), []
        for child in tree.children[node]:
            token, number = tokens[child], next(uniforms)
            chance = 1.0 if drafted is None else drafted.chances[child]
            if chance <= 0:
                continue
            likely, falling = rule.relax(law, token)
            if number <= likely / chance:
                break
            if drafted is None:
                law[token], law[falling] = 0, 0
            else:
                draft = drafted.laws[node].clone()
                draft[elder] = 0
                draft /= draft.sum()
                (draft if wipe == "draft" else law)[falling] = 0
                law = (law - draft).clamp(min=0)
                elder.append(token)
            total = law.sum()
            law = law / total if total > 0 else torch.full_like(law, 1 / len(law))
        else:
            return kept, law
        node = child
        kept.append(node)


def verify_greedy(laws: Tensor, tree: Tree, tokens: Sequence[int], rule: Rule) -> list[int]:
    """Keep the longest path of which every token is the likeliest once the rule has raised it; the first one of several.

    Args:
        laws: the target's probabilities [M, K], at temperature 1.

    Returns:
        The nodes that are kept, the root first.
    """
    best: list[int] = []

    def walk(path: list[int]) -> None:
        nonlocal best
        best = path if len(path) > len(best) else best
        for child in tree.children[path[-1]]:
            law = laws[path[-1]].clone()
            law[tokens[child]] = rule.relax(law, tokens[child])[0]
            if int(law.argmax()) == tokens[child]:
                walk([*path, child])

    walk([0])
    return best


def without_replacement(law: Tensor, uniforms: Sequence[float]) -> tuple[list[int], list[float]]:
    """Draw as many different tokens as there are `uniforms` from probabilities [K].

    Returns:
        The tokens, and of each its probability given that the earlier ones are out.
    """
    left = law.double().clone()
    tokens, chances = [], []
    for number in uniforms:
        total = left.cumsum(0)
        token = int((total >= number * total[-1]).to(torch.uint8).argmax())
        tokens.append(token)
        chances.append(float(left[token] / total[-1]) if total[-1] > 0 else -1.0)
        left[token] = 0
    return tokens, chances
