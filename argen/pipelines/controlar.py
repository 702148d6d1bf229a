"""Controlled generation with ControlAR (arXiv 2410.02705) on LlamaGen."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import VQModel
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast, T5EncoderModel

from argen.files import WEIGHTS
from argen.models.annotators import annotate, as_control, check_kind, resized
from argen.models.controlar import CELL, ControlAR
from argen.models.drafter import Drafter
from argen.models.files import emoji_text, load_network
from argen.models.t5 import read_t5
from argen.pipelines.base import Defaults
from argen.pipelines.llamagen import LlamaGenPipeline
from argen.request import Control
from tokenizers_img.hub import hub_file
from tokenizers_img.llamagen_vq import LlamaGenVQ
from tokenizers_img.vit_vqgan import ViTVQGAN


class ControlARPipeline(LlamaGenPipeline):
    """Args:
    any_size: the model was trained on images of any shape, whose sides are multiples of 16 pixels and whose cells fit its
        grid; else on squares of one size.
    others: see `LlamaGenPipeline`, with a `ControlAR` as transformer.
    """

    controlled = True

    def __init__(
        self,
        transformer: ControlAR,
        vq: VQModel | ViTVQGAN,
        text_encoder: T5EncoderModel | CLIPModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        groups: list[str] | None = None,
        any_size: bool = False,
        drafter: Drafter | None = None,
        class_names: list[str] | None = None,
    ):
        super().__init__(transformer, vq, text_encoder, tokenizer, groups, drafter, class_names)
        self.register_to_config(any_size=any_size)

    @classmethod
    def from_original(
        cls,
        generator: str | Path,
        image_tokenizer: str | Path,
        encoder: str,
        grid: int,
        resize: str,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerFast,
    ) -> "ControlARPipeline":
        """Load released files, as ``canny_MR.safetensors`` and ``vq_ds16_t2i.pt``; see `ControlAR.from_original`."""
        transformer = ControlAR.from_original(generator, encoder, grid, resize)
        vq = LlamaGenVQ.from_original(image_tokenizer).vq
        return cls(transformer, vq, text_encoder, tokenizer, any_size=grid == 48)

    official = Defaults(guidance_scale=4.0, top_k=2000)

    def prepare(self, control: Control) -> Control:
        """See `TokenPipeline.prepare`; the control image is brought to the size that the network reads. Without a requested size, a
        model of any size takes the control image's own, as near as whole cells come and as large as fits.

        Raises:
            ValueError: an unknown kind; a size that the model does not make; a control image of another shape than that.
        """
        check_kind(control.kind)
        cell = self.cell
        side = self.transformer.config.grid * cell
        width, height = control.image.size
        if control.size is not None:
            size = control.size
            self._check_size(size)
        else:
            size = self._fit_size(width, height) if self.config.any_size else (side, side)
        if abs(width * size[1] / height - size[0]) >= cell and abs(height * size[0] / width - size[1]) >= cell:
            fitting = self._fit_size(width, height)
            hint = f" or ask for the size {fitting[0]}x{fitting[1]}" if self.config.any_size else ""
            raise ValueError(
                f"the control image is {width} x {height}, of another shape than the image asked for, "
                f"{size[0]} x {size[1]}: crop it{hint}"
            )
        read = (size[0] // cell * CELL, size[1] // cell * CELL)
        return replace(control, image=resized(control.image, control.kind, read), size=size)

    @property
    def cell(self) -> int:
        """Side in pixels of what a token stands for in the image; in the control image it is `CELL`."""
        return self.image_tokenizer.stride

    @property
    def _max_cells(self) -> tuple[int, int]:
        """Largest number of cells of an image, and of one of its sides."""
        return self.transformer.length, self.vq.grid if isinstance(self.vq, ViTVQGAN) else self.transformer.length

    def _check_size(self, size: tuple[int, int]) -> None:
        cell, side = self.cell, self.transformer.config.grid * self.cell
        if not self.config.any_size and size != (side, side):
            raise ValueError(f"size is {size[0]} x {size[1]}: this model makes images of {side} x {side} only")
        cells, cells_of_side = self._max_cells
        if size[0] % cell or size[1] % cell or math.prod(size) > cells * cell**2 or max(size) > cells_of_side * cell:
            raise ValueError(
                f"size is {size[0]} x {size[1]}: expected multiples of {cell}, and at most {side} x {side} pixels in all"
            )

    def _fit_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the largest size in whole cells that has the aspect ratio of an image.

        Raises:
            ValueError: the aspect ratio is too extreme.
        """
        cells, cells_of_side = self._max_cells
        for rows in range(cells_of_side, 0, -1):
            columns = round(rows * width / height)
            if 1 <= columns <= cells_of_side and rows * columns <= cells:
                return columns * self.cell, rows * self.cell
        raise ValueError(f"the control image is {width} x {height}, too long and thin for this model: crop it")

    def shape_of(self, control: Control | None = None, num_tokens: int | None = None) -> tuple[int, int]:
        """See `TokenPipeline.shape_of`."""
        if control is None or num_tokens is not None:
            return super().shape_of(control, num_tokens)
        width, height = control.image.size
        return height // CELL, width // CELL

    def control(self, controls: list[Control]) -> Tensor:
        """See `LlamaGenPipeline.control`."""
        distinct_controls = list({id(control): control for control in controls}.values())
        images = torch.stack([as_control(annotate(control.image, control.kind)) for control in distinct_controls])
        added = self.transformer.control(images.to(self.device, self.transformer.dtype))  # [3, B, N, D]
        strength = torch.tensor(
            [control.strength for control in distinct_controls], device=self.device, dtype=added.dtype
        )
        rows = [
            next(i for i, distinct_control in enumerate(distinct_controls) if distinct_control is control)
            for control in controls
        ]
        return (added * strength[:, None, None])[:, rows]


def read_emoji(folder: Path) -> ControlARPipeline:
    """argen/emoji-control."""
    vq = load_network(ViTVQGAN, WEIGHTS / "emoji-vitvqgan")
    return ControlARPipeline(load_network(ControlAR, folder), vq, **emoji_text(), any_size=True)


def read_release(folder: Path, name: str, encoder: str, grid: int, resize: str) -> ControlARPipeline:
    """`name` is that of the released file, e.g. "canny_MR"; the others as in `ControlAR.from_original`."""
    vq = folder / "vq_ds16_t2i.pt"
    vq = vq if vq.is_file() else hub_file("peizesun/llamagen_t2i", vq.name)
    return ControlARPipeline.from_original(folder / f"{name}.safetensors", vq, encoder, grid, resize, *read_t5())
