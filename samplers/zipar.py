"""ZipAR: rows of the image are written side by side, each a few cells behind the one above. A fast preview, without a bound
on what is lost, and no training.

Paper: "ZipAR: Parallel Auto-regressive Image Generation through Spatial Locality" (arXiv 2412.04062).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from samplers.logits import Noise, Sampling
from samplers.settings import Field, settings
from samplers.steps import MAX_WINDOW, START, GuidanceScale, Session, Step, guided, pick


@settings
class ZipAR:
    """Writes several rows side by side, each some tokens behind the one above (ZipAR): a fast preview, with visible losses.

    With a window as wide as the image it is `Sequential`.     The first token of a row follows the last one of the row above; until that is written, the latest one of that row stands
    in for it.
    """

    window: int = Field(
        default=4,
        ge=1,
        le=MAX_WINDOW,
        description="how many tokens the row above must be ahead: fewer are faster and worse",
    )
    name = "zipar"
    lossless = False

    def __call__(
        self, session: Session, tokens: Tensor, sampling: Sampling, guidance_scale: GuidanceScale, noise: Noise
    ) -> Iterator[Step]:
        """See `samplers.steps.Sequential`."""
        fixed_tokens, columns, length = tokens.cpu(), session.columns, session.length
        rows, window = length // columns, min(self.window, session.columns)
        decided_tokens, ends = fixed_tokens.clone(), [0] * rows  # of each row, so many cells are decided
        stored = torch.zeros(length, dtype=torch.bool)  # cells that the network has read
        read = torch.zeros(length, dtype=torch.bool)  # those of them whose true token it was

        def decide(logits: Tensor, cells: Tensor) -> None:
            sampled = pick(logits, sampling, noise, cells).cpu()
            decided_tokens[:, cells] = torch.where(fixed_tokens[:, cells] >= 0, fixed_tokens[:, cells], sampled)
            for cell in cells.tolist():
                ends[cell // columns] += 1

        start = torch.full((len(tokens), 1), START, device=tokens.device)
        first = torch.tensor([0])
        decide(guided(*session.forward(start, torch.tensor([START])), guidance_scale, first), first)
        forward_passes = 1
        yield Step(self._decided(decided_tokens, fixed_tokens, ends, columns, tokens.device), forward_passes)
        while ends[-1] < columns:
            ready = [
                row * columns + end
                for row, end in enumerate(ends)
                if end < columns and (row == 0 or ends[row - 1] >= min(end + window, columns))
            ]
            behind = [cell for cell in range(length) if cell % columns < ends[cell // columns] and not read[cell]]
            cells_to_read = sorted({cell - 1 for cell in ready} | set(behind))
            fed = decided_tokens[:, cells_to_read].clone()
            for index, cell in enumerate(cells_to_read):
                row, column = divmod(cell, columns)
                if column >= ends[row]:  # the row's end is not written yet
                    fed[:, index] = decided_tokens[:, row * columns + ends[row] - 1]
                stored[cell], read[cell] = True, column < ends[row]
            positions = torch.tensor(cells_to_read)
            visible = stored & (torch.arange(length) <= positions[:, None])
            halves = session.forward(fed.to(tokens.device), positions, seen=visible)
            logits = guided(*halves, guidance_scale, positions + 1)
            decide(logits[:, [cells_to_read.index(cell - 1) for cell in ready]], torch.tensor(ready))
            forward_passes += 1
            yield Step(self._decided(decided_tokens, fixed_tokens, ends, columns, tokens.device), forward_passes)

    @staticmethod
    def _decided(
        decided_tokens: Tensor, fixed_tokens: Tensor, ends: list[int], columns: int, device: torch.device
    ) -> Tensor:
        is_decided = (torch.arange(columns) < torch.tensor(ends)[:, None]).flatten()
        return torch.where(is_decided, decided_tokens, fixed_tokens).to(device)
