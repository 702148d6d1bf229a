"""GPTQ (arXiv 2210.17323) and the token weights of RSQ (arXiv 2503.01820): integers of a linear layer that keep its outputs, not its weights.

Numbers are those of github.com/ylsung/rsq (Apache-2.0), also its quirk that the scale of a group is found on weights that lack the updates
of the current block of columns.

Letters in shape comments: O outputs, I inputs, G groups of columns, N sequences, T tokens, H heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from argen.models.quantized import SMALLEST

BLOCK = 128  # columns whose updates of later columns are applied together
DAMP, ATTEMPTS = 0.01, 49  # of the mean diagonal, added until the Hessian is positive definite
SHRINKS = [1 - step / 100 for step in range(80)]  # of the range of a row, which the clip search tries
POWER = 2.4  # of the error that it compares
R_MIN = 0.005  # importance of the least attended token


@dataclass(frozen=True)
class Levels:
    """The values that the weights of a row or a group may take.

    Attributes:
        bits: of a weight, 2 to 8.
        symmetric: zero is in the middle; else integers begin at 0 and a zero point is kept.
        clip: whether the range is shrunk where that makes the error smaller.
    """

    bits: int
    symmetric: bool = True
    clip: bool = False

    def find(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points [O, 1] of weights [O, I]."""
        low, high = weight.amin(dim=1, keepdim=True).clamp(max=0), weight.amax(dim=1, keepdim=True).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high).clamp(min=SMALLEST)
            low = torch.zeros_like(high)
        else:
            empty = (low == 0) & (high == 0)
            low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        best: Tensor | None = None
        for shrink in SHRINKS if self.clip else SHRINKS[:1]:
            scale = (shrink * high - shrink * low).clamp(min=0 if shrink < 1 else SMALLEST) / self.most
            zero = torch.zeros_like(scale) if self.symmetric else torch.round(-shrink * low / scale)
            error = (self.values(self.round(weight, scale, zero), scale, zero) - weight).abs().pow(POWER)
            error = error.sum(dim=1, keepdim=True)
            if best is None:
                best, scales, zeros = error, scale, zero
            better = error < best
            best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
            zeros = torch.where(better, zero, zeros)
        return scales, zeros

    @property
    def most(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def round(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Weights -> the nearest integers, in the precision of the weights."""
        return ((weight / scale).round() + zero).clamp(-self.most - 1 if self.symmetric else 0, self.most)

    def values(self, integers: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Integers -> weights."""
        return scale * (integers - zero)


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        integers: [O, I].
        scales, zeros: [O, G].
        groups: [I], the group of each column.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor

    def dequantized(self) -> Tensor:
        """The weights [O, I] that the integers stand for."""
        return self.scales[:, self.groups] * (self.integers - self.zeros[:, self.groups])


def hessian(inputs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum [I, I] of the outer products of inputs [..., I], with `weights` [...] of the tokens."""
    x = inputs.flatten(0, -2).float()
    if weights is not None:
        x = x * weights.flatten()[:, None].sqrt()
    return x.T @ x


def importance(columns: Tensor, r_min: float = R_MIN) -> Tensor:
    """What attention of all heads and queries each token gets [N, T] -> its importance, from `r_min` to 1 in each sequence."""
    low, high = columns.amin(dim=1, keepdim=True), columns.amax(dim=1, keepdim=True)
    return r_min + (columns - low) / (high - low).clamp(min=1e-12) * (1 - r_min)


def token_weights(columns: Tensor, r_min: float = R_MIN) -> Tensor:
    """The same with a mean of 1, as `hessian` takes it."""
    r = importance(columns, r_min)
    return r / r.mean(dim=1, keepdim=True)


def inverse_factor(matrix: Tensor, damp: float = DAMP) -> Tensor:
    """Upper Cholesky factor [I, I] of the inverse of a Hessian, damped until it has one.

    Raises:
        ValueError: it has none, e.g. because it is not finite.
    """
    matrix, extra = matrix.clone(), damp * matrix.diagonal().mean()
    for _ in range(ATTEMPTS):
        matrix.diagonal().add_(extra)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper
    raise ValueError("the inputs of a layer are not finite: quantize with the method rtn")


def gptq(
    weight: Tensor, matrix: Tensor, levels: Levels, group: int = 0, act_order: bool = False, damp: float = DAMP
) -> Rounded:
    """Round a weight column by column; the error of each is made good by those that follow.

    Args:
        weight: [O, I].
        matrix: its Hessian [I, I], of any scale; columns that are always zero do not matter.
        group: columns that share a scale; 0 for whole rows.
        act_order: columns with the largest inputs first.
    """
    weight, matrix = weight.detach().float().clone(), matrix.float().clone()
    columns, scales, zeros = weight.shape[1], [], []
    if not group:
        scale, zero = levels.find(weight)
        scales, zeros = [scale], [zero]
    dead = matrix.diagonal() == 0
    matrix[dead, dead] = 1
    weight[:, dead] = 0
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = matrix.diagonal().argsort(descending=True)
        weight, matrix = weight[:, order], matrix[order][:, order]
    factor = inverse_factor(matrix, damp)
    integers = torch.empty_like(weight)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block, local = weight[:, start:end].clone(), factor[start:end, start:end]
        errors = torch.empty_like(block)
        for index in range(end - start):
            if group and (start + index) % group == 0:
                scale, zero = levels.find(weight[:, start + index : start + index + group])
                scales.append(scale)
                zeros.append(zero)
            column = block[:, index : index + 1]
            rounded = levels.round(column, scale, zero)
            integers[:, start + index] = rounded[:, 0]
            error = (column - levels.values(rounded, scale, zero)) / local[index, index]
            block[:, index:] -= error * local[index, index:]
            errors[:, index : index + 1] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    places = order.argsort()
    groups = torch.arange(columns, device=weight.device) // (group or columns)
    return Rounded(integers[:, places], torch.cat(scales, dim=1), torch.cat(zeros, dim=1), groups[places])
