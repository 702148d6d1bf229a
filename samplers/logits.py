"""From logits to one drawn token, as pure functions.

Letters in shape comments: B batch, K vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
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
    """How a token is drawn from logits.

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


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-transform sampling: the first token at which the running sum of probs [..., K] passes uniforms [...].

    A draw depends on nothing but its own row and its own uniform number in [0, 1).
    """
    total = probs.double().cumsum(dim=-1)
    reached = total > uniforms.double().unsqueeze(-1) * total[..., -1:]
    return reached.to(torch.uint8).argmax(dim=-1)


def uniforms(generators: list[torch.Generator], count: int) -> Tensor:
    """[B, count] float64 numbers in [0, 1): row b comes from generators[b] alone, so a picture never feels its batch."""
    rows = [torch.rand(count, generator=g, dtype=torch.float64, device=g.device).cpu() for g in generators]
    return torch.stack(rows)
