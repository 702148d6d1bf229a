"""Layers that several networks share.

Letters in shape comments: R rows, n tokens, D width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from argen.device import fast_dtype, free

COPIES = 16  # of a weight that must fit into free memory, so that it is packed: other weights and an image's numbers need some, too
PACKED = WeakTensorKeyDictionary()  # weight -> what it was packed from, and for each slice of it its form for oneDNN


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, two to three times faster for the few rows of a decoding step on a CPU.

    There the weight is packed for oneDNN when it is first used, and kept so beside itself if there is memory for many such copies.
    """
    if x.device.type != "cpu" or x.dtype != weight.dtype or not _packs(weight):
        return F.linear(x, weight, bias)
    # where there are no units for bfloat16 it is computed as float32
    dtype = weight.dtype if weight.dtype == torch.float32 else fast_dtype("cpu")
    if (packed := _packed(weight, dtype)) is None:
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.to(dtype)
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "").to(x.dtype)


def _packs(weight: Tensor) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or weight.is_inference():
        return False
    return weight.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The packed form of a weight; None where memory does not hold it, which is looked at once for each weight."""
    base = weight if weight._base is None else weight._base  # a slice is another tensor each time it is taken
    state = base._version, base.data_ptr(), base.dtype, dtype  # a weight that was trained or moved is packed again
    if PACKED.get(base, (None,))[0] != state:
        PACKED[base] = state, {}
    place, packed = (weight.storage_offset(), weight.shape, weight.stride()), PACKED[base][1]
    if place not in packed:
        fits = COPIES * weight.numel() * dtype.itemsize <= free("cpu")
        packed[place] = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), 8) if fits else None
    return packed[place]


class Linear(nn.Linear):
    """``nn.Linear`` through `linear`; not where `packs` is false."""

    packs = True

    def forward(self, x: Tensor) -> Tensor:
        return (linear if self.packs else F.linear)(x, self.weight, self.bias)


def leave_unpacked(network: nn.Module) -> None:
    """Let the layers of a network have no second copy of their weights: one that works once for an image gains nothing by it."""
    for part in network.modules():
        if isinstance(part, Linear):
            part.packs = False


def check_heads(dim: int, heads: int) -> int:
    """`heads`, of a network of the width `dim`.

    Raises:
        ValueError: they do not divide it.
    """
    if heads < 1 or dim % heads:
        raise ValueError(f"heads is {heads}: expected a divisor of the width {dim}")
    return heads


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, n, D] -> [B, n, H, D/H], the layout of diffusers' attention dispatcher."""
    return x.unflatten(-1, (heads, -1))


def causal_mask(new: int, total: int, device: torch.device) -> Tensor:
    """[1, 1, new, total] bool: the last `new` of `total` tokens, each seeing everything up to itself."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)[None, None]


class RMSNorm(nn.Module):
    """In float32 up to the weight."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn neighbouring pairs of x [R, n, H, D/H] by the angles whose (cos, sin) `freqs_cis` [R or 1, n, 1, D/2H, 2] holds."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cis.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def grid_places(side: int) -> Tensor:
    """Row and column [side * side, 2] of each cell of a square grid."""
    positions = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack(positions, dim=-1).flatten(0, 1)


def rotary_table(head_dim: int, positions: Tensor) -> Tensor:
    """(cos, sin) [N, head_dim / 2, 2] of each of N places (row, column): the first half of the angles turns with the row."""
    rates = 10000.0 ** (-2 * torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 2))
    angles = (positions[..., None] * rates).flatten(1)  # [N, 2, head_dim / 4]
    return torch.stack([angles.cos(), angles.sin()], dim=-1)
