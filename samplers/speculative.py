"""Verification of drafted tokens: which of a tree's tokens the target keeps, and from which law the next one is drawn.

Papers: "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192), "SpecInfer" (arXiv 2305.09781), EAGLE
(arXiv 2401.15077), EAGLE-2 (arXiv 2406.16858).

Letters in shape comments: B pictures, N cells, M nodes of a tree, n tokens of a pass, K vocabulary, D width of hidden states, R
rows (2B under guidance).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from samplers.logits import Noise, Sampling, inverse_transform
from samplers.steps import START, GuidanceScale, Origin, Session, Step, guided


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


class Verdict(NamedTuple):
    """What is kept of a tree.

    Attributes:
        kept: nodes, the root first.
        law: probabilities [K] of the token after the last of them.
        relaxed: those of the nodes that the plain rule would not have kept.
    """

    kept: list[int]
    law: Tensor
    relaxed: set[int]


def verify(
    laws: Tensor,
    tree: Tree,
    tokens: Sequence[int],
    rule: Rule,
    uniforms: Iterator[float],
    drafted: Drafted | None = None,
    wipe: str = "draft",
) -> Verdict:
    """Walk down the tree, keeping at each node the first child that is accepted.

    Args:
        laws: the target's probabilities [M, K] of what follows each node.
        tokens: of each node.
        uniforms: gives a number in [0, 1) for each candidate that is looked at.
        drafted: None for candidates that a rule chose (as the likeliest ones), without chance.
        wipe: with `drafted`, what falls with a rejected candidate: its neighbours in the "draft" law, or in the "target"'s.
    """
    node, kept, relaxed = 0, [0], set()
    while True:
        law, elder, tried = laws[node].clone(), [], set()
        for child in tree.children[node]:
            token = tokens[child]
            if token in tried:
                continue
            tried.add(token)
            number = next(uniforms)
            chance = 1.0 if drafted is None else drafted.chances[child]
            if chance <= 0:
                continue
            likely, falling = rule.relax(law, token)
            if number <= likely / chance:
                relaxed |= {child} if number > law[token] / chance else set()
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
            return Verdict(kept, law, relaxed)
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


class Drafting(Protocol):
    """A drafter bound to the pictures of a session. It keeps what it has read of each picture."""

    def read(self, tokens: Tensor, cells: Tensor, nodes: Tensor, ahead: Tensor) -> Tensor:
        """Read tokens that were decided, and guess what the target's hidden state after them will be.

        Args:
            tokens, cells: [B, n] int64, `cells` on the CPU: where the tokens stand, one after the other.
            nodes: [B, n] on the CPU, the tokens that led to them, by their number in the target's last pass.
            ahead: [B] on the CPU: only so many of the tokens of each picture count.

        Returns:
            [R, 1, D].
        """

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

    def observe(self, tokens: Tensor, logits: Tensor, laws: Tensor) -> None:
        """Learn from a pass of the target over tokens [B, M]: guided logits and probabilities [B, M, K] of what follows."""


class Drafter(Protocol):
    """Where drafts come from."""

    def begin(self, session: Session) -> Drafting:
        """Draft for the pictures of a session, which has made its first pass."""


class DraftedSession(Session, Protocol):
    """A session of a generator with a drafter.

    Attributes:
        codebook: [K, C], of the picture tokenizer.
        drafter: None where the generator has none.
    """

    codebook: Tensor
    drafter: Drafter | None


def drafter_of(session: Session, sampler: str) -> Drafter:
    """The drafter that the generator brings.

    Raises:
        ValueError: it brings none.
    """
    if getattr(session, "drafter", None) is None:
        raise ValueError(
            f"the sampler {sampler} needs a generator with a drafter, like argen/emoji-llamagen: for others choose jacobi, "
            "which needs none"
        )
    return session.drafter


class Law:
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


@dataclass(frozen=True)
class Draft:
    """What a shape has grown for one picture: the tree, the tokens of its nodes, and how they were drawn."""

    tree: Tree
    tokens: list[int]
    drafted: Drafted | None


class Shape(Protocol):
    """Which tree is drafted."""

    def grow(
        self,
        drafting: Drafting,
        hidden: Tensor,
        roots: Tensor,
        tokens: Tensor,
        law: Law,
        numbers: list[Iterator[float]],
    ) -> list[Draft]:
        """Draft for each picture.

        Args:
            hidden: [R, 1, D], the guess at the root.
            roots: [B] on the CPU, cells of the roots.
            tokens: [B] of the roots.
            numbers: of each picture.
        """


@dataclass(frozen=True)
class StaticTree:
    """A tree of fixed shape: every node's children are drawn without replacement, or are the likeliest at temperature 0.

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
        law: Law,
        numbers: list[Iterator[float]],
    ) -> list[Draft]:
        """See `Shape.grow`."""
        tree, batch = self.tree, len(roots)
        found = [[int(token)] + [0] * (len(tree.parents) - 1) for token in tokens]
        chances = [[1.0] * len(tree.parents) for _ in range(batch)]
        laws: list[dict[int, Tensor]] = [{} for _ in range(batch)]
        level, read = [0], []  # nodes with children whose guesses are at hand, and those that the drafter has read
        while level:
            cells = (roots[:, None] + tree.depths[level] + 1).expand(batch, -1)
            rows = law(*drafting.logits(hidden), cells)
            for index, node in enumerate(level):
                children = tree.children[node]
                for b in range(batch):
                    drawn = self._drawn(rows[b, index], len(children), law.greedy, numbers[b])
                    laws[b][node] = rows[b, index]
                    for child, token, chance in zip(children, *drawn, strict=False):
                        found[b][child], chances[b][child] = token, chance
            grown = [child for node in level for child in tree.children[node] if tree.children[child]]
            if not grown:
                break
            read += grown
            above = torch.tensor([level.index(tree.parents[node]) for node in grown])
            seen = tree.mask[grown][:, read].expand(batch, -1, -1)
            fed = torch.tensor([[row[node] for node in grown] for row in found], device=hidden.device)
            places = (roots[:, None] + tree.depths[grown]).expand(batch, -1)
            hidden, level = drafting.guess(fed, places, hidden[:, above], seen, roots + 1), grown
        drafts = zip(found, laws, chances, strict=True)
        return [Draft(tree, row, None if law.greedy else Drafted(own, given)) for row, own, given in drafts]

    def _drawn(self, law: Tensor, count: int, greedy: bool, numbers: Iterator[float]) -> tuple[list[int], list[float]]:
        if greedy:
            return law.topk(count).indices.tolist(), [1.0] * count
        return without_replacement(law, [next(numbers) for _ in range(self.draws or count)])


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2's tree (arXiv 2406.16858): grown where the drafter is surest, from its likeliest tokens.

    Args:
        nodes: that are kept, without the root.
        depth: levels that are grown after the first.
        width: nodes that are grown on each level, and likeliest tokens of each of them.
    """

    nodes: int = 58
    depth: int = 4
    width: int = 10

    def grow(
        self,
        drafting: Drafting,
        hidden: Tensor,
        roots: Tensor,
        tokens: Tensor,
        law: Law,
        numbers: list[Iterator[float]],
    ) -> list[Draft]:
        """See `Shape.grow`; nothing is drawn."""
        batch, width = len(roots), self.width
        start = law(*drafting.logits(hidden), roots[:, None] + 1).log()[:, 0]
        scores, picked = start.topk(width)  # of the beam [B, width]
        pool_scores, pool_tokens = [scores], [picked]
        pool_parents = [torch.full((batch, width), -1)]  # place in the pool, -1 for the root
        beam = torch.arange(width).expand(batch, -1)  # places in the pool
        hidden = hidden.expand(-1, width, -1)
        seen = torch.eye(width, dtype=torch.bool).expand(batch, -1, -1)
        ids, rows = picked, torch.arange(batch)[:, None]
        for level in range(self.depth):
            places = (roots[:, None] + 1 + level).expand(batch, width)
            out = drafting.guess(ids.to(hidden.device), places, hidden, seen, roots + 1)
            laws = law(*drafting.logits(out), places + 1).log()
            best, children = laws.topk(width)  # [B, width, width]
            total = (scores[:, :, None] + best).flatten(1)
            pool_parents.append(beam[:, :, None].expand(-1, -1, width).flatten(1))
            first = sum(part.shape[1] for part in pool_scores)
            pool_scores.append(total)
            pool_tokens.append(children.flatten(1))
            scores, chosen = total.topk(width)
            beam, ids = first + chosen, children.flatten(1)[rows, chosen]
            above = chosen // width
            twice = len(out) // batch
            hidden = out[torch.arange(len(out))[:, None], above.repeat(twice, 1).to(out.device)]
            own = torch.eye(width, dtype=torch.bool).expand(batch, -1, -1)
            seen = torch.cat([seen[:, -width:][rows, above], own], dim=2)
        kept = torch.cat(pool_scores, dim=1).topk(self.nodes).indices.sort().values
        parents, tokens_of = torch.cat(pool_parents, dim=1), torch.cat(pool_tokens, dim=1)
        drafts = []
        for b in range(batch):
            numbers_of = {-1: 0} | {place: index for index, place in enumerate(kept[b].tolist(), 1)}
            above = [numbers_of[parent] for parent in parents[b, kept[b]].tolist()]
            drafts.append(Draft(Tree((-1, *above)), [int(tokens[b]), *tokens_of[b, kept[b]].tolist()], None))
        return drafts


# Twelve nodes below the root: on two cores a pass over them costs less than two over a single token.
SMALL_TREE = StaticTree(
    ((0,), (1,), (2,), (3,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 0, 0, 0))
)


@dataclass(frozen=True)
class Speculative:
    """The target looks at a tree of drafted tokens in one pass, and keeps a path of it.

    Args:
        shape: of the trees.
        rule: what is accepted.
        wipe: see `verify`.
        drafter: None for the one that the generator brings.
    """

    shape: Shape = SMALL_TREE
    rule: Rule = Lossless()
    wipe: str = "draft"
    drafter: Drafter | None = None
    name = "speculative"

    @property
    def lossless(self) -> bool:
        return self.rule.lossless

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.steps.Plain`.

        Raises:
            ValueError: a drafter is asked of a generator that has none.
        """
        drafter = self.drafter or drafter_of(session, self.name)
        batch, length = tokens.shape
        given, device = tokens.cpu(), tokens.device
        written, origins = given.clone(), torch.zeros(batch, length, dtype=torch.int8)
        law, numbers = Law(sampling, guidance_scale), [noise.numbers(index) for index in range(batch)]
        rows = torch.arange(batch)[:, None]

        def decided(laws: Tensor, cells: Tensor) -> Tensor:
            """Laws [B, n, K] of `cells`, certain where a token is given."""
            fixed = torch.where(cells < length, given.gather(1, cells.clamp(max=length - 1)), -1)
            certain = F.one_hot(fixed.clamp(min=0), laws.shape[-1]).to(laws)
            return torch.where(fixed[..., None] >= 0, certain, laws)

        def drawn(one: Tensor, index: int) -> int:
            if law.greedy:
                return int(one.argmax())
            return int(inverse_transform(one, torch.tensor(next(numbers[index]), dtype=torch.float64)))

        def step() -> Step:
            done = torch.arange(length) <= roots[:, None]
            shown = torch.where(given < 0, origins, Origin.GIVEN)
            return Step(torch.where(done, written, given).to(device), passes, shown)

        start, roots = torch.full((batch, 1), START), torch.zeros(batch, dtype=torch.int64)  # cells
        logits = guided(*session.forward(start.to(device), torch.tensor([START])), guidance_scale, roots[:, None])
        laws = decided(law.of_guided(logits), roots[:, None])
        root_tokens = torch.tensor([drawn(laws[index, 0], index) for index in range(batch)])
        written[:, 0], origins[:, 0], passes = root_tokens, Origin.DRAWN, 1
        yield step()
        drafting, one = drafter.begin(session), torch.ones(batch, dtype=torch.int64)
        drafting.observe(start, logits, laws)
        hidden = drafting.read(root_tokens[:, None].to(device), roots[:, None], torch.zeros(batch, 1).long(), one)
        while (roots < length - 1).any():
            drafts = self.shape.grow(drafting, hidden, roots, root_tokens, law, numbers)
            nodes = torch.tensor([draft.tokens for draft in drafts])
            places = roots[:, None] + torch.stack([draft.tree.depths for draft in drafts])
            masks = torch.stack([draft.tree.mask for draft in drafts])
            logits = guided(*session.forward(nodes.to(device), places, masks), guidance_scale, places + 1)
            laws, passes = decided(law.of_guided(logits), places + 1), passes + 1
            drafting.observe(nodes, logits, laws)
            verdicts = [self._verdict(laws[index], draft, law, numbers[index]) for index, draft in enumerate(drafts)]
            following = torch.tensor([drawn(verdict.law, index) for index, verdict in enumerate(verdicts)])
            ahead = torch.tensor([len(verdict.kept) for verdict in verdicts])
            longest = int(ahead.max())
            kept = torch.tensor([path + path[-1:] * (longest - len(path)) for path, *_ in verdicts])
            session.keep(kept.to(device))
            accepted = nodes[rows, kept].roll(-1, dims=1)  # at the cells after the root
            accepted[torch.arange(batch), ahead - 1] = following
            cells = roots[:, None] + 1 + torch.arange(longest)
            for index, verdict in enumerate(verdicts):
                count = min(int(ahead[index]), length - 1 - int(roots[index]))
                found = [Origin.RELAXED if node in verdict.relaxed else Origin.ACCEPTED for node in verdict.kept[1:]]
                here = cells[index, :count]
                written[index, here] = accepted[index, :count]
                origins[index, here] = torch.tensor([*found, Origin.DRAWN][:count], dtype=torch.int8)
            hidden = drafting.read(accepted.to(device), cells, kept, ahead)
            root_tokens, roots = following, (roots + ahead).clamp(max=length - 1)
            yield step()

    def _verdict(self, laws: Tensor, draft: Draft, law: Law, numbers: Iterator[float]) -> Verdict:
        """Of one picture, laws [M, K]."""
        if not law.greedy:
            return verify(laws, draft.tree, draft.tokens, self.rule, numbers, draft.drafted, self.wipe)
        kept = verify_greedy(laws, draft.tree, draft.tokens, self.rule)
        likeliest = laws.argmax(dim=-1).tolist()
        relaxed = {node for above, node in pairwise(kept) if likeliest[above] != draft.tokens[node]}
        return Verdict(kept, laws[kept[-1]], relaxed)
