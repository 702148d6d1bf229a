"""How closely a controlled generator follows its control picture: edges of the result against those asked for, segments too.

Edge F1 as for boundaries: an edge pixel is right where the other map has one at most `TOLERANCE` pixels away.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from argen.data.scenes import INK, segments
from argen.eval.images import ImageArray, ImageSet, Table, open_images
from argen.models.annotators import canny

SIDE, TOLERANCE = 128, 2  # pixels: images are compared with that as their longer side, edges within that
Box = tuple[int, int, int, int]


def edge_f1(result: np.ndarray, target: np.ndarray, tolerance: int = TOLERANCE) -> float:
    """F1 of two edge maps [H, W], edges not 0; 1 where both are empty."""
    maps = [torch.from_numpy(np.ascontiguousarray(edges != 0)).float()[None, None] for edges in (result, target)]
    if not any(edges.any() for edges in maps):
        return 1.0
    near = [F.max_pool2d(edges, 2 * tolerance + 1, 1, tolerance) for edges in maps]
    precision, recall = (_share(edges, other) for edges, other in zip(maps, reversed(near), strict=True))
    return 2 * precision * recall / max(precision + recall, 1e-9)


def brought(image: ImageArray, how: Image.Resampling = Image.Resampling.BICUBIC) -> ImageArray:
    """An image [H, W, 3] whose longer side is `SIDE`."""
    scale = SIDE / max(image.shape[:2])
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    return image if scale == 1 else np.asarray(Image.fromarray(image).resize(size, how))


def _share(edges: Tensor, near: Tensor) -> float:
    return ((edges * near).sum() / edges.sum().clamp(min=1)).item()


def segment_iou(result: ImageArray, control: ImageArray, boxes: Sequence[Box]) -> float:
    """Mean over the objects of IoU of their ink; ink of the result belongs to the object whose box is nearest."""
    ink = (result < INK).any(-1)
    rows, columns = np.mgrid[: ink.shape[0], : ink.shape[1]]
    far = []
    for left, top, right, bottom in boxes:
        down = np.maximum(np.maximum(top - rows, rows - bottom + 1), 0)
        across = np.maximum(np.maximum(left - columns, columns - right + 1), 0)
        far.append(down**2 + across**2)
    owner, ious = np.argmin(far, axis=0), []
    for index, (left, top, right, bottom) in enumerate(boxes):
        target_ink = np.zeros_like(ink)
        target_ink[top:bottom, left:right] = (control[top:bottom, left:right] < INK).any(-1)
        result_ink = ink & (owner == index)
        ious.append((result_ink & target_ink).sum() / max(1, (result_ink | target_ink).sum()))
    return float(np.mean(ious))


class Scenes(Sequence):
    """The rows of a table of `argen data scenes`: prompt, picture and boxes."""

    def __init__(self, path: Path):
        self.table = open_images(path)
        if not isinstance(self.table, Table):
            raise ValueError(f"{path} is no table: expected a .parquet file made by `argen data scenes`")
        if "objects" not in self.table.table.column_names:
            raise ValueError(f"{path} has no column `objects`: expected a table made by `argen data scenes`")
        self.prompts = self.table.captions
        self.boxes = [[tuple(thing["box"]) for thing in json.loads(things)] for things in self.table.table["objects"]]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> ImageArray:
        return self.table[index]

    def control(self, index: int, kind: str) -> Image.Image:
        """Control image: the image itself for canny, its map for "seg"."""
        image = self[index]
        return Image.fromarray(segments(image, self.boxes[index]) if kind == "seg" else image)


def evaluate(scenes: Scenes, kind: str, followed: ImageSet, free: ImageSet) -> dict[str, dict]:
    """Scores of the pictures drawn with the control of `kind`, and of those drawn for the same prompts without."""
    sums: dict[str, list[float]] = {}
    for index in range(len(followed)):
        scale = SIDE / max(scenes[index].shape[:2])
        control, boxes = (
            brought(scenes[index]),
            [tuple(round(scale * side) for side in box) for box in scenes.boxes[index]],
        )
        for name, result in (("", brought(followed[index])), (", without control", brought(free[index]))):
            if kind == "seg":
                sums.setdefault(f"segment mIoU{name}", []).append(segment_iou(result, control, boxes))
            else:
                maps = canny(result), canny(control)
                sums.setdefault(f"edge F1{name}", []).append(edge_f1(*maps))
                sums.setdefault(f"edge F1 to the pixel{name}", []).append(edge_f1(*maps, tolerance=0))
    return {name: {"value": float(np.mean(values)), "n": len(values)} for name, values in sums.items()}
