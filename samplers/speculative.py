"""Speculative decoding: the network looks at a tree of drafted tokens in one forward pass, and a rule says which path is accepted.

One loop with four slots: where drafts come from (`Drafter`), which tree is drafted (`samplers.trees`), what is accepted
(`samplers.rules`), and the cache, which is the session's.

Letters in shape comments: B images, N cells, M nodes of a tree, n tokens of a forward pass, K vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from samplers.errors import InvalidValue
from samplers.logits import Noise, Sampling
from samplers.rules import RULE_CHOICES, Candidates, KSeq, OneByOne, Rule, RuleName, rule_of
from samplers.settings import Field, settings
from samplers.steps import START, GuidanceScale, Origin, Session, Step, guided
from samplers.trees import (
    DEPTH,
    NODES,
    TREE_CHOICES,
    TREE_OR_SIZES,
    WIDTH,
    Distribution,
    Draft,
    Drafted,
    DrawnTree,
    DynamicTree,
    Reading,
    Shape,
    StaticTree,
    Tree,
    TreeName,
    tree_of,
)


class Verdict(NamedTuple):
    """Accepted path of a tree.

    Attributes:
        accepted: its nodes, the root first.
        probs: probabilities [K] of the token after the last of them.
        relaxed: those of the nodes that the lossless rule would not have accepted.
    """

    accepted: list[int]
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
    node, accepted = 0, [0]
    relaxed: set[int] = set()
    while tree.children[node]:
        children = tree.children[node]
        proposal_probs = [1.0 if drafted is None else drafted.proposal_probs[child] for child in children]
        draft_probs = None if drafted is None else drafted.draft_probs[node]
        candidates = Candidates(children, [tokens[child] for child in children], draft_probs, proposal_probs)
        choice = rule.choose(target_probs[node], candidates, uniforms, reject_in)
        if choice.node is None:
            return Verdict(accepted, choice.probs, relaxed)
        node = choice.node
        accepted.append(node)
        relaxed |= {node} if choice.relaxed else set()
    return Verdict(accepted, target_probs[node], relaxed)


def verify_greedy(target_probs: Tensor, tree: Tree, tokens: Sequence[int], rule: Rule) -> list[int]:
    """Keep the longest path of which every token is the most probable one once the rule has raised it; the first one of several.

    Args:
        target_probs: the target's probabilities [M, K], at temperature 1.

    Returns:
        The accepted nodes, the root first.

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
        """Draft for the images of a session, which has made its first forward pass."""


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


class Frontier:
    """How far each image is decided: up to its root, a cell whose token is drawn and not read yet.

    Args:
        tokens: [B, N] as a sampler takes them, -1 in cells to fill.

    Attributes:
        tokens: [B, N] on the CPU, those decided so far.
        origins: [B, N] int8, see `samplers.steps.Origin`.
        roots: [B] cells.
    """

    def __init__(self, tokens: Tensor):
        self.device, self.fixed = tokens.device, tokens.cpu()
        self.tokens = self.fixed.clone()
        self.origins = torch.zeros(self.fixed.shape, dtype=torch.int8)
        self.roots = torch.zeros(len(self.fixed), dtype=torch.int64)

    @property
    def length(self) -> int:
        return self.fixed.shape[1]

    @property
    def cells(self) -> Tensor:
        """The roots as cells [B, 1]."""
        return self.roots[:, None]

    @property
    def complete(self) -> bool:
        return bool((self.roots == self.length - 1).all())

    def known(self, probs: Tensor, cells: Tensor) -> Tensor:
        """Probabilities [B, n, K] of `cells` [B, n], one-hot where the token is given."""
        fixed = torch.where(cells < self.length, self.fixed.gather(1, cells.clamp(max=self.length - 1)), -1)
        certain = F.one_hot(fixed.clamp(min=0), probs.shape[-1]).to(probs)
        return torch.where(fixed[..., None] >= 0, certain, probs)

    def advance(self, accepted: Tensor, cells: Tensor, verdicts: Sequence[Verdict]) -> None:
        """Write the accepted tokens and the one drawn after them, [B, n] at `cells` [B, n]; what lies behind the last cell falls away."""
        for index, verdict in enumerate(verdicts):
            count = min(len(verdict.accepted), self.length - 1 - int(self.roots[index]))
            origins = [Origin.RELAXED if node in verdict.relaxed else Origin.ACCEPTED for node in verdict.accepted[1:]]
            written = cells[index, :count]
            self.tokens[index, written] = accepted[index, :count]
            self.origins[index, written] = torch.tensor([*origins, Origin.DRAWN][:count], dtype=torch.int8)
            self.roots[index] += count

    def step(self, forward_passes: int) -> Step:
        is_decided = torch.arange(self.length) <= self.cells
        tokens = torch.where(is_decided, self.tokens, self.fixed).to(self.device)
        return Step(tokens, forward_passes, torch.where(self.fixed < 0, self.origins, Origin.GIVEN))


