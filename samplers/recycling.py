"""Token Recycling: what the target found probable after a token is drafted when that token comes again. No training.

Paper: "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling" (arXiv 2408.08696).
Here the candidates are drawn from the recycled distribution, so that sampling stays lossless, and the table is started afresh for each run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.logits import Noise, Sampling
from samplers.settings import Field, settings
from samplers.speculative import Speculative
from samplers.steps import GuidanceScale, Session, Step
from samplers.trees import TREE, TREE_CHOICES, Shape, TreeName


@dataclass
class Table:
    """A `samplers.speculative.Drafter`: of each token of an image, the `width` most probable tokens after it, as the target last saw it
    in this image.

    A guess of a hidden state is here the token itself.
    """

    width: int
    rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # image, token -> those after it, their log-probabilities
    codes: int = 0  # K, once a forward pass was seen

    def begin(self, session: Session) -> "Table":
        """See `samplers.speculative.Drafter.begin`."""
        return Table(self.width)

    def read(self, tokens: Tensor, cells: Tensor, nodes: Tensor, ahead: Tensor) -> Tensor:
        """See `samplers.trees.Drafting.read`."""
        return tokens.gather(1, (ahead - 1)[:, None].to(tokens.device))[:, :, None]

    def guess(self, tokens: Tensor, cells: Tensor, hidden: Tensor, tree: Tensor, root: Tensor) -> Tensor:
        """See `samplers.trees.Drafting.guess`."""
        return tokens[:, :, None]

    def logits(self, hidden: Tensor) -> tuple[Tensor, None]:
        """See `samplers.trees.Drafting.logits`; a token that was not seen yet is followed by itself, or by any other."""
        out = torch.full((*hidden.shape[:2], self.codes), -20.0)
        for image, row in enumerate(hidden[:, :, 0].tolist()):
            for place, token in enumerate(row):
                likely, log_probs = self.rows.get((image, token), (torch.tensor([token]), torch.zeros(1)))
                out[image, place, likely] = log_probs
        return out, None

    def observe(self, tokens: Tensor, logits: Tensor, target_probs: Tensor) -> None:
        """See `samplers.trees.Drafting.observe`."""
        self.codes = logits.shape[-1]
        values, indices = logits.cpu().log_softmax(dim=-1).topk(min(self.width, logits.shape[-1]), dim=-1)
        for image, row in enumerate(tokens.tolist()):
            for place, token in enumerate(row):
                if token >= 0:  # neither the start nor a node of a larger tree of the batch
                    self.rows[image, token] = indices[image, place], values[image, place]


@settings
class TokenRecycling:
    """Drafts what followed the same token earlier in this image, and checks it in one forward pass (token recycling): fewer passes, other images
    than one by one, equally probable ones."""

    width: int = Field(default=8, ge=1, le=1024, description="how many probable followers of each token are remembered")
    tree: Shape | TreeName = Field(default="static", description=TREE, json_schema_extra=TREE_CHOICES)
    name = "recycling"
    resumes = "in distribution"
    lossless = True

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.steps.Sequential`."""
        sampler = Speculative(self.tree, drafter=Table(self.width))
        yield from sampler(session, tokens, sampling, guidance_scale, noise)
