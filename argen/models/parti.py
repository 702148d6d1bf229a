"""A Parti-style generator: a text encoder and a causal decoder over the tokens of a picture, joined by cross-attention.

Paper: "Scaling Autoregressive Models for Content-Rich Text-to-Image Generation" (arXiv 2206.10789). No weights were
released; this network is trained here (`argen train emoji-parti`). It reads the hidden states of a frozen text encoder
where the paper pre-trains its own.

Letters in shape comments: B images, T text tokens, N image tokens, n tokens of a forward pass, D width, H heads, K codes,
R rows of the cache (2B under guidance: with the prompt, then without).
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from argen.models.decoding import Decoding
from argen.models.kv_cache import KeyValueCache
from argen.models.layers import Linear, causal_mask, check_heads, linear, split_heads
from argen.models.session import KeysValues
from tokenizers_img.attention import DispatchedAttention


class Attention(DispatchedAttention):
    """Multi-head attention of `hidden_states` [R, n, D] over given keys and values [R, m, H, D/H]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = check_heads(dim, heads)
        self.q_proj = Linear(dim, dim, bias=False)
        self.k_proj = Linear(dim, dim, bias=False)
        self.v_proj = Linear(dim, dim, bias=False)
        self.out_proj = Linear(dim, dim, bias=False)

    def keys_values(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(split_heads(project(hidden_states), self.heads) for project in (self.k_proj, self.v_proj))

    def forward(self, hidden_states: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query = split_heads(self.q_proj(hidden_states), self.heads)
        return self.out_proj(self.attend(query, key, value, mask))


class FeedForward(nn.Module):
    def __init__(self, dim: int, mlp_dim: int):
        super().__init__()
        self.up_proj = Linear(dim, mlp_dim)
        self.down_proj = Linear(mlp_dim, dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.self_attn_norm, self.self_attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), FeedForward(dim, mlp_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.self_attn_norm(x)
        x = x + self.dropout(self.self_attn(normed, *self.self_attn.keys_values(normed), mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.self_attn_norm, self.self_attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.cross_attn_norm, self.cross_attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), FeedForward(dim, mlp_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        text_keys_values: tuple[Tensor, Tensor],
        text_mask: Tensor,
        cache: KeyValueCache | None,
        layer: int,
    ) -> Tensor:
        normed = self.self_attn_norm(x)
        key, value = self.self_attn.keys_values(normed)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        x = x + self.dropout(self.self_attn(normed, key, value, mask))
        x = x + self.dropout(self.cross_attn(self.cross_attn_norm(x), *text_keys_values, text_mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Parti(Decoding, ModelMixin, ConfigMixin):
    """Text states -> logits of picture tokens.

    Args:
        text_dim: width of the text encoder's hidden states.
        n_embed: K, the picture tokenizer's vocabulary.
        grid: side of the square token grid; N = grid * grid.
        dim, encoder_depth, decoder_depth, heads, mlp_dim: sizes.
        dropout: in training.
    """

    @register_to_config
    def __init__(
        self,
        text_dim: int,
        n_embed: int,
        grid: int,
        dim: int = 256,
        encoder_depth: int = 1,
        decoder_depth: int = 6,
        heads: int = 4,
        mlp_dim: int = 768,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.text_proj = Linear(text_dim, dim)
        self.encoder_layers = nn.ModuleList(EncoderLayer(dim, heads, mlp_dim, dropout) for _ in range(encoder_depth))
        self.encoder_norm = nn.LayerNorm(dim)
        self.embed_tokens = nn.Embedding(n_embed + 1, dim)  # the last row is the start token
        self.embed_positions = nn.Embedding(grid * grid, dim)
        self.decoder_layers = nn.ModuleList(DecoderLayer(dim, heads, mlp_dim, dropout) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)
        self.length, self.depth = grid * grid, decoder_depth
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        nn.init.normal_(self.embed_positions.weight, std=0.02)

    def encode_text(self, text_states: Tensor, text_mask: Tensor) -> Tensor:
        """Hidden states [B, T, text_dim] and their mask [B, T] (true: a token) -> [B, T, D]."""
        x = self.text_proj(text_states)
        for layer in self.encoder_layers:
            x = layer(x, text_mask[:, None, None, :])
        return self.encoder_norm(x)

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        text_keys_values: KeysValues,
        text_mask: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits [R, n, K] of the tokens that follow.

        Args:
            tokens, positions: [R, n], [n] or [R, n]; -1 is the start token and its place.
            mask: [R or 1, 1, n, m] bool, which of the m keys each token sees.
            text_keys_values: of each decoder layer, from `project_text`.
        """
        start = self.embed_tokens.num_embeddings - 1
        positions = self.embed_positions((positions + 1).clamp(max=self.length - 1))  # the cell that is predicted
        x = self.embed_tokens(torch.where(tokens < 0, start, tokens)) + positions
        x = self.drop(x)
        for index, layer in enumerate(self.decoder_layers):
            x = layer(x, mask, text_keys_values[index], text_mask[:, None, None, :], cache, index)
        return linear(self.decoder_norm(x), self.embed_tokens.weight[:-1])

    def project_text(self, encoded: Tensor) -> KeysValues:
        """Keys and values of the cross-attention of every decoder layer, computed once for a picture."""
        return [layer.cross_attn.keys_values(encoded) for layer in self.decoder_layers]

    def forward(self, text_states: Tensor, text_mask: Tensor, tokens: Tensor) -> Tensor:
        """Teacher forcing: text states [B, T, text_dim], mask [B, T], tokens [B, N] -> logits [B, N, K]."""
        encoded = self.encode_text(text_states, text_mask)
        input_tokens = F.pad(tokens[:, :-1], (1, 0), value=-1)
        positions = torch.arange(-1, self.length - 1, device=tokens.device)
        mask = causal_mask(self.length, self.length, tokens.device)
        return self.decode(input_tokens, positions, mask, self.project_text(encoded), text_mask)
