"""A CLIP (arXiv 2103.00020) of transformers as argen uses it: prompts and pictures to unit vectors.

Letters in shape comments: P prompts, B images, E width of the common space.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tokenizers_img.pixels import from_pil

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast


@dataclass
class TextImageEncoder:
    """Both halves and the text tokenizer."""

    clip: "CLIPModel"
    tokenizer: "PreTrainedTokenizerFast"

    def to(self, device: torch.device | str) -> "TextImageEncoder":
        self.clip.to(device)
        return self

    @torch.no_grad()
    def embed(self, prompts: list[str], images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Unit vectors [P, E] of prompts and [B, E] of pictures of any size; their products are cosines."""
        size = self.clip.config.vision_config.image_size
        return self.embed_text(prompts), self.embed_pixels(torch.stack([from_pil(image, size) for image in images]))

    @torch.no_grad()
    def embed_text(self, prompts: list[str]) -> Tensor:
        """Unit vectors [P, E]."""
        text = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
        return F.normalize(self.clip.text_projection(self.clip.text_model(**text).pooler_output).float(), dim=-1)

    @torch.no_grad()
    def states(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states [P, T, C] of the text half, mask [P, T] bool, true for a word."""
        text = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
        return self.clip.text_model(**text).last_hidden_state, text.attention_mask.bool()

    def embed_pixels(self, pixels: Tensor, normalise: bool = True) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1], of the encoder's size -> vectors [B, E], of length 1 if `normalise`; with gradients."""
        pooled = self.clip.vision_model(2 * pixels.to(self.clip.device, self.clip.dtype) - 1).pooler_output
        embeds = self.clip.visual_projection(pooled).float()
        return F.normalize(embeds, dim=-1) if normalise else embeds
