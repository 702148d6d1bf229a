"""Ranking: selection of the candidates that fit a prompt best, by a model that embeds texts and images in one space."""

from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from argen.models.clip import TextImageEncoder


class Ranking(DiffusionPipeline):
    """Mixin of `TokenPipeline`: selection of the best candidates."""

    @property
    def text_image_encoder(self) -> TextImageEncoder | None:
        """Encoder of prompts and images into one space; None where the model has none."""
        clip = next((part for part in self.components.values() if isinstance(part, CLIPModel)), None)
        return None if clip is None else TextImageEncoder(clip, self.tokenizer)

    def check_ranking(self) -> TextImageEncoder:
        """Return the encoder that candidates are ranked with.

        Raises:
            ValueError: there is nothing to rank with.
        """
        if (encoder := self.text_image_encoder) is None:
            raise ValueError(f"{self.name} has no image encoder to rank candidates with: leave num_candidates out")
        return encoder

    def rank(self, prompt: str, images: list[Image.Image]) -> list[float]:
        """Return how well each image fits the prompt: their cosine similarity (higher is better).

        Raises:
            ValueError: there is nothing to rank with.
        """
        encoder = self.check_ranking()
        with self.stage("text"):
            text, embeds = encoder.embed([self.caption(prompt)], images)
        return (embeds @ text[0]).tolist()

    def select_best(
        self, prompts: list[str], tokens: Tensor, candidates: int, num_images: int
    ) -> tuple[list[int], list[float]]:
        """Select the `num_images` of the `candidates` of each prompt that fit it best -> their indices, best first, and scores."""
        images, selected, scores = self.images(tokens), [], []
        for start, prompt in zip(range(0, len(images), candidates), prompts, strict=True):
            ranked = self.rank(prompt, images[start : start + candidates])
            order = sorted(range(candidates), key=lambda index: -ranked[index])
            order = distinct_first(order, tokens[start : start + candidates])[:num_images]
            selected += [start + index for index in order]
            scores += [ranked[index] for index in order]
        return selected, scores


def distinct_first(order: list[int], tokens: Tensor) -> list[int]:
    """Move candidates that equal an earlier one to the end, so that they are used only where there are too few others."""
    keys: set[bytes] = set()
    unique: list[int] = []
    repeated: list[int] = []
    for index in order:
        key = tokens[index].cpu().numpy().tobytes()
        (repeated if key in keys else unique).append(index)
        keys.add(key)
    return unique + repeated
