"""A CLIP (arXiv 2103.00020) of transformers as argen uses it: prompts and pictures to unit vectors.

Letters in shape comments: P prompts, B pictures, E width of the common space.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast

from tokenizers_img.pixels import from_pil


@dataclass
class TextImageEncoder:
    """Both halves and the text tokenizer."""

    clip: CLIPModel
    tokenizer: PreTrainedTokenizerFast

    def to(self, device: torch.device | str) -> "TextImageEncoder":
        self.clip.to(device)
        return self

    @torch.no_grad()
    def embed(self, prompts: list[str], images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Unit vectors [P, E] of prompts and [B, E] of pictures of any size; their products are cosines."""
        text = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
        size = self.clip.config.vision_config.image_size
        pixels = torch.stack([from_pil(image, size) for image in images]).to(self.clip.device, self.clip.dtype)
        by_text = self.clip.text_projection(self.clip.text_model(**text).pooler_output)
        by_picture = self.clip.visual_projection(self.clip.vision_model(2 * pixels - 1).pooler_output)
        return F.normalize(by_text.float(), dim=-1), F.normalize(by_picture.float(), dim=-1)
