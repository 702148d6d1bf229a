"""CLIP score: the cosine between pictures and prompts, in the three scales that papers use."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from argen.eval.features import PublishedCLIP
from argen.eval.images import ImageSet
from argen.models.clip import TextImageEncoder


def clip_scores(text: Tensor, images: Tensor) -> dict[str, float]:
    """Embeddings [B, E] of prompts and of their pictures -> "cosine" (LlamaGen, LANTERN), "x100" (torchmetrics: not
    below 0) and "2.5x" (arXiv 2104.08718: no cosine below 0)."""
    cosine = F.cosine_similarity(text.float(), images.float(), dim=1)
    mean = cosine.mean().item()
    return {"cosine": mean, "x100": max(0.0, 100 * mean), "2.5x": 2.5 * cosine.clamp(min=0).mean().item()}


@torch.no_grad()
def evaluate(
    judge: PublishedCLIP | TextImageEncoder, name: str, samples: ImageSet, prompts: Sequence[str], prefix: str = ""
) -> dict[str, dict]:
    """Scores of pictures, picture i being of prompt ``i % len(prompts)``; `prefix` comes before every prompt."""
    text_embeds, image_embeds = [], []
    for first in range(0, len(samples), 64):
        rows = range(first, min(first + 64, len(samples)))
        texts = [prompts[index % len(prompts)] for index in rows]
        images = [Image.fromarray(samples[index]) for index in rows]
        by_text, by_image = (
            judge.embed([prefix + t for t in texts], images)
            if isinstance(judge, TextImageEncoder)
            else (
                judge.embed_text(texts, prefix),
                judge.embed_pixels(torch.stack([judge.prepare(samples[index]) for index in rows])),
            )
        )
        text_embeds.append(by_text.cpu())
        image_embeds.append(by_image.cpu())
    scores = clip_scores(torch.cat(text_embeds), torch.cat(image_embeds))
    return {f"CLIP score ({name}), {scale}": {"value": value, "n": len(samples)} for scale, value in scores.items()}
