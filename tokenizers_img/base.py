"""What every image tokenizer offers, whatever its tokens are."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class ImageTokenizer(Protocol):
    """Pixels <-> tokens: ids [B, N] int64 of a codebook, or latents [B, C, h, w].

    Attributes:
        config: a mapping with attributes: `image_size` (side S of its images, in pixels), and `n_embed` (codes) of a tokenizer with ids or
            `latent_channels` (C) of one with latents; `tokens` (N) where the first tokens alone can be decoded.
    """

    config: Any

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] -> ids [B, N] int64, or latents [B, C, h, w]."""
        ...

    def decode(self, tokens: Tensor, /) -> Tensor:
        """Ids, or latents, as `encode` gives them -> pixels [B, 3, H, W], about [0, 1]."""
        ...
