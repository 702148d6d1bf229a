"""Vector quantization: the nearest code of a learned codebook.

Letters in shape comments: B batch, N tokens of a picture, C width of a code, K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        """Quantize `z` [..., C].

        Returns:
            codes [..., C], of unit length, with the straight-through gradient to the normalised `z`;
            the scalar loss (beta * commitment + codebook term); ids [...] int64.
        """
        z = F.normalize(z.float(), dim=-1)
        ids = self.nearest(z)
        codes = self.decode(ids)
        loss = self.beta * F.mse_loss(codes.detach(), z) + F.mse_loss(codes, z.detach())
        return z + (codes - z).detach(), loss, ids

    def nearest(self, z: Tensor) -> Tensor:
        """Ids [...] of the codes with the largest cosine to the unit vectors `z` [..., C]."""
        codebook = F.normalize(self.embedding.weight.float(), dim=-1)  # [K, C]
        return (z @ codebook.T).argmax(dim=-1)

    def decode(self, ids: Tensor) -> Tensor:
        """Unit codes [..., C] of `ids` [...]."""
        return F.normalize(self.embedding(ids).float(), dim=-1)

    @torch.no_grad()
    def revive(self, dead: Tensor, z: Tensor, generator: torch.Generator | None = None) -> None:
        """Move the codes `dead` [K] bool onto random vectors of `z` [M, C], so that small trainings use them all."""
        count = min(int(dead.sum()), len(z))
        chosen = torch.randperm(len(z), generator=generator)[:count]
        slots = dead.nonzero().squeeze(1)[:count]
        self.embedding.weight[slots] = F.normalize(z[chosen].float(), dim=-1).to(self.embedding.weight)
