"""SEED: a picture as a few tokens of meaning in causal order, and back through a diffusion model.

Papers: "Planting a SEED of Vision in Large Language Model" (arXiv 2307.08041), "Making LLaMA SEE and Draw with SEED Tokenizer"
(arXiv 2310.01218). Weights: ``AILab-CVC/seed-tokenizer-2`` (Apache-2.0) and the vision transformer of EVA-CLIP, as BLIP-2 has it.
The vision transformer and the Q-Formers are those of transformers; the rest is named as published.

Letters in shape comments: B batch, P features of a picture, V their width, N tokens, D width, C width of a code, E width of the
generation embedding, which a diffusion model draws.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
)

from tokenizers_img.quantize import check_ids

DOWN = (256, 128, 32)  # widths of the "mlp" head, token by token
HEADS = {"mlp": "image", "reverse": "image", "text": "text"}  # how the embedding is made -> what it stands for


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A layer of the decoders."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Codebook(nn.Module):
    """The nearest code by Euclidean distance, neither side normalised."""

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def nearest(self, z: Tensor) -> Tensor:
        """Ids [...] of vectors [..., C]."""
        codes = self.embedding.weight
        distance = z.square().sum(dim=-1, keepdim=True) + codes.square().sum(dim=-1) - 2 * z @ codes.T
        return distance.argmin(dim=-1)


def qformer(
    dim: int, layers: int, heads: int, hidden: int, features: int, text: bool = False, dropout: float = 0.1
) -> Blip2QFormerModel:
    """A Q-Former of BLIP-2 that looks at features [B, P, features] in every other layer; `text` gives it feed-forward layers for
    words, too."""
    config = Blip2QFormerConfig(
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden,
        encoder_hidden_size=features,
        cross_attention_frequency=2,
        layer_norm_eps=1e-12,
        use_qformer_text_input=text,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return Blip2QFormerModel(config)


def causal_mask(queries: Tensor) -> Tensor:
    """[B, N, D] -> which queries each may see, [B, 1, N, N] bool: itself and those before."""
    count = queries.shape[1]
    mask = torch.ones(count, count, dtype=torch.bool, device=queries.device).tril()
    return mask.expand(len(queries), 1, -1, -1)


class Seed(ModelMixin, ConfigMixin):
    """Features of a picture <-> causal ids -> generation embedding.

    Args:
        features: V, of the picture encoder.
        dim, layers, heads, hidden: of the causal Q-Former.
        tokens: N.
        n_embed, embed_dim: of the codebook.
        depth, block_heads: of each decoder.
        head: how the generation embedding is made: "mlp" (SEED-2 as published), "reverse" (a second Q-Former with one query, as the
            training code has it) or "text" (SEED-1: with 77, in place of a text's states).
        embedding: E.
        reverse_layers: of the second Q-Former.
        reconstruct: also the decoder of the Q-Former's output, which only training needs.
        nested: trained so that the first tokens alone can be decoded, too; not in the paper, nor in published files.
    """

    @register_to_config
    def __init__(
        self,
        features: int = 1408,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        tokens: int = 32,
        n_embed: int = 8192,
        embed_dim: int = 32,
        depth: int = 4,
        block_heads: int = 12,
        head: str = "mlp",
        embedding: int = 1024,
        reverse_layers: int = 4,
        reconstruct: bool = True,
        nested: bool = False,
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}: expected one of {', '.join(HEADS)}")
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.Qformer = qformer(dim, layers, heads, hidden, features)
        self.encode_task_layer = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, embed_dim))
        self.quantize = Codebook(n_embed, embed_dim)
        self.decode_task_layer = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.Tanh(), nn.Linear(embed_dim, dim))
        if reconstruct:
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
            self.blocks = nn.ModuleList(Block(dim, block_heads) for _ in range(depth))
        kind = HEADS[head]
        self.register_parameter(f"pos_embed_{kind}", nn.Parameter(torch.zeros(1, tokens, dim)))
        self.add_module(f"blocks_{kind}", nn.ModuleList(Block(dim, block_heads) for _ in range(depth)))
        if head == "mlp":
            widths = zip((dim, *DOWN), DOWN, strict=False)
            layers_down = [part for pair in widths for part in (nn.Linear(*pair, bias=False), nn.ReLU())]
            self.image_down = nn.Sequential(*layers_down[:-1])
            joined = tokens * DOWN[-1]
        else:
            self.reverse_tokens = nn.Parameter(0.02 * torch.randn(1, 77 if head == "text" else 1, dim))
            self.Reverse_Qformer = qformer(dim, reverse_layers, heads, hidden, dim)
            joined = dim
        self.add_module(f"distill_{kind}_proj", nn.Linear(joined, embedding))

    def queries(self, features: Tensor) -> Tensor:
        """Features [B, P, V] -> outputs of the causal queries [B, N, D]: none attends to those after it."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        mask = causal_mask(queries)
        return self.Qformer(query_embeds=queries, attention_mask=mask, encoder_hidden_states=features).last_hidden_state

    def ids(self, features: Tensor) -> Tensor:
        """Features [B, P, V] -> ids [B, N]."""
        return self.quantize.nearest(self.encode_task_layer(self.queries(features)))

    def embed(self, codes: Tensor) -> Tensor:
        """Codes [B, N, C] -> generation embedding [B, E], of SEED-1 [B, 77, E]; as large as it comes, never normalised. A code
        that is zero counts as missing, where training was nested."""
        kind = HEADS[self.config.head]
        x = self.decode_task_layer(codes) + getattr(self, f"pos_embed_{kind}")
        for block in getattr(self, f"blocks_{kind}"):
            x = block(x)
        if self.config.head == "mlp":
            return self.distill_image_proj(self.image_down(x).flatten(1))
        queries = self.reverse_tokens.expand(len(x), -1, -1)
        hidden = self.Reverse_Qformer(query_embeds=queries, encoder_hidden_states=x).last_hidden_state
        embeds = getattr(self, f"distill_{kind}_proj")(hidden)
        return embeds if kind == "text" else embeds.squeeze(1)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Codes [B, N, C] -> the output of the causal Q-Former, about [B, N, D]."""
        x = self.decode_task_layer(codes) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x

    def decode(self, ids: Tensor) -> Tensor:
        """Ids [B, N], nested also the first K of them [B, K] -> generation embedding, see `embed`.

        Raises:
            ValueError: too few ids or too many, or one outside the codebook.
        """
        most = self.config.tokens
        for row in ids:
            check_ids(row, self.config.n_embed, 1 if self.config.nested else most, most)
        return self.embed(F.pad(self.quantize.embedding(ids), (0, 0, 0, most - ids.shape[1])))
