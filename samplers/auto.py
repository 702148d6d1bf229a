"""The fastest way to the plain sampler's own tokens, found by trying."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from samplers.jacobi import Jacobi
from samplers.logits import Noise, Sampling
from samplers.steps import GuidanceScale, Plain, Sampler, Session, Step

TRIED = 5  # passes of each sampler, the first of which is not timed


@dataclass(frozen=True)
class Auto:
    """Exactly the picture of `Plain`: it begins, `Jacobi` goes on, and the one that wrote more tokens a second finishes.

    Nothing is thrown away: a sampler takes up the cells that the other has decided.
    """

    name = "auto"
    lossless = True

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.steps.Plain`."""
        last, speeds = Step(tokens, 0), []
        plain, jacobi = Plain(), Jacobi()

        def go_on(sampler: Sampler, passes: int | None = None) -> Iterator[Step]:
            """Let a sampler make so many passes, and time them."""
            nonlocal last
            if (last.tokens >= 0).all():
                return
            before, started, first = last.passes, 0.0, 0
            for count, step in enumerate(sampler(session, last.tokens, sampling, guidance_scale, noise)):
                last = replace(step, passes=before + step.passes)
                decided = int((last.tokens >= 0).sum())  # waits for the device
                if count == 0:
                    started, first = time.perf_counter(), decided
                yield last
                if count + 1 == passes:
                    speeds.append((decided - first) / (time.perf_counter() - started))
                    return

        yield from go_on(plain, TRIED)
        yield from go_on(jacobi, TRIED)
        yield from go_on(jacobi if len(speeds) < 2 or speeds[1] > speeds[0] else plain)
