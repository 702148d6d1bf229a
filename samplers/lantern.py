"""LANTERN: a drafted token may borrow the probability of its neighbours in the codebook, within a bound.

Papers: LANTERN (arXiv 2410.03355, the bound `delta`) and LANTERN++ (arXiv 2502.06352, the bound `lambda_`).

`delta` bounds the probability that one relaxation moves; with candidates that are drawn it does not bound how far the law of a
token, or of a picture, is from the target's.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    found = []
    for first in range(0, len(codebook), SLICE):
        far = torch.cdist(codebook[first : first + SLICE].float(), codebook.float())
        far[torch.arange(len(far)), torch.arange(first, first + len(far))] = torch.inf
        found.append(far.topk(k, largest=False).indices)
    return torch.cat(found)


@dataclass(frozen=True)
class Relaxed:
    """The acceptance rule of LANTERN, to be used as `samplers.speculative.Rule`.

    Args:
        table: [K, k + 1 or more] from `neighbours`.
        k: neighbours that may lend.
        delta: the borrowed probability is at most this.
        lambda_: or the raised probability is at most so many times the token's own; one of the two is given.
        official: after a rejection the k + 1 nearest codes fall, as in the authors' code; else only those that lent, so that
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
            raise ValueError(f"k is {self.k}: expected 0 to {self.table.shape[1] - 1}, the table's neighbours less one")

    def relax(self, law: Tensor, token: int) -> tuple[Tensor, Tensor]:
        """See `samplers.speculative.Rule.relax`."""
        own, near = law[token], self.table[token, : self.k + 1].to(law.device)
        bound = self.delta if self.lambda_ is None else (self.lambda_ - 1) * own
        borrowed = law[near[: self.k]].cumsum(0)
        count = int((borrowed <= bound).sum())  # the sums grow, so these are the first ones
        likely = own + borrowed[count - 1] if count else own
        return likely, near if self.official and count else near[:count]
