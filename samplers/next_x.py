"""Next-X prediction: the entities of an image are written one after the other, each by a flow from noise to data.

Paper: "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv 2502.20388). Fewer steps for later
entities: "DiSA: Diffusion Step Annealing in Autoregressive Image Generation" (arXiv 2505.20297).

Letters in shape comments: B images, K entities, T positions of one of them, N of all, C channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor

from samplers.flow import Velocity, euler, euler_maruyama, even_times, heun, stochastic_times
from samplers.logits import guide
from samplers.settings import Field, settings
from samplers.steps import NOT_FINITE

Steps = Annotated[int, Field(ge=1, le=1000)]


class NextXSession(Protocol):
    """A network bound to the prompts of B images."""

    def velocity(self, entity: int, x: Tensor, time: float, guided: bool) -> tuple[Tensor, Tensor | None]:
        """Velocities of an entity [B, T, C] with the prompt and, where `guided`, without."""

    def finish(self, entity: int, x: Tensor) -> None:
        """Keep a finished entity [B, T, C] for those that follow."""


@dataclass(frozen=True, slots=True)
class NextXStep:
    """The state after a step of a flow.

    Attributes:
        sequence: [B, N, C] float32; the entity under way is still noisy, what follows is NaN.
        finished: positions of the entities that are finished.
        decided: the same, and of those under way the share of the steps that is done.
        forward_passes: of the network, so far.
    """

    sequence: Tensor
    finished: int
    decided: int
    forward_passes: int


@settings
class NextX:
    """Base of the samplers of flows: a subclass says which solver is used."""

    steps: Steps | tuple[Steps, Steps] = Field(
        default=40,
        description="steps from noise to image for each part that is written at a time; of two numbers the first is for the first part, the second for the last",
    )
    precise: bool = Field(
        default=True, description="add up the steps in float64, as published; off for devices without it"
    )
    lossless = True
    draws = "latents"
    noisy = False  # whether the solver draws noise at each step

    def times(self, entity: int, entities: int) -> list[float]:
        """Times of the solver for one of the entities."""
        first, last = (self.steps, self.steps) if isinstance(self.steps, int) else self.steps
        remaining = (entities - 1 - entity) / max(1, entities - 1)
        return (stochastic_times if self.noisy else even_times)(int(remaining * (first - last) + last))

    def states(self, velocity: Velocity, state: Tensor, times: list[float], draws: Tensor) -> Iterator[Tensor]:
        """The states [B, T, C] after every step of a flow."""
        raise NotImplementedError

    def __call__(
        self,
        session: NextXSession,
        latents: Tensor,
        lengths: Sequence[int],
        guidance_scale: float,
        noise: Callable[[int, int], tuple[Tensor, Tensor]],
    ) -> Iterator[NextXStep]:
        """Fill the positions of `latents` that are NaN.

        Args:
            session: fresh.
            latents: [B, N, C] float32; what is known of an entity is kept, and shown to the network with the noise of the time.
            lengths: T of each entity.
            guidance_scale: of the last entity; it grows evenly from 1 at the first.
            noise: entity, number n of draws -> [B, T, C] to start from, and [n, B, T, C] for the stochastic steps.
        """
        sequence, forward_passes, finished = latents.clone(), 0, 0
        for entity, length in enumerate(lengths):
            entity_cells = sequence[:, finished : finished + length]  # a view
            known, times = entity_cells.isfinite(), self.times(entity, len(lengths))
            start, draws = noise(
                entity, len(times) - 2 if self.noisy else 0
            )  # also of one that is finished: a generator runs on
            if not known.all():
                scale = guidance_scale
                if len(lengths) > 1:
                    scale = 1 + (guidance_scale - 1) * entity / (len(lengths) - 1)
                velocity = _Guided(session, entity, scale, entity_cells.clone(), known, start)
                states = self.states(velocity, start.double() if self.precise else start, times, draws)
                for index, state in enumerate(states, 1):
                    entity_cells[:] = torch.where(known, entity_cells, state.float())
                    under_way = length * index // (len(times) - 1)
                    complete = length if index == len(times) - 1 else 0
                    yield NextXStep(
                        sequence.clone(), finished + complete, finished + under_way, forward_passes + velocity.calls
                    )
                forward_passes += velocity.calls
                if not entity_cells.isfinite().all():
                    raise ValueError(NOT_FINITE)
            if entity + 1 < len(lengths):
                session.finish(entity, entity_cells)
                forward_passes += 1
            finished += length


@settings
class EulerMaruyama(NextX):
    """Follows the flow with some noise added at each step (Euler-Maruyama), as published: one forward pass a step."""

    name = "sde"
    noisy = True

    def states(self, velocity: Velocity, state: Tensor, times: list[float], draws: Tensor) -> Iterator[Tensor]:
        """See `NextX.states`."""
        return euler_maruyama(velocity, state, times, draws)


@settings
class Euler(NextX):
    """Follows the flow in straight steps without noise (Euler): one forward pass a step, good in fewer steps than the stochastic solver."""

    name = "euler"

    def states(self, velocity: Velocity, state: Tensor, times: list[float], draws: Tensor) -> Iterator[Tensor]:
        """See `NextX.states`."""
        return euler(velocity, state, times)


@settings
class Heun(NextX):
    """Follows the flow without noise and corrects each step at its end (Heun): two forward passes a step, so that half as many steps do."""

    name = "heun"

    def states(self, velocity: Velocity, state: Tensor, times: list[float], draws: Tensor) -> Iterator[Tensor]:
        """See `NextX.states`."""
        return heun(velocity, state, times)


@dataclass
class _Guided:
    """The guided velocity of one entity; what is `known` of it stays where the flow would have it."""

    session: NextXSession
    entity: int
    scale: float
    latents: Tensor
    known: Tensor
    start: Tensor
    calls: int = 0

    def __call__(self, state: Tensor, time: float) -> Tensor:
        self.calls += 1
        noisy = torch.where(self.known, (1 - time) * self.latents + time * self.start, state.float())
        conditional, unconditional = self.session.velocity(self.entity, noisy, time, self.scale > 1)
        return conditional if unconditional is None else guide(conditional, unconditional, self.scale)
