"""What tells `CountToken` how many things a picture shows: densities with gradients, detectors without, and how well it fits.

Each is called with pixels [1, 3, H, W] in [0, 1] and the name of the things, see the types in `argen.diffusion.count_token`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    CLIPModel,
    CLIPTokenizerFast,
    PreTrainedTokenizerBase,
)

from argen.data.scenes import boxes, plural
from argen.models.clip import TextImageEncoder
from argen.models.clip_count import CLIPCount
from argen.models.counter import Counter
from tokenizers_img.hub import hub_folder, model_folder
from tokenizers_img.pixels import to_pil

CLIP, RELEVANCE = "openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32"
DETECTOR = "hustvl/yolos-tiny"
IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "sheep": "sheep", "fish": "fish"}
IRREGULAR |= {"mouse": "mice", "knife": "knives", "leaf": "leaves", "tooth": "teeth", "foot": "feet", "goose": "geese"}


def components(pixels: Tensor, things: str) -> int:
    """A detector of whatever is not white: the connected components of the picture, as the judge of the emoji family has them."""
    return len(boxes((255 * pixels[0]).round().byte().permute(1, 2, 0).cpu().numpy()))


class EmojiDensity:
    """The shipped counter as a density; it counts whatever there is."""

    def __init__(self, counter: Counter):
        self.counter = counter.requires_grad_(False)

    def __call__(self, pixels: Tensor, things: str) -> Tensor:
        return self.counter(pixels)


class EmojiCount:
    """The shipped counter as a number: the sum of its density over the whole image."""

    def __init__(self, counter: Counter):
        self.counter = counter

    @torch.no_grad()
    def __call__(self, pixels: Tensor, things: str) -> float:
        return self.counter(pixels).sum().item()


class EmojiRelevance:
    """The cosine of a picture to the words, by the encoder of the emoji family."""

    def __init__(self, encoder: TextImageEncoder):
        self.encoder, self.size = encoder, encoder.clip.config.vision_config.image_size
        encoder.clip.requires_grad_(False)

    def __call__(self, pixels: Tensor, things: str) -> Tensor:
        size = self.size, self.size
        small = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        return self.encoder.embed_pixels(small) @ self.encoder.embed_text([things])[0]


class CLIPRelevance:
    """The cosine of a picture to the words, by a published CLIP; of pixels as they are, as the authors' code has it."""

    def __init__(self, clip: CLIPModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = clip.eval().requires_grad_(False), tokenizer

    @classmethod
    def from_hub(cls, repo: str = RELEVANCE) -> "CLIPRelevance":
        """Raises:
        ConnectionError: it is not here and cannot be fetched.
        """
        return cls(*_published_clip(repo))

    def __call__(self, pixels: Tensor, things: str) -> Tensor:
        text = self.tokenizer([things], return_tensors="pt").to(pixels.device)
        parts = self.model.get_image_features(pixels), self.model.get_text_features(**text)
        return F.cosine_similarity(*(getattr(part, "pooler_output", part) for part in parts))


def _published_clip(repo: str) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    folder = hub_folder(repo, ("config.json", "model.safetensors", "*token*", "vocab.json", "merges.txt"))
    return CLIPModel.from_pretrained(folder, dtype=torch.float32), CLIPTokenizerFast.from_pretrained(folder)


class CLIPCountDensity:
    """CLIP-Count as a density.

    Args:
        model: see `CLIPCount.from_original`.
        tokenizer: CLIP's.
    """

    def __init__(self, model: CLIPCount, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    def from_original(cls, path: str | Path) -> "CLIPCountDensity":
        """With the released ``clipcount_pretrained.ckpt``; the CLIP that it needs is fetched from the hub.

        Raises:
            FileNotFoundError: there is no such file.
            ConnectionError: the CLIP is not here and cannot be fetched.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no CLIP-Count at {path}: expected clipcount_pretrained.ckpt, linked in the README of songrise/CLIP-Count"
            )
        clip, tokenizer = _published_clip(CLIP)
        return cls(CLIPCount.from_original(path, clip), tokenizer)

    def __call__(self, pixels: Tensor, things: str) -> Tensor:
        text = self.tokenizer(things, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        ids = text.input_ids * text.attention_mask  # OpenAI's padding is zero
        return self.model(pixels, ids.to(pixels.device))


class Detected:
    """An object detector of transformers, as YOLOS or DETR.

    Args:
        model, processor: of one checkpoint.
        threshold: how sure it must be of a thing.
    """

    def __init__(self, model, processor, threshold: float = 0.3):
        self.model, self.processor, self.threshold = model.eval().requires_grad_(False), processor, threshold

    @classmethod
    def from_hub(cls, repo: str = DETECTOR, threshold: float = 0.3) -> "Detected":
        """A folder, or OWNER/NAME on the hub.

        Raises:
            ConnectionError: it is not here and cannot be fetched.
        """
        folder = model_folder(repo)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        return cls(AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.float32), processor, threshold)

    def label(self, things: str) -> int | None:
        """The number of the detector's own name of the things, whose last words may be its plural; None if it has none."""
        text = things.lower()
        for number, name in self.model.config.id2label.items():
            forms = name, plural(name), IRREGULAR.get(name, name)
            if any(text == form or text.endswith(f" {form}") for form in forms):
                return int(number)
        return None

    @torch.no_grad()
    def __call__(self, pixels: Tensor, things: str) -> int:
        """Raises:
        ValueError: it has no name for the things.
        """
        label = self.label(things)
        if label is None:
            names = sorted(self.model.config.id2label.values())
            raise ValueError(
                f"the detector does not know {things!r}: leave it out, or ask for one of {', '.join(names)}"
            )
        image = to_pil(pixels[0])
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        sizes = [(image.height, image.width)]
        detections = self.processor.post_process_object_detection(self.model(**inputs), self.threshold, sizes)[0]
        return int((detections["labels"] == label).sum())
