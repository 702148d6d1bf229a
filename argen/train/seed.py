"""Recipes `emoji-seed-contrastive` and `emoji-seed`: the two stages of SEED's tokenizer (arXiv 2307.08041) on what `emoji-clip` sees.

The first trains the causal queries so that the last of them knows the caption; the second, with them frozen, the codebook and
the way back to the picture's embedding. The codebook starts from outputs of the encoder, and codes that nothing uses are
replaced: with the official start most stay unused at this scale.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, Blip2QFormerModel, CLIPModel

from argen.data.emoji import caption
from argen.data.tables import pixels, read_split
from argen.train.loop import Schedule, Task
from tokenizers_img.pixels import from_uint8
from tokenizers_img.seed import Seed, causal_mask

CONTRASTIVE_SCHEDULES = {
    "cpu": Schedule(steps=2500, batch_size=192, learning_rate=1e-3, warmup=100, weight_decay=0.05),
    "gpu": Schedule(steps=20000, batch_size=1024, learning_rate=5e-4, weight_decay=0.05),
}
SCHEDULES = {
    "cpu": Schedule(steps=4000, batch_size=128, learning_rate=1e-3, warmup=100, weight_decay=0.05),
    "gpu": Schedule(steps=20000, batch_size=512, learning_rate=5e-4, weight_decay=0.05),
}
SIZES = {
    "features": 192,
    "dim": 192,
    "layers": 4,
    "heads": 4,
    "hidden": 768,
    "tokens": 16,
    "n_embed": 1024,
    "embed_dim": 16,
    "depth": 2,
    "block_heads": 4,
    "embedding": 192,
}
SMOOTHING = 0.1  # of the contrastive loss's labels
EMBED, COMMIT, RECONSTRUCT, DISTIL = 5.0, 0.25, 2.0, 0.5  # weights of the second stage, as published
SCENES_SHARE = 0.25
REVIVE_EVERY, REVIVED = 50, 4096  # steps; codes used less than once in so many are replaced


class Contrastive(nn.Module):
    """The first stage: one transformer over queries and, apart, over words.

    Args:
        qformer: with a text side; it is shared by both.
        query_tokens: [1, N, D], the queries.
        vocab, positions: sizes of the word and position tables.
        width: of the common space.
    """

    def __init__(self, qformer: Blip2QFormerModel, query_tokens: nn.Parameter, vocab: int, positions: int, width: int):
        super().__init__()
        dim = query_tokens.shape[-1]
        self.Qformer, self.query_tokens = qformer, query_tokens
        self.word_embeddings, self.position_embeddings = nn.Embedding(vocab, dim), nn.Embedding(positions, dim)
        self.vision_proj, self.text_proj = nn.Linear(dim, width), nn.Linear(dim, width)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def picture(self, features: Tensor) -> Tensor:
        """Features [B, P, V] -> a unit vector of each query [B, N, E]; the last of them stands for the picture."""
        asked = self.query_tokens.expand(len(features), -1, -1)
        mask = causal_mask(asked)
        found = self.Qformer(query_embeds=asked, attention_mask=mask, encoder_hidden_states=features).last_hidden_state
        return F.normalize(self.vision_proj(found), dim=-1)

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids [B, T], mask [B, T] (1: a token) -> unit vectors [B, E], of the first token."""
        embedded = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        found = self.Qformer(query_embeds=embedded, query_length=0, attention_mask=mask).last_hidden_state
        return F.normalize(self.text_proj(found[:, 0]), dim=-1)

    def forward(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The mean of both cross-entropies, row i of the pictures belonging to row i of the texts."""
        logits = self.picture(features)[:, -1].float() @ self.text(ids, mask).float().T / self.temp
        right = torch.arange(len(logits), device=logits.device)
        both = [F.cross_entropy(part, right, label_smoothing=SMOOTHING) for part in (logits, logits.T)]
        return torch.stack(both).mean()


def quantised(network: Seed, features: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The weighted losses of the second stage; the queries are not trained.

    Args:
        features: [B, P, V].
        target: embedding of each picture [B, E], not normalised.
    """
    with torch.no_grad():
        found = network.queries(features)
    z = network.encode_task_layer(found).float()
    codes = network.quantize.embedding(network.quantize.nearest(z))
    embed = (codes.detach() - z).square().mean() + COMMIT * (codes - z.detach()).square().mean()
    through = z + (codes - z).detach()
    apart = 1 - F.cosine_similarity(network.reconstruct(through).float(), found.float(), dim=-1).mean()
    distil = F.mse_loss(network.embed(through).float(), target.float())
    return {"embed": EMBED * embed, "reconstruct": RECONSTRUCT * apart, "distil": DISTIL * distil}
