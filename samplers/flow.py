"""Solvers of a rectified flow: from noise at time 1 to data at time 0 along a network's velocity (noise minus data).

Each yields the state after every step, so that it can be shown and stopped. The state keeps the dtype it comes with: the
authors' solvers add up in float64, where a device has it. Times are plain numbers; nothing in a loop waits for the device.

Papers: "Flow Straight and Fast" (arXiv 2209.03003), SiT (arXiv 2401.08740), xAR (arXiv 2502.20388), "Eliminating
Oversaturation and Artifacts of High Guidance Scales in Diffusion Models" (arXiv 2410.02416).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # state, time -> velocity, of the state's shape
LAST = 0.04  # the time from which the stochastic solver goes straight to the data


def even_times(steps: int) -> list[float]:
    """`steps` + 1 times from 1 to 0, for `euler` and `heun`."""
    return torch.linspace(1, 0, _checked(steps) + 1, dtype=torch.float64).tolist()


def stochastic_times(steps: int) -> list[float]:
    """`steps` + 1 times from 1 through `LAST` to 0, for `euler_maruyama`."""
    return [*torch.linspace(1, LAST, _checked(steps), dtype=torch.float64).tolist(), 0.0]


def _checked(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"the number of flow steps is {steps}: expected at least 1")
    return steps


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """The straight line of the velocity from each time to the next."""
    for now, then in pairwise(times):
        x = x + (then - now) * velocity(x, now).to(x.dtype)
        yield x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
    """The mean of the velocities at both ends of a step: two calls of the network, but for the last step."""
    for now, then in pairwise(times):
        first = velocity(x, now).to(x.dtype)
        ahead = x + (then - now) * first
        if then > 0:
            ahead = x + (then - now) * (first + velocity(ahead, then).to(x.dtype)) / 2
        x = ahead
        yield x


def euler_maruyama(velocity: Velocity, x: Tensor, times: Sequence[float], noise: Tensor) -> Iterator[Tensor]:
    """The stochastic equation with diffusion 2t, whose marginals are those of the flow; the last step adds no noise.

    Args:
        noise: [len(times) - 2, *x.shape], standard normal.
    """
    for index, (now, then) in enumerate(pairwise(times)):
        drift = (2 - now) * velocity(x, now).to(x.dtype) + x
        x = x + drift * (then - now)
        if index < len(noise):
            x = x + (2 * now) ** 0.5 * (now - then) ** 0.5 * noise[index].to(x.dtype)
        yield x


class NormalisedGuidance:
    """Adaptive projected guidance: the difference that guidance makes is smoothed over the steps, bounded, and freed of what
    lies along the prediction itself. One object serves one run.

    Args:
        momentum: share of the differences so far that joins the next (negative: it is taken away).
        threshold: on the norm of an image's difference.
        precise: the projection is computed in float64, as published.
    """

    def __init__(self, momentum: float = -0.5, threshold: float = 2.5, precise: bool = True):
        self.momentum, self.threshold = momentum, threshold
        self.dtype = torch.float64 if precise else torch.float32
        self.running: Tensor | float = 0.0

    def __call__(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Velocities [B, ...] with and without the condition -> guided; scale 1 is no guidance."""
        every = tuple(range(1, conditional.ndim))
        self.running = conditional - unconditional + self.momentum * self.running
        norm = torch.linalg.vector_norm(self.running, dim=every, keepdim=True)
        difference = (self.running * (self.threshold / norm).clamp(max=1)).to(self.dtype)
        along = conditional.to(self.dtype)
        along = along / torch.linalg.vector_norm(along, dim=every, keepdim=True).clamp(min=1e-12)
        across = difference - (difference * along).sum(dim=every, keepdim=True) * along
        return conditional + (scale - 1) * across.to(conditional.dtype)
