"""How well a text/picture encoder finds the picture of a caption."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from argen.data.tables import read_split

PICTURES, AMONG = 600, 100


def held_out_sample(count: int) -> list[int]:
    """Places of up to `PICTURES` of `count` pictures, in a fixed random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:PICTURES].tolist()


def recall(similarity: Tensor) -> dict[str, float]:
    """Of captions against pictures [n, n], equal places belonging together: is the right one first, among the first
    five, in blocks of `AMONG`?"""
    blocks = [similarity[i : i + AMONG, i : i + AMONG] for i in range(0, len(similarity), AMONG)]
    ranks = torch.cat([(block > block.diagonal()[:, None]).sum(dim=1) for block in blocks])
    return {f"recall@{k} of {AMONG}": (ranks < k).float().mean().item() for k in (1, 5)}


def evaluate(embed: Callable[[list[str], list[Image.Image]], tuple[Tensor, Tensor]], data: Path) -> dict[str, float]:
    """Recall on concepts that were never trained on.

    Args:
        embed: prompts and pictures -> unit vectors of both.
        data: folder made by ``argen data emoji``.
    """
    table = read_split(data, "test")
    rows = table.select(held_out_sample(len(table)))
    text, pictures = embed(list(rows["caption"]), list(rows["image"]))
    return recall((text @ pictures.T).cpu())
