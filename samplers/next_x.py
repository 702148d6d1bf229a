"""Next-X prediction: the entities of a picture are written one after the other, each by a flow from noise to data.

Paper: "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv 2502.20388). Fewer steps for later
entities: "DiSA: Diffusion Step Annealing in Autoregressive Image Generation" (arXiv 2505.20297).

Letters in shape comments: B pictures, K entities, T positions of one of them, N of all, C channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from samplers.flow import euler, euler_maruyama, even_times, heun, stochastic_times
from samplers.logits import guide

SOLVERS = ("sde", "euler", "heun")


class NextXSession(Protocol):
    """A network bound to the prompts of B pictures."""

    def velocity(self, entity: int, x: Tensor, time: float, guided: bool) -> tuple[Tensor, Tensor | None]:
        """Velocities of an entity [B, T, C] with the prompt and, where `guided`, without."""

    def finish(self, entity: int, x: Tensor) -> None:
        """Keep a finished entity [B, T, C] for those that follow."""


@dataclass(frozen=True, slots=True)
class NextXStep:
    """The state after a step of a flow.

    Attributes:
        sequence: [B, N, C], float32; the entity under way is still noisy, what follows is 0.
        entities: that are finished.
        passes: of the network, so far.
        progress: share of all steps.
    """

    sequence: Tensor
    entities: int
    passes: int
    progress: float


@dataclass(frozen=True)
class NextX:
    """How the flows are solved.

    Args:
        solver: "sde" (Euler-Maruyama, as published), "euler" or "heun".
        steps: of each entity's flow; two numbers are those of the first and of the last entity.
        precise: the state adds up in float64, as published; else in float32, for devices that have no float64.
    """

    solver: str = "sde"
    steps: int | tuple[int, int] = 40
    precise: bool = True

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown flow solver {self.solver!r}: expected one of {', '.join(SOLVERS)}")
        self.times(0, 1)

    def times(self, entity: int, entities: int) -> list[float]:
        """Of one of the entities."""
        first, last = (self.steps, self.steps) if isinstance(self.steps, int) else self.steps
        left = (entities - 1 - entity) / max(1, entities - 1)
        return (stochastic_times if self.solver == "sde" else even_times)(int(left * (first - last) + last))

    def __call__(
        self,
        session: NextXSession,
        lengths: Sequence[int],
        guidance_scale: float,
        noise: Callable[[int, int], tuple[Tensor, Tensor]],
    ) -> Iterator[NextXStep]:
        """Write all entities.

        Args:
            session: fresh.
            lengths: T of each entity.
            guidance_scale: of the last entity; it grows evenly from 1 at the first.
            noise: entity, number n of draws -> [B, T, C] to start from, and [n, B, T, C] for the stochastic steps.
        """
        schedules = [self.times(entity, len(lengths)) for entity in range(len(lengths))]
        total, done, passes, finished = sum(len(times) - 1 for times in schedules), 0, 0, []
        for entity, times in enumerate(schedules):
            scale = 1 + (guidance_scale - 1) * entity / (len(lengths) - 1) if len(lengths) > 1 else guidance_scale
            x, draws = noise(entity, len(times) - 2 if self.solver == "sde" else 0)

            def velocity(state: Tensor, time: float, entity=entity, scale=scale) -> Tensor:
                nonlocal passes
                passes += 1
                conditional, unconditional = session.velocity(entity, state.float(), time, scale > 1)
                return conditional if unconditional is None else guide(conditional, unconditional, scale)

            state = x.double() if self.precise else x
            if self.solver == "sde":
                states = euler_maruyama(velocity, state, times, draws)
            else:
                states = (euler if self.solver == "euler" else heun)(velocity, state, times)
            rest = x.new_zeros(len(x), sum(lengths[entity + 1 :]), x.shape[2])
            for state in states:
                done += 1
                last = done == sum(len(one) - 1 for one in schedules[: entity + 1])
                yield NextXStep(torch.cat([*finished, state.float(), rest], dim=1), entity + last, passes, done / total)
            finished.append(state.float())
            if entity + 1 < len(lengths):
                session.finish(entity, finished[-1])
                passes += 1
