"""Recipe `emoji-control`: `emoji-llamagen` learns to follow canny edges and maps of segments, as ControlAR does."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from argen.data.scenes import segments
from argen.data.tables import read_split
from argen.models.annotators import annotate, as_control, resized
from argen.models.controlar import CELL, ControlAR
from argen.models.llamagen import LlamaGen
from argen.pipelines.controlar import ControlARPipeline
from argen.train.llamagen import LlamaGenTask
from argen.train.loop import Recipe, Schedule
from argen.train.tokens import initialised_from

SCHEDULES = {
    "cpu": Schedule(
        steps=2000, batch_size=64, learning_rate=2e-3, warmup=100, weight_decay=0.03, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=15000, batch_size=512, learning_rate=5e-4, weight_decay=0.03, betas=(0.9, 0.98)),
}
ENCODER = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 288,
    "image_size": 128,
    "patch_size": 16,
}
SHAPED_SHARE, SHAPED = 0.15, 2000  # of the batches are of pictures twice as wide or high; so many pictures of each


class ControlTask(LlamaGenTask):
    """Args:
    generator: folder of a trained `emoji-llamagen`.
    others: see `TokensTask`.
    """

    def __init__(self, data: Path, scenes: Path, tokenizer: Path, clip: Path, generator: Path):
        super().__init__(data, scenes, tokenizer, clip)
        self.scene_boxes = [
            [tuple(thing["box"]) for thing in json.loads(things)] for things in read_split(scenes, "train")["objects"]
        ]
        model = initialised_from(generator, LlamaGen, ControlAR, encoder="vit", encoder_sizes=ENCODER)
        self.networks: dict[str, nn.Module] = {"model": model}
        self.shaped = [self.pairs(across, random.Random(f"pairs/{across}")) for across in (True, False)]

    def pairs(self, across: bool, rng: random.Random) -> tuple[list[str], Tensor, Tensor]:
        """Two single pictures at half their size, side by side (`across`) or one above the other: captions, pictures
        [P, H, W, 3] uint8 and tokens [P, N / 2]."""
        captions, images = [], torch.full((SHAPED, *self.images.shape[1:]), 255, dtype=torch.uint8)
        half, grid = self.images.shape[1] // 2, self.vq.grid
        for image in images:
            two = rng.choices(range(len(self.rows)), weights=self.weights.tolist(), k=2)
            for place, index in enumerate(two):
                small = Image.fromarray(self.images[index].numpy()).resize((half, half), Image.Resampling.LANCZOS)
                first = place * half
                there = (
                    (slice(half), slice(first, first + half)) if across else (slice(first, first + half), slice(half))
                )
                image[there] = torch.from_numpy(np.array(small))
            captions.append(" and ".join(self.rows[index]["name"] for index in two))
        tokens = self.tokens(images).unflatten(1, (grid, grid))
        if across:
            return captions, images[:, :half], tokens[:, : grid // 2].flatten(1)
        return captions, images[:, :, :half].contiguous(), tokens[:, :, : grid // 2].flatten(1)

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        if torch.rand(1, generator=generator) >= SHAPED_SHARE:
            return super().batch(size, generator)
        captions, images, tokens = self.shaped[int(torch.randint(2, (1,), generator=generator))]
        indices = torch.randint(len(captions), (size,), generator=generator)
        text = self.text([captions[index] for index in indices.tolist()])
        control = torch.stack([self.edges(image) for image in images[indices]])
        dropped = torch.zeros(size, dtype=torch.bool)
        return {"tokens": tokens[indices], "read": tokens[indices], "dropped": dropped, "control": control, **text}

    def more(self, tokens: Tensor, images: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The control pictures, too: edges or segments, by chance."""
        batch = super().more(tokens, images, scenes, generator)
        side = images.shape[1]
        boxed_images = [(image, [(0, 0, side, side)]) for image in images]
        boxed_images += [(self.scene_images[index], self.scene_boxes[index]) for index in scenes.tolist()]
        use_segments = torch.rand(len(boxed_images), generator=generator) < 0.5
        maps = [
            self.control(segments(image.numpy(), boxes), "seg") if segmented else self.edges(image)
            for (image, boxes), segmented in zip(boxed_images, use_segments, strict=True)
        ]
        return batch | {"control": torch.stack(maps)}

    def held_out(self, rows: slice) -> dict[str, Tensor]:
        return super().held_out(rows) | {
            "control": torch.stack([self.edges(image) for image in self.held_out_images[rows]])
        }

    def control(self, image: np.ndarray, kind: str) -> Tensor:
        """What the network reads of an image [H, W, 3] uint8, or of a map of its segments: [3, h, w] in [-1, 1], cells of `CELL` pixels a side."""
        height, width = (side // self.vq.config.patch_size * CELL for side in image.shape[:2])
        return as_control(annotate(resized(Image.fromarray(image), kind, (width, height)), kind))

    def edges(self, image: Tensor) -> Tensor:
        """`control` of the canny edges of an image [H, W, 3] uint8."""
        return self.control(image.numpy(), "canny")

    def logits(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return network(*self.condition(batch), batch["read"], batch["control"], batch["dropped"])

    def pipeline(self) -> ControlARPipeline:
        return ControlARPipeline(
            self._model(), self.vq, self.clip, self.text_tokenizer, list(self.groups), any_size=True
        )

    def pipeline_kwargs(self) -> dict:
        step = max(1, len(self.held_out_captions) // 32)
        images = [Image.fromarray(image.numpy()) for image in self.held_out_images[::step][:32]]
        return super().pipeline_kwargs() | {"control_image": images, "control_type": "canny"}


RECIPE = Recipe(ControlTask, SCHEDULES, takes=("scenes", "tokenizer", "clip", "generator"), start="emoji-llamagen")
