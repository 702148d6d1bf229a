"""Speculative decoding: the network looks at a tree of drafted tokens in one pass, and a rule says which path of it is kept.

One loop with four slots: where drafts come from (`Drafter`), which tree is drafted (`samplers.trees`), what is accepted
(`samplers.rules`), and the cache, which is the session's.

Letters in shape comments: B images, N cells, M nodes of a tree, n tokens of a forward pass, K vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from samplers.logits import Noise, Sampling
from samplers.rules import RULE_CHOICES, Candidates, OneByOne, Rule, RuleName, rule_of
from samplers.settings import Field, settings
from samplers.steps import START, GuidanceScale, Origin, Session, Step, guided
from samplers.trees import TREE_CHOICES, Distribution, Draft, Drafted, Reading, Shape, Tree, TreeName, tree_of


class Verdict(NamedTuple):
    """What is kept of a tree.

    Attributes:
        kept: nodes, the root first.
        probs: probabilities [K] of the token after the last of them.
        relaxed: those of the nodes that the lossless rule would not have kept.
    """

    kept: list[int]
    probs: Tensor
    relaxed: set[int]


def verify(
    target_probs: Tensor,
    tree: Tree,
    tokens: Sequence[int],
    rule: Rule,
    uniforms: Iterator[float],
    drafted: Drafted | None = None,
    reject_in: str = "draft",
) -> Verdict:
    """Walk down the tree, keeping at each node the first child that is accepted.

    Args:
        target_probs: the target's probabilities [M, K] of what follows each node.
        tokens: of each node.
        uniforms: gives a number in [0, 1) for each candidate that is looked at.
        drafted: None for candidates that a rule chose (e.g. the most probable ones), without chance.
        reject_in: with `drafted`, what is rejected with a candidate: its neighbours in the "draft" distribution, or in the "target" distribution.
    """
    node, kept = 0, [0]
    relaxed: set[int] = set()
    while tree.children[node]:
        children = tree.children[node]
        proposal_probs = [1.0 if drafted is None else drafted.proposal_probs[child] for child in children]
        draft_probs = None if drafted is None else drafted.draft_probs[node]
        candidates = Candidates(children, [tokens[child] for child in children], draft_probs, proposal_probs)
        choice = rule.choose(target_probs[node], candidates, uniforms, reject_in)
        if choice.node is None:
            return Verdict(kept, choice.probs, relaxed)
        node = choice.node
        kept.append(node)
        relaxed |= {node} if choice.relaxed else set()
    return Verdict(kept, target_probs[node], relaxed)


def verify_greedy(target_probs: Tensor, tree: Tree, tokens: Sequence[int], rule: Rule) -> list[int]:
    """Keep the longest path of which every token is the most probable one once the rule has raised it; the first one of several.

    Args:
        target_probs: the target's probabilities [M, K], at temperature 1.

    Returns:
        The nodes that are kept, the root first.

    Raises:
        ValueError: the rule does not say by which probability one candidate is judged.
    """
    if not isinstance(rule, OneByOne):
        raise ValueError(
            f"the rule {type(rule).__name__} cannot judge drafts at temperature 0: expected a subclass of "
            "samplers.rules.OneByOne, or a temperature above 0"
        )
    best: list[int] = []

    def walk(path: list[int]) -> None:
        nonlocal best
        best = path if len(path) > len(best) else best
        for child in tree.children[path[-1]]:
            probs = target_probs[path[-1]].clone()
            probs[tokens[child]] = rule.relax(probs, tokens[child]).likely
            if int(probs.argmax()) == tokens[child]:
                walk([*path, child])

    walk([0])
    return best


@runtime_checkable
class Drafter(Protocol):
    """Where drafts come from."""

    def begin(self, session: Session) -> Reading:
        """Draft for the images of a session, which has made its first pass."""


class DraftedSession(Session, Protocol):
    """A session of a generator with a drafter.

    Attributes:
        codebook: [K, C], of the image tokenizer.
        drafter: None where the generator has none.
    """

    codebook: Tensor
    drafter: Drafter | None


def drafter_of(session: Session, sampler: str) -> Drafter:
    """The drafter that the generator brings.

    Raises:
        ValueError: it brings none.
    """
    drafter: Drafter | None = getattr(session, "drafter", None)
    if drafter is None:
        raise ValueError(
            f"the sampler {sampler} needs a generator with a drafter, like argen/emoji-llamagen: for others choose jacobi, "
            "which needs none"
        )
    return drafter


@settings
class Speculative:
    """Speculative decoding: the target looks at a tree of drafted tokens in one forward pass, and keeps a path of it.

    In Python `tree` may be any `samplers.trees.Shape`, `rule` any `samplers.rules.Rule`, and `drafter` another than the one that the
    generator brings; for `reject_in` see `verify`.
    """

    tree: Shape | TreeName = Field(
        default="static", description="shape of the drafted trees", json_schema_extra=TREE_CHOICES
    )
    rule: Rule | RuleName = Field(default="lossless", description="what is accepted", json_schema_extra=RULE_CHOICES)
    reject_in: Literal["draft", "target"] = Field(
        default="draft", description="where the neighbours of a rejected token fall"
    )
    drafter: Drafter | None = Field(default=None, description="an object of Python")
    name = "speculative"
    needs = "drafter"

    def __post_init__(self):
        if self.rule == "k-seq" and self.tree == "static":
            object.__setattr__(self, "tree", "independent")  # which the rule is for

    @property
    def lossless(self) -> bool:
        return rule_of(self.rule).lossless

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.steps.Sequential`.

        Raises:
            ValueError: the generator has no drafter.
        """
        drafter = self.drafter or drafter_of(session, self.name)
        batch, length = tokens.shape
        given, device = tokens.cpu(), tokens.device
        written, origins = given.clone(), torch.zeros(batch, length, dtype=torch.int8)
        distribution, numbers = Distribution(sampling, guidance_scale), [noise.numbers(index) for index in range(batch)]
        rows = torch.arange(batch)[:, None]

        def decided(target_probs: Tensor, cells: Tensor) -> Tensor:
            """Probabilities [B, n, K] of `cells`, one-hot where a token is given."""
            fixed = torch.where(cells < length, given.gather(1, cells.clamp(max=length - 1)), -1)
            certain = F.one_hot(fixed.clamp(min=0), target_probs.shape[-1]).to(target_probs)
            return torch.where(fixed[..., None] >= 0, certain, target_probs)

        def step() -> Step:
            done = torch.arange(length) <= roots[:, None]
            decided_origins = torch.where(given < 0, origins, Origin.GIVEN)
            return Step(torch.where(done, written, given).to(device), forward_passes, decided_origins)

        start, roots = torch.full((batch, 1), START), torch.zeros(batch, dtype=torch.int64)  # cells
        logits = guided(*session.forward(start.to(device), torch.tensor([START])), guidance_scale, roots[:, None])
        target_probs = decided(distribution.of_guided(logits), roots[:, None])
        root_tokens = torch.tensor(
            [distribution.draw(target_probs[index, 0], numbers[index]) for index in range(batch)]
        )
        written[:, 0], origins[:, 0], forward_passes = root_tokens, Origin.DRAWN, 1
        yield step()
        drafting, one = drafter.begin(session), torch.ones(batch, dtype=torch.int64)
        drafting.observe(start, logits, target_probs)
        hidden = drafting.read(root_tokens[:, None].to(device), roots[:, None], torch.zeros(batch, 1).long(), one)
        while (roots < length - 1).any():
            drafts = tree_of(self.tree).grow(drafting, hidden, roots, root_tokens, distribution, numbers)
            nodes = torch.tensor([draft.tokens for draft in drafts])
            positions = roots[:, None] + torch.stack([draft.tree.depths for draft in drafts])
            masks = torch.stack([draft.tree.mask for draft in drafts])
            logits = guided(*session.forward(nodes.to(device), positions, masks), guidance_scale, positions + 1)
            target_probs, forward_passes = decided(distribution.of_guided(logits), positions + 1), forward_passes + 1
            drafting.observe(nodes, logits, target_probs)
            verdicts = [
                self._verdict(target_probs[index], draft, distribution, numbers[index])
                for index, draft in enumerate(drafts)
            ]
            following = torch.tensor(
                [distribution.draw(verdict.probs, numbers[index]) for index, verdict in enumerate(verdicts)]
            )
            ahead = torch.tensor([len(verdict.kept) for verdict in verdicts])
            longest = int(ahead.max())
            kept = torch.tensor([path + path[-1:] * (longest - len(path)) for path, *_ in verdicts])
            session.keep(kept.to(device))
            accepted = nodes[rows, kept].roll(-1, dims=1)  # at the cells after the root
            accepted[torch.arange(batch), ahead - 1] = following
            cells = roots[:, None] + 1 + torch.arange(longest)
            for index, verdict in enumerate(verdicts):
                count = min(int(ahead[index]), length - 1 - int(roots[index]))
                walked = [Origin.RELAXED if node in verdict.relaxed else Origin.ACCEPTED for node in verdict.kept[1:]]
                here = cells[index, :count]
                written[index, here] = accepted[index, :count]
                origins[index, here] = torch.tensor([*walked, Origin.DRAWN][:count], dtype=torch.int8)
            hidden = drafting.read(accepted.to(device), cells, kept, ahead)
            root_tokens, roots = following, (roots + ahead).clamp(max=length - 1)
            yield step()

    def _verdict(
        self, target_probs: Tensor, draft: Draft, distribution: Distribution, numbers: Iterator[float]
    ) -> Verdict:
        """Of one image, probabilities [M, K]."""
        if not distribution.greedy:
            return verify(
                target_probs, draft.tree, draft.tokens, rule_of(self.rule), numbers, draft.drafted, self.reject_in
            )
        kept = verify_greedy(target_probs, draft.tree, draft.tokens, rule_of(self.rule))
        most_probable = target_probs.argmax(dim=-1).tolist()
        relaxed = {node for above, node in pairwise(kept) if most_probable[above] != draft.tokens[node]}
        return Verdict(kept, target_probs[kept[-1]], relaxed)