@settings
class Speculative:
    """A small drafter proposes a tree of next tokens, the model checks it in one forward pass and keeps a path of it (speculative decoding):
    fewer passes, other images than one by one, equally probable ones.

    In Python `tree` may be any `samplers.trees.Shape`, `rule` any `samplers.rules.Rule`, and `drafter` another than the one that the
    generator brings; for `reject_in` see `verify`.
    """

    tree: Shape | TreeName | None = Field(default=None, description=TREE_OR_SIZES, json_schema_extra=TREE_CHOICES)
    rule: Rule | RuleName = Field(
        default="lossless",
        description="which drafts are accepted: lossless and k-seq keep the model's distribution, grouped accepts more at some loss",
        json_schema_extra=RULE_CHOICES,
    )
    reject_in: Literal["draft", "target"] = Field(
        default="draft",
        description="for a relaxed rule: which distribution loses a rejected token and its neighbours, the draft's or the target's",
    )
    nodes: int | None = Field(default=None, ge=1, le=256, description=NODES)
    depth: int | None = Field(default=None, ge=1, le=32, description=DEPTH)
    width: int | None = Field(default=None, ge=1, le=64, description=WIDTH)
    drafter: Drafter | None = Field(default=None, description="an object of Python")
    name = "speculative"
    resumes = "in distribution"
    needs = "drafter"

    def __post_init__(self):
        shape = self.shape  # says which size does not fit
        if isinstance(rule_of(self.rule), KSeq) and type(shape) in (StaticTree, DynamicTree, DrawnTree):
            raise InvalidValue(
                "rule is k-seq, for candidates that are drawn independently: leave tree, nodes, depth and width out, or "
                "choose tree=independent",
                "rule",
            )

    @property
    def shape(self) -> Shape:
        """The tree with its sizes; None is that of the rule."""
        sizes = {"nodes": self.nodes, "depth": self.depth, "width": self.width}
        is_default = self.tree is None and not any(sizes.values())
        return tree_of("independent" if is_default and isinstance(rule_of(self.rule), KSeq) else self.tree, **sizes)

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
        device, batch = tokens.device, len(tokens)
        shape = self.shape
        distribution, numbers = Distribution(sampling, guidance_scale), [noise.numbers(index) for index in range(batch)]

        def draw(probs: Iterable[Tensor]) -> Tensor:
            """A token for each image, [B]."""
            return torch.tensor(
                [distribution.draw(row, uniforms) for row, uniforms in zip(probs, numbers, strict=True)]
            )

        start, frontier = torch.full((batch, 1), START), Frontier(tokens)
        logits = guided(*session.forward(start.to(device), torch.tensor([START])), guidance_scale, frontier.cells)
        target_probs = frontier.known(distribution.of_guided(logits), frontier.cells)
        root_tokens = draw(target_probs[:, 0])
        frontier.tokens[:, 0], frontier.origins[:, 0], forward_passes = root_tokens, Origin.DRAWN, 1
        yield frontier.step(forward_passes)
        drafting, ones = drafter.begin(session), torch.ones(batch, dtype=torch.int64)
        drafting.observe(start, logits, target_probs)
        hidden = drafting.read(root_tokens[:, None].to(device), frontier.cells, torch.zeros(batch, 1).long(), ones)
        while not frontier.complete:
            drafts = shape.grow(drafting, hidden, frontier.roots, root_tokens, distribution, numbers)
            most = max(len(draft.tokens) for draft in drafts)
            nodes = torch.tensor([draft.tokens + [-1] * (most - len(draft.tokens)) for draft in drafts])
            trees = [draft.tree.padded(most) for draft in drafts]
            positions = frontier.cells + torch.stack([tree.depths for tree in trees])
            masks, fed = torch.stack([tree.mask for tree in trees]), nodes.clamp(min=0).to(device)
            logits = guided(*session.forward(fed, positions, masks), guidance_scale, positions + 1)
            target_probs = frontier.known(distribution.of_guided(logits), positions + 1)
            forward_passes += 1
            drafting.observe(nodes, logits, target_probs)
            verdicts = [
                self._verdict(target_probs[index], draft, distribution, numbers[index])
                for index, draft in enumerate(drafts)
            ]
            following = draw([verdict.probs for verdict in verdicts])
            ahead = torch.tensor([len(verdict.accepted) for verdict in verdicts])
            longest = int(ahead.max())
            paths = torch.tensor([path + path[-1:] * (longest - len(path)) for path, *_ in verdicts])
            session.keep(paths.to(device))
            accepted = nodes.gather(1, paths).roll(-1, dims=1)  # at the cells after the root
            accepted[torch.arange(batch), ahead - 1] = following
            cells = frontier.cells + 1 + torch.arange(longest)
            frontier.advance(accepted, cells, verdicts)
            hidden = drafting.read(accepted.to(device), cells, paths, ahead)
            root_tokens = following
            yield frontier.step(forward_passes)

    def _verdict(
        self, target_probs: Tensor, draft: Draft, distribution: Distribution, numbers: Iterator[float]
    ) -> Verdict:
        """Verify the draft of one image, with probabilities [M, K]."""
        if not distribution.greedy:
            return verify(
                target_probs, draft.tree, draft.tokens, rule_of(self.rule), numbers, draft.drafted, self.reject_in
            )
        accepted = verify_greedy(target_probs, draft.tree, draft.tokens, rule_of(self.rule))
        most_probable = target_probs.argmax(dim=-1).tolist()
        relaxed = {node for above, node in pairwise(accepted) if most_probable[above] != draft.tokens[node]}
        return Verdict(accepted, target_probs[accepted[-1]], relaxed)
