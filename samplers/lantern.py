"""LANTERN: a drafted token is accepted with the aggregated probability of its nearest codebook entries, within a bound.

Papers: LANTERN (arXiv 2410.03355, the bound `delta`) and LANTERN++ (arXiv 2502.06352, the bound `lambda_`).

`delta` bounds the probability that one relaxation moves; with candidates that are drawn it does not bound how far the distribution of a
token, or of an image, is from the target's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from samplers.logits import Noise, Sampling
from samplers.rules import NONE, OneByOne, Raised
from samplers.settings import Field, settings
from samplers.speculative import DraftedSession, Speculative, drafter_of
from samplers.steps import GuidanceScale, Step
from samplers.trees import DEPTH, NODES, TREE_CHOICES, TREE_OR_SIZES, WIDTH, Shape, TreeName, tree_of

SLICE = 1024  # rows of the codebook that are compared at a time


def neighbours(codebook: Tensor, k: int) -> Tensor:
    """Codebook [K, C] -> the k nearest other codes of each, nearest first: [K, k] int64.

    Raises:
        ValueError: k is not below the number of codes.
    """
    if not 0 <= k < len(codebook):
        raise ValueError(
            f"k is {k}: expected 0 to {len(codebook) - 1}, fewer than the codebook's {len(codebook)} codes"
        )
    nearest = []
    for first in range(0, len(codebook), SLICE):
        far = torch.cdist(codebook[first : first + SLICE].float(), codebook.float())
        far[torch.arange(len(far)), torch.arange(first, first + len(far))] = torch.inf
        nearest.append(far.topk(k, largest=False).indices)
    return torch.cat(nearest)


def table_of(codebook: Tensor, k: int) -> Tensor:
    """`neighbours`, computed once for a codebook and k."""
    codes = codebook.detach().float().cpu().contiguous()
    return _table_of(codes.numpy().tobytes(), len(codes), k)


@lru_cache(maxsize=8)
def _table_of(codebook: bytes, codes: int, k: int) -> Tensor:
    return neighbours(torch.frombuffer(bytearray(codebook), dtype=torch.float32).view(codes, -1), k)


@dataclass(frozen=True)
class Relaxed(OneByOne):
    """The acceptance rule of LANTERN, to be used as `samplers.rules.Rule`.

    Args:
        table: [K, k + 1 or more] from `neighbours`.
        k: nearest codebook entries whose probability is aggregated.
        delta: the aggregated probability of the neighbours is at most this.
        lambda_: or the aggregated probability is at most so many times that of the token itself; one of the two is given.
        official: after a rejection the k + 1 nearest codes are rejected, too, as in the authors' code; else only those that were aggregated, so that
            k = 0, delta = 0 and lambda = 1 are exactly lossless under top-k and top-p, too.
    """

    table: Tensor = field(repr=False)
    k: int
    delta: float | None = None
    lambda_: float | None = None
    official: bool = False
    lossless = False

    def __post_init__(self):
        if (self.delta is None) == (self.lambda_ is None):
            raise ValueError("expected one bound, delta or lambda_")
        if self.delta is not None and not 0 <= self.delta <= 1:
            raise ValueError(f"delta is {self.delta}: expected 0 to 1")
        if self.lambda_ is not None and self.lambda_ < 1:
            raise ValueError(f"lambda_ is {self.lambda_}: expected 1 or more")
        if not 0 <= self.k < self.table.shape[1]:
            raise ValueError(
                f"k is {self.k}: expected 0 to {max(0, self.table.shape[1] - 1)}, fewer than the table's neighbours"
            )

    def relax(self, probs: Tensor, token: int) -> Raised:
        """See `samplers.rules.OneByOne.relax`."""
        prob, near = probs[token], self.table[token, : self.k + 1].to(probs.device)
        bound = (self.lambda_ - 1) * prob if self.lambda_ is not None else self.delta or 0.0
        borrowed = probs[near[: self.k]].cumsum(0)
        count = int((borrowed <= bound).sum())  # the sums grow, so these are the first ones
        likely = prob + borrowed[count - 1] if count else prob
        return Raised(likely, NONE, near if self.official and count else near[:count])


@settings
class Lantern:
    """A small drafter proposes tokens, and one is also accepted for the probability of codes that look like it (LANTERN): fewer passes than
    lossless drafting, at some loss of quality.

    No bound here limits the loss as a whole. See `Relaxed`; `delta` is 0.2 where neither bound is given.
    """

    k: int = Field(
        default=10, ge=0, le=2**16, description="how many codes that look most like a token lend it their probability"
    )
    delta: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="most probability that a token may borrow (LANTERN); 0.2 where neither delta nor lambda is given",
    )
    lambda_: float | None = Field(
        default=None,
        ge=1,
        le=10**6,
        description="instead of delta: at most so many times its own probability counts for a token (LANTERN++)",
    )
    official: bool = Field(
        default=False,
        description="a rejected token takes all of its k neighbours with it, as in the authors' code; else only those that lent",
    )
    tree: Shape | TreeName | None = Field(default=None, description=TREE_OR_SIZES, json_schema_extra=TREE_CHOICES)
    nodes: int | None = Field(default=None, ge=1, le=256, description=NODES)
    depth: int | None = Field(default=None, ge=1, le=32, description=DEPTH)
    width: int | None = Field(default=None, ge=1, le=64, description=WIDTH)
    name = "lantern"
    resumes = "in distribution"
    lossless = False
    needs = "drafter"

    def __post_init__(self):
        if self.delta is not None and self.lambda_ is not None:
            raise ValueError("delta and lambda are both given: expected one bound")
        if self.delta is None and self.lambda_ is None:
            object.__setattr__(self, "delta", 0.2)
        tree_of(self.tree, nodes=self.nodes, depth=self.depth, width=self.width)  # says what does not fit

    def __call__(
        self, session: DraftedSession, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.speculative.Speculative`."""
        drafter = drafter_of(session, self.name)
        codes = len(session.codebook)
        if self.k + 1 >= codes:
            raise ValueError(f"k is {self.k}: expected 0 to {codes - 2}, fewer than the codebook's {codes} codes")
        table = table_of(session.codebook, self.k + 1)
        rule = Relaxed(table, self.k, self.delta, self.lambda_, self.official)
        shape = tree_of(self.tree, nodes=self.nodes, depth=self.depth, width=self.width)
        yield from Speculative(shape, rule, drafter=drafter)(session, tokens, sampling, guidance_scale, noise)
