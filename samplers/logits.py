"""From logits to one drawn token, as pure functions of the logits and of noise that is fixed for every cell.

Letters in shape comments: B images, N cells of an image, n cells of a forward pass, K vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: unconditional + scale * (conditional - unconditional); scale 1 is no guidance."""
    return torch.lerp(unconditional, conditional, scale)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set everything below the k-th largest logit of [..., K] to -inf; ties with it stay. k = 0 keeps all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of tokens whose probability reaches p (nucleus sampling, arXiv 1904.09751)."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)  # mass of the larger tokens
    dropped = (before >= p).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -torch.inf)


@dataclass(frozen=True)
class Sampling:
    """Sampling of a token from logits.

    Args:
        temperature: divides the logits; 0 is greedy (the arg-max).
        top_k: number of tokens kept, 0 for all.
        top_p: probability mass kept, 1 for all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: expected 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected more than 0 and at most 1")

    def filter(self, logits: Tensor) -> Tensor:
        """Logits [..., K] -> float32 logits of the distribution that is drawn from (top-k before temperature)."""
        logits = keep_top_k(logits.float(), self.top_k)
        return keep_top_p(logits / (self.temperature or 1.0), self.top_p)


class Noise(Protocol):
    """Random numbers of each cell of each image, whatever else is decided in the forward pass and however often it is drawn."""

    def draw(self, logits: Tensor, cells: Tensor) -> Tensor:
        """Filtered logits [B, n, K] of `cells` ([n] or [B, n], on the CPU) -> tokens [B, n]."""

    def numbers(self, row: int) -> Iterator[float]:
        """Uniform numbers in [0, 1) of one image, for samplers that need more than one draw a cell."""


@dataclass(frozen=True)
class Gumbel:
    """One vector of Gumbel noise for each cell: the arg-max of log-probabilities and noise is a draw from them.

    The same noise under nearly the same probabilities gives the same token, which is what lets parallel samplers find the
    tokens of the sequential one. The noise is a hash of a key and the token's number, so it takes no memory and is the same on
    every device.

    Args:
        keys: [B, N] int64, see `keys_of`.
    """

    keys: Tensor

    def draw(self, logits: Tensor, cells: Tensor) -> Tensor:
        """See `Noise.draw`."""
        rows = torch.arange(len(self.keys))[:, None]
        keys = self.keys[rows, cells.expand(len(self.keys), -1)].to(logits.device, non_blocking=True)
        return (logits + gumbel(keys, logits.shape[-1])).argmax(dim=-1)

    def numbers(self, row: int) -> Iterator[float]:
        """See `Noise.numbers`."""
        generator = torch.Generator().manual_seed(int(self.keys[row, 0]))
        while True:
            yield from torch.rand(256, generator=generator, dtype=torch.float64).tolist()


@dataclass(frozen=True)
class Recorded:
    """One uniform number for each cell, by inverse-transform sampling: for draws that were written down.

    Args:
        uniforms: [B, N] in [0, 1), of the cells, or in the order of use.
    """

    uniforms: Tensor

    def draw(self, logits: Tensor, cells: Tensor) -> Tensor:
        """See `Noise.draw`."""
        rows = torch.arange(len(self.uniforms))[:, None]
        numbers = self.uniforms[rows, cells.expand(len(self.uniforms), -1)].to(logits.device)
        return inverse_transform(logits.softmax(dim=-1), numbers)

    def numbers(self, row: int) -> Iterator[float]:
        """See `Noise.numbers`."""
        return iter(self.uniforms[row].tolist())


def inverse_transform(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token at which the running sum of probs [..., K] passes uniforms [...]."""
    total = probs.double().cumsum(dim=-1)
    reached = total > uniforms.double().unsqueeze(-1) * total[..., -1:]
    return reached.to(torch.uint8).argmax(dim=-1)


def gumbel(keys: Tensor, tokens: int) -> Tensor:
    """Keys [...] int64 -> standard Gumbel noise [..., tokens] float32."""
    steps = torch.arange(1, tokens + 1, device=keys.device) * -0x61C8864680B583EB
    bits = _shifted(_mixed(keys[..., None] + steps), 32)
    small = (bits.float() + 0.5) * 2.0**-32  # well resolved where it is small, which is where the noise is large
    return -torch.log(-torch.log1p(-small))


def _mixed(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 on int64."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def keys_of(generators: list[torch.Generator], count: int) -> Tensor:
    """[B, count] int64; row b comes from generators[b] alone, so that images are batch-invariant."""
    low, high = -(2**63), 2**63 - 1
    return torch.stack([torch.randint(low, high, (count,), generator=g, device=g.device).cpu() for g in generators])
