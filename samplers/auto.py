"""The fastest way to the tokens of the sequential sampler, found by trying."""

import time
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from samplers.jacobi import Jacobi
from samplers.logits import Noise, Sampling
from samplers.settings import settings
from samplers.steps import GuidanceScale, Origin, Sequential, Session, Step

WINDOW = 8  # of Jacobi: on two cores faster than 16, which takes fewer forward passes
TRIED = 3  # forward passes of Jacobi, the first of which is not timed
CPU_IMAGES = 1  # with more at a time, a forward pass over their windows takes a CPU longer than the passes it saves


@settings
class Auto:
    """Chooses between `sequential` and `jacobi`, whichever is faster here; the image is the same either way.

    `Sequential` writes the first row, `Jacobi` goes on, and the one that wrote more tokens a second finishes. Of several images at a time on a
    CPU `Sequential` writes all. Nothing is thrown away: a sampler takes up the cells that the other has decided.
    """

    name = "auto"
    lossless = True

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.steps.Sequential`."""
        settings = sampling, guidance_scale, noise
        last, speed = Step(tokens, 0), 0.0

        def watched(steps: Iterator[Step], begun: Step, forward_passes: int | None = None) -> Iterator[Step]:
            """So many steps of a sampler that took the grid up at `begun`, timed."""
            nonlocal last, speed
            started, first = None, 0
            before = (
                torch.full(tokens.shape, Origin.GIVEN, dtype=torch.int8) if begun.origins is None else begun.origins
            )
            for step in islice(steps, forward_passes):
                new = ((step.tokens >= 0) & (begun.tokens < 0)).cpu()  # waits for the device
                origins = torch.full_like(before, Origin.DRAWN) if step.origins is None else step.origins
                last = Step(step.tokens, begun.forward_passes + step.forward_passes, torch.where(new, origins, before))
                decided, now = int(new.sum()), time.perf_counter()
                if started is None:
                    started, first = now, decided
                else:
                    speed = (decided - first) / (now - started)
                yield last

        trying = tokens.device.type != "cpu" or len(tokens) <= CPU_IMAGES
        yield from watched(Sequential()(session, tokens, *settings), last, session.columns if trying else None)
        if (last.tokens >= 0).all():
            return
        begun, plain_speed = last, speed
        jacobi = Jacobi(WINDOW)(session, begun.tokens, *settings)
        yield from watched(jacobi, begun, TRIED)
        if speed > plain_speed:
            yield from watched(jacobi, begun)
        elif (last.tokens < 0).any():
            yield from watched(Sequential()(session, last.tokens, *settings), last)
