"""Canvases that generators fill: a grid of token ids, a sequence of them, or a grid of latents.

Letters in shape comments: B images, h w cells, N = h*w (row-major), C channels of latents. A cell is undecided where its id is -1, or where
its latents are NaN.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from argen.request import Grid
from samplers.errors import InvalidValue


@dataclass(frozen=True)
class TokenGrid:
    """Grid of token ids [B, h, w], each in its place in the image.

    Attributes:
        discrete: whether cells hold ids, whose probabilities are known.
        placed: whether a cell has a place in the image, so that a mask can select it.
    """

    discrete = True
    placed = True

    def empty(self, count: int, shape: tuple[int, int]) -> Tensor:
        """Create the undecided cells of `count` images."""
        return torch.full((count, *shape), -1)

    def to_grid(self, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        """Convert tokens [B, N], as a pipeline's `stream` yields them, to the shape of `empty`."""
        return tokens.unflatten(1, shape)

    def mask(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """Mark `cells` ([B, h, w] or [h, w] bool) of tokens as undecided."""
        return torch.where(cells.to(tokens.device), -1, tokens)

    def resume_state(self, step: Any) -> Tensor:
        """Return the tokens of the last step, from which `stream` can resume."""
        return step.tokens

    def decided(self, tokens: Tensor) -> Tensor:
        """Return which cells can be shown, [B, h, w] bool."""
        return tokens >= 0

    def fill(self, tokens: Tensor, blank: Tensor) -> Tensor:
        """Replace undecided cells by `blank` ([h, w]), so that the tokens can be decoded."""
        return torch.where(self.decided(tokens), tokens, blank.to(tokens.device))

    def check(self, tokens: Any, shape: tuple[int, ...], codes: int | None) -> Tensor:
        """The tokens that a caller gives to go on from, as `stream` takes them.

        Args:
            shape: expected, [B, N].
            codes: the ids are below it; None where that is not known.

        Raises:
            ValueError: no tensor of whole numbers of this shape, or an id that does not exist.
        """
        kind = str(tokens.dtype).removeprefix("torch.") if isinstance(tokens, Tensor) else type(tokens).__name__
        if kind not in ("int64", "int32", "int16"):
            raise InvalidValue(
                f"tokens are of the type {kind}: expected a tensor of int64, -1 in the cells to fill", "tokens"
            )
        if tuple(tokens.shape) != shape:
            raise InvalidValue(f"tokens are {list(tokens.shape)}: expected {list(shape)}", "tokens")
        wrong = tokens[(tokens < -1) | (tokens >= (2**63 - 1 if codes is None else codes))]
        if len(wrong):
            below = "" if codes is None else f" below {codes}"
            raise InvalidValue(
                f"token {int(wrong[0])} does not exist: expected ids{below}, -1 in the cells to fill", "tokens"
            )
        return tokens.long()

    def equal(self, tokens: Tensor, others: Tensor) -> bool:
        """Whether two grids hold the same; cells that are undecided in both are the same."""
        return bool(((tokens == others) | (tokens != tokens) & (others != others)).all())

    def parse(self, rows: Grid, shape: tuple[int, int], codes: int | None) -> Tensor:
        """Convert the grid of a request to tokens [1, N], as `stream` takes them.

        Raises:
            ValueError: a grid of another shape; an id that is not below `codes`.
        """
        grid = torch.tensor(rows)
        if tuple(grid.shape) != tuple(shape):
            raise ValueError(
                f"tokens are {grid.shape[0]} x {grid.shape[1]}: expected {shape[0]} x {shape[1]}, as this model writes them"
            )
        return self.check(grid.flatten()[None], (1, grid.numel()), codes)


@dataclass(frozen=True)
class TokenSequence(TokenGrid):
    """Sequence of token ids [B, 1, k], each of which describes the whole image.

    Args:
        progressive: whether every prefix is an image, as with FlexTok.
    """

    progressive: bool = False
    placed = False

    def to_grid(self, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        """See `TokenGrid.to_grid`: one row, of whatever length."""
        return tokens[:, None]

    def decided(self, tokens: Tensor) -> Tensor:
        """See `TokenGrid.decided`: an image is shown as a whole, from its first token on or with its last."""
        is_decided = tokens >= 0
        visible = is_decided[..., :1] if self.progressive else is_decided.all(dim=2, keepdim=True)
        return visible.expand_as(tokens)


@dataclass(frozen=True)
class LatentGrid(TokenGrid):
    """Grid of latents [B, C, h, w] of `channels`."""

    channels: int
    discrete = False

    def empty(self, count: int, shape: tuple[int, int]) -> Tensor:
        """See `TokenGrid.empty`."""
        return torch.full((count, self.channels, *shape), math.nan)

    def to_grid(self, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        """See `TokenGrid.to_grid`: `stream` yields a grid already."""
        return tokens

    def mask(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """See `TokenGrid.mask`."""
        return tokens.masked_fill(cells.to(tokens.device).expand(len(tokens), *tokens.shape[2:])[:, None], math.nan)

    def resume_state(self, step: Any) -> Tensor:
        """See `TokenGrid.resume_state`: latents that are still noisy start again."""
        return torch.where(step.finished[:, None], step.tokens, math.nan)

    def check(self, tokens: Any, shape: tuple[int, ...], codes: int | None) -> Tensor:
        """See `TokenGrid.check`: latents [B, C, h, w], NaN in the cells to fill."""
        if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise InvalidValue(f"latents are of the type {kind}: expected a tensor of float32", "tokens")
        if tuple(tokens.shape) != shape:
            raise InvalidValue(f"latents are {list(tokens.shape)}: expected {list(shape)}", "tokens")
        if tokens.isinf().any():
            raise InvalidValue(
                "latents hold infinite numbers: expected finite ones, NaN in the cells to fill", "tokens"
            )
        return tokens.float()

    def decided(self, tokens: Tensor) -> Tensor:
        """See `TokenGrid.decided`."""
        return tokens.isfinite().all(dim=1)

    def fill(self, tokens: Tensor, blank: Tensor) -> Tensor:
        """See `TokenGrid.fill`: zeros."""
        return tokens.nan_to_num(0.0)


def check_grids(generator: Any, image_tokenizer: Any) -> None:
    """Raises:
    ValueError: a generator writes a larger grid than that of an image tokenizer whose images have one size.
    """
    expected = getattr(image_tokenizer, "grid", None)
    if isinstance(expected, int) and generator.config.grid > expected:
        raise ValueError(
            f"the generator writes {generator.config.grid} x {generator.config.grid} tokens, the image tokenizer reads "
            f"{expected} x {expected}: expected a generator of this tokenizer"
        )
