"""Speculative decoding: the network looks at a tree of drafted tokens in one pass, and a rule says which path of it is kept.

One loop with four slots: where drafts come from (`Drafter`), which tree is drafted (`samplers.trees`), what is accepted
(`samplers.rules`), and the cache, which is the session's.

Letters in shape comments: B pictures, N cells, M nodes of a tree, n tokens of a pass, K vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from samplers.logits import Noise, Sampling
from samplers.rules import Candidates, Lossless, OneByOne, Rule
from samplers.steps import START, GuidanceScale, Origin, Session, Step, guided
from samplers.trees import SMALL_TREE, Draft, Drafted, Drafting, Law, Shape, Tree


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
    while tree.children[node]:
        children = tree.children[node]
        chances = [1.0 if drafted is None else drafted.chances[child] for child in children]
        own = None if drafted is None else drafted.laws[node]
        candidates = Candidates(children, [tokens[child] for child in children], own, chances)
        choice = rule.choose(laws[node], candidates, uniforms, wipe)
        if choice.node is None:
            return Verdict(kept, choice.law, relaxed)
        node = choice.node
        kept.append(node)
        relaxed |= {node} if choice.relaxed else set()
    return Verdict(kept, laws[node], relaxed)


def verify_greedy(laws: Tensor, tree: Tree, tokens: Sequence[int], rule: OneByOne) -> list[int]:
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
            law[tokens[child]] = rule.relax(law, tokens[child]).likely
            if int(law.argmax()) == tokens[child]:
                walk([*path, child])

    walk([0])
    return best


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

        def step() -> Step:
            done = torch.arange(length) <= roots[:, None]
            shown = torch.where(given < 0, origins, Origin.GIVEN)
            return Step(torch.where(done, written, given).to(device), passes, shown)

        start, roots = torch.full((batch, 1), START), torch.zeros(batch, dtype=torch.int64)  # cells
        logits = guided(*session.forward(start.to(device), torch.tensor([START])), guidance_scale, roots[:, None])
        laws = decided(law.of_guided(logits), roots[:, None])
        root_tokens = torch.tensor([law.draw(laws[index, 0], numbers[index]) for index in range(batch)])
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
            following = torch.tensor([law.draw(verdict.law, numbers[index]) for index, verdict in enumerate(verdicts)])
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
