"""A custom sampler: greedy where the network is confident, elsewhere tokens are sampled."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import argen
from argen.metadata import save_images
from argen.request import Request
from samplers.logits import Noise, Sampling
from samplers.settings import Field, settings
from samplers.steps import START, GuidanceScale, Session, Step, next_logits, pick


@settings
class Careful:
    """Sequential, but greedy where the network is confident."""

    sure: float = Field(
        default=0.7, ge=0, le=1, description="probability from which on the most probable token is taken"
    )
    name = "careful"
    lossless = False

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        tokens, waiting = tokens.clone(), [START]
        for cell in range(session.length):
            logits = next_logits(session, tokens, waiting, guidance_scale, cell)
            probability, greedy = sampling.filter(logits)[:, 0].softmax(dim=-1).max(dim=-1)
            sampled = pick(logits, sampling, noise, torch.tensor([cell]))[:, 0]
            sampled = torch.where(probability >= self.sure, greedy, sampled)
            tokens[:, cell] = torch.where(tokens[:, cell] < 0, sampled, tokens[:, cell])
            waiting = [cell]
            yield Step(tokens.clone(), cell + 1)


argen.register("sampler", "careful", Careful)  # from here on the page, the APIs and the axes have it, too
pipe = argen.load("argen/emoji-llamagen")
*_, job = pipe.run(Request("a pizza", sampler="careful:sure=0.5", seed=1))
save_images(list(zip(job.images, job.requests, strict=True)), [Path("careful.png")])
print("careful.png")
