"""Quantization: the nearest code of a learned codebook, or of a fixed lattice.

Letters in shape comments: B batch, N tokens of a picture, C width of a code, K codes.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_ids(ids: Tensor, n_embed: int, fewest: int, most: int) -> None:
    """Raises:
    ValueError: of a picture, ids [N], there are too few or too many, or one is outside the codebook.
    """
    if not fewest <= len(ids) <= most:
        expected = fewest if fewest == most else f"{fewest} to {most}"
        raise ValueError(f"got {len(ids)} tokens for an image: expected {expected}")
    for wrong in (int(ids.min()), int(ids.max())):
        if not 0 <= wrong < n_embed:
            raise ValueError(f"token {wrong} does not exist: expected 0 to {n_embed - 1}")


def nearest(z: Tensor, table: Tensor) -> Tensor:
    """Ids [...] of the rows of `table` [K, C] with the largest cosine to the unit vectors `z` [..., C]."""
    return (z @ F.normalize(table.float(), dim=-1).T).argmax(dim=-1)


def by_cosine(z: Tensor, table: Tensor, beta: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize `z` [..., C] by the rows of `table` [K, C]; both are l2-normalised before they are compared.

    Args:
        beta: weight of the commitment term.

    Returns:
        codes [..., C], of unit length, with the straight-through gradient to the normalised `z`;
        the scalar loss (beta * commitment + codebook term); ids [...] int64.
    """
    z = F.normalize(z.float(), dim=-1)
    ids = nearest(z, table)
    codes = F.normalize(F.embedding(ids, table).float(), dim=-1)
    loss = beta * F.mse_loss(codes.detach(), z) + F.mse_loss(codes, z.detach())
    return z + (codes - z).detach(), loss, ids


@torch.no_grad()
def revive(table: Tensor, dead: Tensor, z: Tensor, generator: torch.Generator | None = None) -> None:
    """Move the rows `dead` [K] bool of `table` [K, C] onto random vectors of `z` [M, C], so that small trainings use them all."""
    count = min(int(dead.sum()), len(z))
    indices = torch.randperm(len(z), generator=generator)[:count]
    slots = dead.nonzero().squeeze(1)[:count]
    table[slots] = F.normalize(z[indices].float(), dim=-1).to(table)


class VectorQuantizer(nn.Module):
    """Nearest code by cosine: vectors and codes are l2-normalised before they are compared.

    This is the quantizer of ViT-VQGAN (arXiv 2110.04627, section 3.2). The state dict holds ``embedding.weight`` [K, C].

    Args:
        embed_dim: C, width of a code.
        n_embed: K, number of codes.
        beta: weight of the commitment term.
    """

    def __init__(self, embed_dim: int, n_embed: int, beta: float = 0.25):
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `by_cosine`."""
        return by_cosine(z, self.embedding.weight, self.beta)

    def nearest(self, z: Tensor) -> Tensor:
        """Ids [...] of the codes with the largest cosine to the unit vectors `z` [..., C]."""
        return nearest(z, self.embedding.weight)

    def decode(self, ids: Tensor) -> Tensor:
        """Unit codes [..., C] of `ids` [...]."""
        return F.normalize(self.embedding(ids).float(), dim=-1)


@dataclass(frozen=True)
class FSQ:
    """Finite scalar quantization (arXiv 2309.15505): each number is rounded to one of a few levels; nothing is learned.

    Args:
        levels: L of each of the C numbers; the codebook has their product. The first number changes fastest with the id.
        eps: how far beyond the outermost levels the bound lies.
    """

    levels: tuple[int, ...]
    eps: float = 1e-3

    @property
    def n_embed(self) -> int:
        """K."""
        return math.prod(self.levels)

    @cached_property
    def table(self) -> Tensor:
        """[4, C] float32: half the range, offset and shift of the bound, and half of the levels, rounded down."""
        levels = torch.tensor(self.levels, dtype=torch.float32)
        half, offset = (levels - 1) * (1 + self.eps) / 2, (levels + 1) % 2 / 2
        return torch.stack([half, offset, (offset / half).atanh(), levels // 2])

    @cached_property
    def basis(self) -> Tensor:
        """[C] int64."""
        return torch.tensor([1, *self.levels[:-1]]).cumprod(0)

    def bound(self, z: Tensor) -> Tensor:
        """z [..., C] -> float32 within the levels, not rounded."""
        half, offset, shift, _ = self.table.to(z.device)
        return (z.float() + shift).tanh() * half - offset

    def quantize(self, z: Tensor) -> Tensor:
        """z [..., C] -> codes in [-1, 1], with the straight-through gradient to z."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / self.table[3].to(z.device)

    def ids(self, z: Tensor) -> Tensor:
        """z [..., C] -> ids [...] int64."""
        digits = self.bound(z).round().long() + self.table[3].to(z.device).long()
        return (digits * self.basis.to(z.device)).sum(dim=-1)

    def decode(self, ids: Tensor) -> Tensor:
        """Ids [...] -> codes [..., C] float32."""
        levels = torch.tensor(self.levels, device=ids.device)
        half = self.table[3].to(ids.device)
        return (ids[..., None] // self.basis.to(ids.device) % levels - half) / half
