"""Editing: inpainting and variations on the token grid of an image, for any pipeline with a grid."""

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

from argen.images import fitted, fitted_box
from argen.metadata import read_grid
from argen.pipelines.arguments import check_counts
from argen.request import Grid, Request
from samplers.errors import InvalidValue
from samplers.logits import Sampling
from samplers.steps import START, guided
from tokenizers_img.pixels import as_image, from_pil, normalized, on_white, to_mask, upright

if TYPE_CHECKING:
    from argen.pipelines.base import TokenPipelineOutput

COMPARED = 1024  # pixels, at most, of a side of an image that is compared with its tokens
SAME = 0.06  # mean difference of a cell, 0 to 1, up to which an image matches its tokens; scaling and file formats change it
ImageLike = Image.Image | np.ndarray | Tensor


class Editing(DiffusionPipeline):
    """Mixin of `TokenPipeline`: editing of existing images."""

    @overload
    def edit(
        self,
        prompt: str,
        image: ImageLike,
        mask: ImageLike | None = None,
        *,
        output_type: Literal["pil"] = ...,
        return_dict: Literal[True] = ...,
        **settings: Any,
    ) -> "TokenPipelineOutput[list[Image.Image]]": ...

    @overload
    def edit(
        self, prompt: str, image: ImageLike, mask: ImageLike | None = None, **settings: Any
    ) -> "TokenPipelineOutput | tuple": ...

    def edit(
        self, prompt: str, image: ImageLike, mask: ImageLike | None = None, **settings: Any
    ) -> "TokenPipelineOutput | tuple":
        """Inpaint an image: redraw all cells of the token grid that the mask touches.

        Args:
            image: of any size, padded to a square; a PIL image, an array or a tensor, see `tokenizers_img.pixels.as_image`.
            mask: of the same size, white where the image is redrawn; None uses the transparent part of `image`.
            settings: see `__call__`; several images with num_images_per_prompt share the same start.

        Raises:
            ValueError: the mask has another size, or is black; this model's tokens form no grid.
        """
        check_counts(settings.get("num_images_per_prompt", 1), settings.get("num_candidates"))
        grid = self.without(image, mask)
        num_drawn = settings.get("num_candidates") or settings.get("num_images_per_prompt", 1)
        grid = grid if grid.is_floating_point() else grid.flatten(1)
        return self(prompt, tokens=grid.expand(num_drawn, *grid.shape[1:]), **settings)

    def without(self, image: ImageLike, mask: ImageLike | None = None) -> Tensor:
        """Return the tokens of an image with the masked cells undecided: ids [1, h, w]. See `edit`."""
        image, mask = as_image(image), mask if mask is None else as_image(mask, "the mask")
        cells = masked_cells(image, mask, self.shape_of())
        stored = self._stored(read_grid(image), image, visible=mask is None)
        if stored is None:
            return self.canvas.mask(self.encode_images(from_pil(image, self.image_size)[None]), cells)
        tokens, box = stored
        cropped = upright(image).crop(box), None if mask is None else to_mask(mask).crop(box)
        return self.canvas.mask(tokens, masked_cells(*cropped, self.shape_of()))

    def read_tokens(self, image: Image.Image, grid: Grid | None = None) -> Tensor:
        """Return the tokens of an image of any size, padded to a square: ids [1, h, w]. Raises as `encode_images` does.

        Args:
            grid: of the image, where it is known (argen embeds it in its images); used if it decodes to this image, so that nothing
                is lost by encoding.
        """
        if (stored := self._stored(grid or read_grid(image), image)) is not None:
            return stored[0]
        return self.encode_images(from_pil(image, self.image_size)[None])

    def _stored(
        self, grid: Grid | None, image: Image.Image, visible: bool = False
    ) -> tuple[Tensor, tuple[int, int, int, int]] | None:
        """Return a grid as ids [1, h, w], and the box (left, top, right, bottom) of the image that it shows, if it belongs to this model
        and each of its cells matches the image; the image may have been scaled and padded by `argen.images.fitted`.

        Args:
            visible: compare only the opaque part.
        """
        if grid is None:
            return None
        shape, tokens = self.shape_of(), torch.tensor(grid)[None]
        codes = self.codes or 0
        if tuple(tokens.shape[1:]) != tuple(shape) or not 0 <= tokens.min() <= tokens.max() < codes:
            return None
        (decoded,) = self.images(tokens.to(self.device))
        image = upright(image).copy()
        full_size = image.size
        image.thumbnail((COMPARED, COMPARED))
        decoded_pixels, image_pixels = (
            np.asarray(side, np.float32) for side in (fitted(decoded, image.size), on_white(image))
        )
        difference = torch.from_numpy(np.abs(decoded_pixels - image_pixels).mean(axis=2) / 255)
        if visible:
            difference *= torch.from_numpy(np.asarray(image.getchannel("A")) > 0)
        left, top, right, bottom = fitted_box(decoded.size, image.size)
        cells = F.adaptive_avg_pool2d(difference[None, top:bottom, left:right], shape)
        difference[top:bottom, left:right] = 0
        matches = cells.max() <= SAME and difference.max() <= SAME
        return (tokens.to(self.device), fitted_box(decoded.size, full_size)) if matches else None

    def mask_low_confidence(self, request: Request, tokens: Tensor, share: float) -> Tensor:
        """Mask a share of the cells of an image, at least one: those with the least probable tokens.

        Args:
            request: of the image.
            tokens: ids [1, h, w].
            share: 0 to 1.
        """
        _, probs = self.certainty(request, tokens[0])
        order = probs.flatten().argsort()
        selected = torch.zeros(probs.numel(), dtype=torch.bool)
        selected[order[: max(1, round(share * probs.numel()))]] = True
        return self.canvas.mask(tokens, selected.view(probs.shape))

    @torch.no_grad()
    def certainty(self, request: Request, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the entropy of the distribution of each cell of a finished image in nats, and the probability of its token, both
        [h, w]. One forward pass.

        Args:
            request: that made the image.
            tokens: its ids [h, w].

        Raises:
            ValueError: cells are undecided; this model writes latents, whose probabilities are not known.
        """
        if not self.canvas.discrete:
            raise ValueError("this model writes latents, whose probabilities are not known: choose a model of tokens")
        if (tokens < 0).any():
            raise ValueError("the image is not finished: expected a token in each cell")
        request = self.resolved(request)
        controls = [request.control] if request.control else None
        prompt = self.read_prompt(request.prompt, request.literal).text
        session = self.start([prompt], request.guidance_scale != 1, tuple(tokens.shape), controls)
        cells, flat = torch.arange(tokens.numel()), tokens.flatten().to(self.device)
        read = torch.cat([torch.full_like(flat[:1], START), flat[:-1]])[None]
        cond_logits, uncond_logits = session.forward(read, cells - 1)
        scale, top_p = (1.0 if number is None else number for number in (request.guidance_scale, request.top_p))
        logits = guided(cond_logits, uncond_logits, scale, cells)
        sampling = Sampling(request.temperature or 1.0, request.top_k or 0, top_p)
        probs = sampling.filter(logits)[0].softmax(dim=-1)
        entropy = torch.special.entr(probs).sum(dim=-1)
        token_probs = probs.gather(1, flat[:, None])[:, 0]
        return entropy.view(tokens.shape).cpu(), token_probs.view(tokens.shape).cpu()


def masked_cells(image: Image.Image, mask: Image.Image | None, shape: tuple[int, int]) -> Tensor:
    """Return which cells of a token grid a mask touches, [h, w] bool; arguments as in `Editing.edit`."""
    if shape[0] == 1:
        raise ValueError("the tokens of this model have no place in the image: choose another model to edit with")
    image = normalized(image)
    if mask is None:
        mask = ImageOps.invert(upright(image).getchannel("A"))
    elif (mask := to_mask(mask)).size != image.size:
        raise InvalidValue(
            f"the mask is {mask.width} x {mask.height} and the image {image.width} x {image.height}: expected the same",
            "mask",
        )
    side = max(mask.size)
    square = ImageOps.pad(mask, (side, side), color=0)  # as the image is padded
    painted = torch.from_numpy(np.array(square)).float()[None, None] / 255
    cells = F.adaptive_max_pool2d(painted, shape)[0, 0] > 0.5
    if not cells.any():
        raise InvalidValue("nothing to inpaint: expected white in the mask, or something transparent", "mask")
    return cells
