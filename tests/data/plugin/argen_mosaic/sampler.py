"""A sampler that cools down while it draws."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from samplers.logits import Noise, Sampling
from samplers.settings import Field, settings
from samplers.steps import START, GuidanceScale, Session, Step, next_logits, pick


@settings
class Annealed:
    """One token a pass, at a temperature that changes from the first cell to the last."""

    start: float = Field(default=1.2, ge=0, le=10, description="temperature of the first cell, in parts of the model's")
    end: float = Field(default=0.6, ge=0, le=10, description="temperature of the last cell, in parts of the model's")
    curve: float = Field(
        default=1.0, gt=0, le=10, description="how late it changes", json_schema_extra={"note": "1: evenly"}
    )
    name = "annealed"
    lossless = False

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.steps.Sequential`."""
        tokens, waiting, forward_passes = tokens.clone(), [START], 0
        for cell in range(session.length):
            if (tokens[:, cell] >= 0).all():  # it was given, and is only read
                waiting.append(cell)
                continue
            share = (cell / max(1, session.length - 1)) ** self.curve
            scale = self.start + share * (self.end - self.start)
            logits = next_logits(session, tokens, waiting, guidance_scale, cell)
            at = replace(sampling, temperature=scale * sampling.temperature)
            drawn = pick(logits, at, noise, torch.tensor([cell]))[:, 0].to(tokens.device)
            tokens[:, cell] = torch.where(tokens[:, cell] < 0, drawn, tokens[:, cell])
            waiting, forward_passes = [cell], forward_passes + 1
            yield Step(tokens.clone(), forward_passes)
