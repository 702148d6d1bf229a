"""Trees of drafted tokens: their shapes, and how a drafter grows them.

Papers: "SpecInfer" (arXiv 2305.09781), EAGLE (arXiv 2401.15077), EAGLE-2 (arXiv 2406.16858), DySpec (arXiv 2410.11744).

Letters in shape comments: B images, M nodes of a tree, n tokens of a forward pass, K vocabulary, D width of hidden states, R rows (2B
under guidance).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from pydantic.config import JsonDict
from torch import Tensor

from samplers.errors import InvalidValue
from samplers.logits import Sampling, inverse_transform
from samplers.steps import GuidanceScale, guided


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

    def padded(self, nodes: int) -> "Tree":
        """The same with further children of the root, up to so many nodes: as large as another tree of the batch."""
        return Tree((*self.parents, *[0] * (nodes - len(self.parents))))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, in the order in which they are tried."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], 1):
            children[parent].append(node)
        return tuple(map(tuple, children))

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
        visible = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], 1):
            visible[node] |= visible[parent]
        return visible


@dataclass(frozen=True)
class Drafted:
    """Candidates that were drawn, those of one parent from one distribution.

    Attributes:
        draft_probs: {parent: the drafter's probabilities [K]}.
        proposal_probs: of each node, see `Candidates`.
    """

    draft_probs: dict[int, Tensor]
    proposal_probs: Sequence[float]


@dataclass(frozen=True)
class Draft:
    """Draft of one image: the tree, the tokens of its nodes, and how they were drawn."""

    tree: Tree
    tokens: list[int]
    drafted: Drafted | None


def without_replacement(probs: Tensor, uniforms: Sequence[float]) -> tuple[list[int], list[float]]:
    """Draw as many different tokens as there are `uniforms` from probabilities [K].

    Returns:
        The tokens, and of each its probability given that the earlier ones are out.
    """
    remaining = probs.double().clone()
    tokens, proposal_probs = [], []
    for number in uniforms:
        total = remaining.cumsum(0)
        token = int((total >= number * total[-1]).to(torch.uint8).argmax())
        tokens.append(token)
        proposal_probs.append(float(remaining[token] / total[-1]) if total[-1] > 0 else -1.0)
        remaining[token] = 0
    return tokens, proposal_probs


def of_images(hidden: Tensor, index: Tensor) -> Tensor:
    """Select the hidden states [R, n, D] numbered `index` [B, m] in each image, with and without guidance: [R, m, D]."""
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    return hidden[rows, index.repeat(len(hidden) // len(index), 1).to(hidden.device)]


class Reading(Protocol):
    """A drafter bound to the images of a session. It keeps what it has read of each image."""

    def read(self, tokens: Tensor, cells: Tensor, nodes: Tensor, ahead: Tensor) -> Tensor:
        """Read tokens that were decided, and guess what the target's hidden state after them will be.

        Args:
            tokens, cells: [B, n] int64, `cells` on the CPU: where the tokens stand, one after the other.
            nodes: [B, n] on the CPU, the tokens that led to them, by their number in the target's last forward pass.
            ahead: [B] on the CPU: only so many of the tokens of each image count.

        Returns:
            [R, 1, D].
        """

    def observe(self, tokens: Tensor, logits: Tensor, draft_probs: Tensor) -> None:
        """Learn from a pass of the target over tokens [B, M] (-1 where another image's tree is larger): guided logits and probabilities [B, M, K] of what follows."""


class Drafting(Reading, Protocol):
    """A `Reading` that guesses what the target's hidden states will be, which the shapes here draft from."""

    def guess(self, tokens: Tensor, cells: Tensor, hidden: Tensor, tree: Tensor, root: Tensor) -> Tensor:
        """Read tokens that are drafted themselves.

        Args:
            tokens, cells: as in `read`.
            hidden: [R, n, D], the guesses that led to them.
            tree: [B, n, m] bool, which of the m nodes so far each of the last n sees, beside what was decided before them.
            root: [B], the first cell of that tree.

        Returns:
            [R, n, D], guesses of the hidden states after each of them.
        """

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The target's logits [B, n, K] of hidden states, as `samplers.steps.Session.forward` gives them."""


class Distribution:
    """From logits to the probabilities that are drawn from, the same for drafter and target."""

    def __init__(self, sampling: Sampling, guidance_scale: GuidanceScale):
        self.sampling, self.scale = sampling, guidance_scale
        self.greedy = sampling.temperature == 0

    def __call__(self, conditional: Tensor, unconditional: Tensor | None, cells: Tensor) -> Tensor:
        """Logits [B, n, K] of `cells` [B, n] -> probabilities, as `of_guided` gives them."""
        return self.of_guided(guided(conditional, unconditional, self.scale, cells))

    def of_guided(self, logits: Tensor) -> Tensor:
        """Guided logits [B, n, K] -> probabilities on the CPU; at temperature 0 those of temperature 1."""
        return (logits if self.greedy else self.sampling.filter(logits)).softmax(dim=-1).cpu()

    def draw(self, probs: Tensor, numbers: Iterator[float]) -> int:
        """A token of probabilities [K] by the next of the numbers; at temperature 0 the most probable."""
        if self.greedy:
            return int(probs.argmax())
        return int(inverse_transform(probs, torch.tensor(next(numbers), dtype=torch.float64)))


State = TypeVar("State", bound=Reading, contravariant=True)


@runtime_checkable
class Shape(Protocol[State]):
    """Which tree is drafted, from a `Reading` that its drafter gives: those of this file from a `Drafting`."""

    def grow(
        self,
        drafting: State,
        hidden: Tensor,
        roots: Tensor,
        tokens: Tensor,
        distribution: Distribution,
        numbers: list[Iterator[float]],
    ) -> list[Draft]:
        """Draft for each image.

        Args:
            hidden: [R, 1, D], the guess at the root.
            roots: [B] on the CPU, cells of the roots.
            tokens: [B] of the roots.
            numbers: of each image.
        """


@dataclass(frozen=True)
class StaticTree:
    """A tree of fixed shape: every node's children are drawn without replacement, or are the most probable ones at temperature 0.

    Args:
        paths: see `Tree.of_paths`.
        draws: tokens that are drawn at a node; None for as many as it has children.
    """

    paths: tuple[tuple[int, ...], ...]
    draws: int | None = None

    @cached_property
    def tree(self) -> Tree:
        return Tree.of_paths(self.paths)

    def grow(
        self,
        drafting: Drafting,
        hidden: Tensor,
        roots: Tensor,
        tokens: Tensor,
        distribution: Distribution,
        numbers: list[Iterator[float]],
    ) -> list[Draft]:
        """See `Shape.grow`."""
        tree, batch = self.tree, len(roots)
        drafted = [[int(token)] + [0] * (len(tree.parents) - 1) for token in tokens]
        proposal_probs = [[1.0] * len(tree.parents) for _ in range(batch)]
        draft_probs: list[dict[int, Tensor]] = [{} for _ in range(batch)]
        level, read = [0], []  # nodes with children whose guesses are at hand, and those that the drafter has read
        while level:
            cells = (roots[:, None] + tree.depths[level] + 1).expand(batch, -1)
            rows = distribution(*drafting.logits(hidden), cells)
            for index, node in enumerate(level):
                children = tree.children[node]
                for b in range(batch):
                    draws = self._draw(rows[b, index], len(children), distribution.greedy, numbers[b])
                    draft_probs[b][node] = rows[b, index]
                    for child, token, proposal_prob in zip(children, *draws, strict=False):
                        drafted[b][child], proposal_probs[b][child] = token, proposal_prob
            grown = [child for node in level for child in tree.children[node] if tree.children[child]]
            if not grown:
                break
            read += grown
            above = torch.tensor([level.index(tree.parents[node]) for node in grown])
            visible = tree.mask[grown][:, read].expand(batch, -1, -1)
            fed = torch.tensor([[row[node] for node in grown] for row in drafted], device=hidden.device)
            positions = (roots[:, None] + tree.depths[grown]).expand(batch, -1)
            hidden, level = drafting.guess(fed, positions, hidden[:, above], visible, roots + 1), grown
        drafts = zip(drafted, draft_probs, proposal_probs, strict=True)
        return [
            Draft(tree, row, None if distribution.greedy else Drafted(probs, proposals))
            for row, probs, proposals in drafts
        ]

    def _draw(self, probs: Tensor, count: int, greedy: bool, numbers: Iterator[float]) -> tuple[list[int], list[float]]:
        if greedy:
            return probs.topk(count).indices.tolist(), [1.0] * count
        return without_replacement(probs, [next(numbers) for _ in range(self.draws or count)])


@dataclass(frozen=True)
class IndependentTree(StaticTree):
    """The same with every child drawn independently of its siblings, as `KSeq` wants it."""

    def _draw(self, probs: Tensor, count: int, greedy: bool, numbers: Iterator[float]) -> tuple[list[int], list[float]]:
        if greedy:
            return super()._draw(probs, count, greedy, numbers)
        uniforms = torch.tensor([next(numbers) for _ in range(count)], dtype=torch.float64)
        tokens = inverse_transform(probs.double().expand(count, -1), uniforms)
        return tokens.tolist(), probs[tokens].tolist()


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2's tree (arXiv 2406.16858): grown where the drafter is surest, from its most probable tokens.

    Args:
        nodes: that are kept, without the root.
        depth: levels that are grown after the first.
        width: nodes that are grown on each level, and most probable tokens of each of them.
    """

    nodes: int = 58
    depth: int = 4
    width: int = 10

    @property
    def beam(self) -> int:
        """Nodes that are grown on each level: of `nodes` that are kept, no level has more."""
        return min(self.width, self.nodes)

    @property
    def levels(self) -> int:
        """Levels after the first; a path is not longer than `nodes`."""
        return min(self.depth, self.nodes - 1)

    def grow(
        self,
        drafting: Drafting,
        hidden: Tensor,
        roots: Tensor,
        tokens: Tensor,
        distribution: Distribution,
        numbers: list[Iterator[float]],
    ) -> list[Draft]:
        """See `Shape.grow`; nothing is drawn."""
        batch, width = len(roots), self.beam
        start = distribution(*drafting.logits(hidden), roots[:, None] + 1).log()[:, 0]
        scores, top_tokens = start.topk(width)  # of the beam [B, width]
        pool_scores, pool_tokens = [scores], [top_tokens]
        pool_parents = [torch.full((batch, width), -1)]  # place in the pool, -1 for the root
        beam = torch.arange(width).expand(batch, -1)  # places in the pool
        hidden = hidden.expand(-1, width, -1)
        visible = torch.eye(width, dtype=torch.bool).expand(batch, -1, -1)
        ids, rows = top_tokens, torch.arange(batch)[:, None]
        for level in range(self.levels):
            positions = (roots[:, None] + 1 + level).expand(batch, width)
            out = drafting.guess(ids.to(hidden.device), positions, hidden, visible, roots + 1)
            draft_probs = distribution(*drafting.logits(out), positions + 1).log()
            best, children = draft_probs.topk(width)  # [B, width, width]
            total = (scores[:, :, None] + best).flatten(1)
            pool_parents.append(beam[:, :, None].expand(-1, -1, width).flatten(1))
            first = sum(part.shape[1] for part in pool_scores)
            pool_scores.append(total)
            pool_tokens.append(children.flatten(1))
            scores, top = total.topk(width)
            beam, ids = first + top, children.flatten(1)[rows, top]
            above = top // width
            hidden = of_images(out, above)
            itself = torch.eye(width, dtype=torch.bool).expand(batch, -1, -1)
            visible = torch.cat([visible[:, -width:][rows, above], itself], dim=2)
        order = torch.cat(pool_scores, dim=1).argsort(
            dim=1, descending=True, stable=True
        )  # of equals the parents first
        selected = order[:, : self.nodes].sort().values
        parents, tokens_of = torch.cat(pool_parents, dim=1), torch.cat(pool_tokens, dim=1)
        drafts = []
        for b in range(batch):
            numbers_of = {-1: 0} | {place: index for index, place in enumerate(selected[b].tolist(), 1)}
            above_each = [numbers_of[parent] for parent in parents[b, selected[b]].tolist()]
            drafts.append(Draft(Tree((-1, *above_each)), [int(tokens[b]), *tokens_of[b, selected[b]].tolist()], None))
        return drafts


@dataclass(frozen=True)
class DrawnTree:
    """DySpec's tree (arXiv 2410.11744): candidates are drawn where the drafter's own probabilities promise most.

    The estimated acceptance of a child is that of its parent times its own probability; what remains at a node is its acceptance
    times the probability of all other tokens. Whatever exceeds 1 / `nodes` is drawn, level by level.

    Args:
        nodes: at most, without the root.
        depth: levels at most.
    """

    nodes: int = 16
    depth: int = 6

    def grow(
        self,
        drafting: Drafting,
        hidden: Tensor,
        roots: Tensor,
        tokens: Tensor,
        distribution: Distribution,
        numbers: list[Iterator[float]],
    ) -> list[Draft]:
        """See `Shape.grow`."""
        batch = len(roots)
        grown = [_Growing(int(token)) for token in tokens]
        level = [[0] for _ in range(batch)]  # nodes whose guesses are at hand
        read: list[list[int]] = [[] for _ in range(batch)]  # nodes that the drafter has read
        for depth in range(self.depth):
            cells = (roots[:, None] + depth + 1).expand(batch, hidden.shape[1])
            rows, children = distribution(*drafting.logits(hidden), cells), []
            for b, tree in enumerate(grown):
                draws = [
                    tree.draw(node, rows[b, i], self.nodes, distribution, numbers[b]) for i, node in enumerate(level[b])
                ]
                children.append([child for part in draws for child in part])
            width = max(map(len, children))
            if not width or depth + 1 == self.depth:
                break
            fed, above, visible = [], [], torch.zeros(batch, width, len(read[0]) + width, dtype=torch.bool)
            for b, (tree, part) in enumerate(zip(grown, children, strict=True)):
                idle = width - len(part)  # reads of the root's token, which no node sees
                fed.append([tree.tokens[node] for node in part] + [tree.tokens[0]] * idle)
                above.append([level[b].index(tree.parents[node]) for node in part] + [0] * idle)
                read[b] += part + [0] * idle
                positions = {node: place for place, node in enumerate(read[b])}
                for i in range(width):
                    visible[b, i, len(read[b]) - width + i] = True
                    node = part[i] if i < len(part) else 0
                    while node > 0:
                        visible[b, i, positions[node]] = True
                        node = tree.parents[node]
            led = of_images(hidden, torch.tensor(above))
            where = (roots[:, None] + depth + 1).expand(batch, width)
            hidden = drafting.guess(torch.tensor(fed, device=tokens.device), where, led, visible, roots + 1)
            level = children
        return [tree.draft(distribution.greedy) for tree in grown]


class _Growing:
    """A tree of one image while `DrawnTree` grows it."""

    def __init__(self, token: int):
        self.parents, self.tokens, self.acceptance, self.proposal_probs = [-1], [token], [1.0], [1.0]
        self.draft_probs: dict[int, Tensor] = {}

    def draw(
        self, node: int, probs: Tensor, nodes: int, distribution: Distribution, numbers: Iterator[float]
    ) -> list[int]:
        """The children of a node, drawn without replacement (the most probable ones at temperature 0)."""
        self.draft_probs[node] = probs
        residual, acceptance, children = probs.double().clone(), self.acceptance[node], []
        while acceptance > 1 / nodes and len(self.tokens) <= nodes and residual.sum() > 0:
            residual = residual / residual.sum()
            token = distribution.draw(residual, numbers)
            proposal_prob = float(residual[token])
            children.append(len(self.tokens))
            self.parents.append(node)
            self.tokens.append(token)
            self.acceptance.append(acceptance * proposal_prob)
            self.proposal_probs.append(proposal_prob)
            acceptance *= 1 - proposal_prob
            residual[token] = 0
        return children

    def draft(self, greedy: bool) -> Draft:
        drafted = None if greedy else Drafted(self.draft_probs, self.proposal_probs)
        return Draft(Tree(tuple(self.parents)), self.tokens, drafted)


# Twelve nodes below the root: on two cores a forward pass over them costs less than two over a single token.
SMALL_TREE = StaticTree(
    ((0,), (1,), (2,), (3,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 0, 0, 0))
)
TREES: dict[str, Shape] = {
    "static": SMALL_TREE,
    "dynamic": DynamicTree(12, 3, 4),
    "drawn": DrawnTree(12, 4),
    "independent": IndependentTree(SMALL_TREE.paths),
}
TREE_CHOICES: JsonDict = {"choices": list(TREES)}
TREE = "how drafts branch: static (fixed), dynamic (most probable first), drawn (at random), independent (at random, for k-seq)"
TREE = "how drafts branch: static (fixed), dynamic (most probable first), drawn (at random), independent (at random, for k-seq)"
TREE_OR_SIZES = f"{TREE}; left out, static, or dynamic where nodes, depth or width is given"
NODES, DEPTH, WIDTH = (  # help of the settings that are a tree's sizes
    "how many tokens a dynamic or drawn tree drafts at once",
    "how many tokens ahead a dynamic or drawn tree looks",
    "how many branches a dynamic tree follows at each token",
)
MAX_GROWN = 512  # nodes that are grown in turn, in all levels of a tree
TreeName = Literal["static", "dynamic", "drawn", "independent"]


def tree_of(tree: Shape | str | None, **sizes: int | None) -> Shape:
    """A shape, or the one of a name, with the sizes that are given: `nodes`, `depth` and `width` of a `DynamicTree`, `nodes` and `depth`
    of a `DrawnTree`. None is the static tree, or the dynamic one where a size is given.

    Raises:
        InvalidValue: a size that this shape does not have; a tree that takes too long to grow.
    """
    changed = {name: size for name, size in sizes.items() if size is not None}
    tree = ("dynamic" if changed else "static") if tree is None else tree
    shape: Any = TREES[tree] if isinstance(tree, str) else tree  # those of `TREES` are dataclasses
    for name, size in changed.items():
        if not hasattr(shape, name):
            fitting = [known for known, other in TREES.items() if hasattr(other, name)]
            called = f"the tree {tree}" if isinstance(tree, str) else "this tree"
            raise InvalidValue(
                f"{name} is {size}, which {called} does not have: choose the tree {' or '.join(fitting)}, or leave it out",
                name,
            )
    shape = replace(shape, **changed) if changed else shape
    if isinstance(shape, DynamicTree) and shape.levels * shape.beam > MAX_GROWN:
        raise InvalidValue(
            f"depth is {shape.levels} and width {shape.beam}: expected at most {MAX_GROWN} nodes to grow, their product",
            "depth",
        )
    return shape
