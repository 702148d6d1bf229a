"""Whether meaning is kept: captions find their pictures by an encoder or by SEED's tokens, and pictures their captions."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from argen.data.emoji import with_article
from argen.data.tables import read_split
from tokenizers_img.seed.tokenizer import SeedTokenizer

IMAGES, AMONG = 600, 100


def held_out_sample(count: int) -> list[int]:
    """Places of up to `PICTURES` of `count` pictures, in a fixed random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:IMAGES].tolist()


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
    text, images = embed(list(rows["caption"]), list(rows["image"]))
    return recall((text @ images.T).cpu())


@torch.no_grad()
def of_tokens(
    tokenizer: SeedTokenizer, embed: Callable[[list[str], list[Image.Image]], tuple[Tensor, Tensor]], data: Path
) -> dict[str, float]:
    """`evaluate`, of the embeddings that some of a picture's tokens give: the first ones, as many at random places, and those of
    another picture; and how often all of them find their own picture.

    Args:
        tokenizer: one that was trained with nested dropout.
        embed: as in `evaluate`, of the encoder whose picture embeddings the tokens stand for.
    """
    table = read_split(data, "test")
    rows = table.select(held_out_sample(len(table)))
    text, images = embed(list(rows["caption"]), list(rows["image"]))
    parts = [torch.stack([tokenizer.prepare(image) for image in part]) for part in _parts(list(rows["image"]), 64)]
    ids = torch.cat([tokenizer.encode(part.to(tokenizer.device)) for part in parts])
    codes, generator, scores = tokenizer.network.quantize.embedding(ids), torch.Generator().manual_seed(0), {}
    most = ids.shape[1]

    def recall_of(codes: Tensor, mask: Tensor, queries: Tensor = text) -> float:
        embeds = tokenizer.network.embed(codes * mask.to(codes)[..., None]).float()
        return recall((queries.to(embeds) @ F.normalize(embeds, dim=-1).T).cpu())[f"recall@1 of {AMONG}"]

    for count in sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most}):
        scores[f"first {count} tokens: recall@1 of {AMONG}"] = recall_of(
            codes, torch.arange(most).expand(len(ids), -1) < count
        )
        anywhere = torch.rand(len(ids), most, generator=generator).argsort(dim=1) < count
        scores[f"{count} tokens at random places: recall@1 of {AMONG}"] = recall_of(codes, anywhere)
    all_tokens = torch.ones(len(ids), most)
    scores[f"{most} tokens of another picture: recall@1 of {AMONG}"] = recall_of(codes.roll(1, dims=0), all_tokens)
    scores[f"{most} tokens: own picture among {AMONG}"] = recall_of(codes, all_tokens, images)
    return scores | {"codes used": ids.unique().numel() / tokenizer.config.n_embed}


def of_captions(
    likelihoods: Callable[[list[Image.Image], list[str]], Tensor], data: Path, most: int = AMONG
) -> dict[str, float]:
    """How often a picture names its own concept among `AMONG`; of combinations of style and concept that training never saw.

    Args:
        likelihoods: pictures and captions -> how well they fit [B, captions].
    """
    table = read_split(data, "validation")
    concepts: dict[str, int] = {}
    for row in torch.randperm(len(table), generator=torch.Generator().manual_seed(0)).tolist():
        concepts.setdefault(table[row]["concept"], row)
    indices = list(concepts.values())[:most]
    rows = table.select(indices)
    fits = likelihoods(list(rows["image"]), [with_article(concept) for concept in rows["concept"]])
    ranks = (fits > fits.diagonal()[:, None]).sum(dim=1)
    return {
        f"concept named among {len(rows)}": (ranks < 1).float().mean().item(),
        "among the first five": (ranks < 5).float().mean().item(),
    }


def _parts(rows: Sequence, size: int) -> list[Sequence]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]
