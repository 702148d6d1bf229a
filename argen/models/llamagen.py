"""LlamaGen: a decoder-only Transformer over picture tokens, after a class or a caption.

Paper: "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv 2406.06525). Code and weights:
github.com/FoundationVision/LlamaGen (MIT), whose layout this file has.

The condition stands before the picture as T positions whose rotary table is zero: their queries and keys vanish. So each
of them averages the values of the positions that it sees, and to a picture token all of them together are one key with
the score log(how many are seen) and their mean value. This file keeps them as that one cache entry, which is exact.
The shipped model, which is small, reads its caption word by word instead (`caption_attention`).

Letters in shape comments: R rows (2B under guidance: with the condition, then without), T condition positions, n picture
tokens of a forward pass, m keys, D width, H heads, K codes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from argen.models.decoding import Decoding
from argen.models.kv_cache import KeyValueCache
from argen.models.layers import (
    Linear,
    RMSNorm,
    causal_mask,
    check_heads,
    grid_places,
    rotary_table,
    rotate,
    split_heads,
)
from tokenizers_img.attention import DispatchedAttention
from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.mapped import unfilled

SIZES = {  # the published widths
    "B": {"dim": 768, "depth": 12, "heads": 12},
    "L": {"dim": 1024, "depth": 24, "heads": 16},
    "XL": {"dim": 1280, "depth": 36, "heads": 20},
    "XXL": {"dim": 1536, "depth": 48, "heads": 24},
    "3B": {"dim": 3200, "depth": 24, "heads": 32},
}


Pair = tuple[Tensor, Tensor]  # keys and values


def running_mean(value: Tensor, counted: Tensor) -> Tensor:
    """Mean of [R, T, D] up to each position, over those for which `counted` [R, T, 1] is 1."""
    return (value * counted).cumsum(dim=1) / counted.cumsum(dim=1).clamp(min=1)


class Attention(DispatchedAttention):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = check_heads(dim, heads)
        self.wqkv = Linear(dim, 3 * dim, bias=False)
        self.wo = Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Tensor, layer: int, cache: KeyValueCache | None, prefix: Pair | None
    ) -> Tensor:
        """x [R, n, D]; `mask` [R, 1, n, m]; `prefix`: from `condition`, where no cache holds it."""
        query, key, value = self._heads(x)
        query, key = rotate(query, freqs_cis), rotate(key, freqs_cis)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        else:
            key, value = torch.cat([prefix[0], key], dim=1), torch.cat([prefix[1], value], dim=1)
        return self.wo(self.attend(query, key, value, mask))

    def _heads(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values [R, n, H, D/H]."""
        return [split_heads(part, self.heads) for part in self.wqkv(x).chunk(3, dim=-1)]

    def condition(self, x: Tensor, mask: Tensor, attends: bool) -> tuple[Tensor, Pair]:
        """Condition positions x [R, T, D], of which `mask` [R, T] is true for those that others see -> their output, and
        what picture tokens see of them: keys and values [R, T, H, D/H] if the condition `attends`, else [R, 1, H, D/H].

        The others, the padding, see the padding before them, as in half precision in the authors' code, or themselves.
        """
        if attends:
            query, key, value = self._heads(x)
            others = causal_mask(x.shape[1], x.shape[1], x.device) & mask[:, None, None]
            visible = others | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            return self.wo(self.attend(query, key, value, visible)), (key, value)
        value, weights = self.wqkv(x)[..., 2 * x.shape[-1] :], mask[..., None].to(x.dtype)
        means, padding = (running_mean(value, part) for part in (weights, 1 - weights))
        mean = split_heads(means[:, -1:], self.heads)
        return self.wo(torch.where(mask[..., None], means, padding)), (torch.zeros_like(mean), mean)


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.attention, self.attention_norm = Attention(dim, heads), RMSNorm(dim)
        self.feed_forward, self.ffn_norm = FeedForward(dim, hidden), RMSNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, *attending) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x), *attending))
        return x + self.drop(self.feed_forward(self.ffn_norm(x)))

    def condition(self, x: Tensor, mask: Tensor, attends: bool) -> tuple[Tensor, Pair]:
        attended, prefix = self.attention.condition(self.attention_norm(x), mask, attends)
        x = x + self.drop(attended)
        return x + self.drop(self.feed_forward(self.ffn_norm(x))), prefix


class _Prefixes:
    """Stands for a cache in a pass over cells that are known: gives each layer what stands before them, and keeps theirs."""

    def __init__(self, prefixes: list[Pair]):
        self.prefixes, self.own = prefixes, []

    def append(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        self.own.append((key, value))
        return tuple(torch.cat(pair, dim=1) for pair in zip(self.prefixes[layer], (key, value), strict=True))

    def joined(self) -> list[Pair]:
        """Of each layer all of them."""
        pairs = zip(self.prefixes, self.own, strict=True)
        return [tuple(torch.cat(part, dim=1) for part in zip(*pair, strict=True)) for pair in pairs]


class MLP(nn.Module):
    """Two matrices without biases, so that zeros stay zeros."""

    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.fc1 = Linear(inputs, dim, bias=False)
        self.fc2 = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ClassEmbedder(nn.Module):
    """Class ids [R] -> [R, 1, D]; the last id is "no class"."""

    def __init__(self, classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding_table(ids)[:, None]


class CaptionEmbedder(nn.Module):
    """Text features [R, T, caption_dim] -> [R, T, D]; `uncond_embedding` are the features of "no caption"."""

    def __init__(self, length: int, caption_dim: int, dim: int):
        super().__init__()
        self.cap_proj = MLP(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.randn(length, caption_dim) / caption_dim**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.cap_proj(features)


class LlamaGen(Decoding, ModelMixin, ConfigMixin):
    """A condition and tokens so far -> logits of the tokens that follow.

    Args:
        n_embed: K, the picture tokenizer's vocabulary.
        grid: side of the square token grid; N = grid * grid.
        classes: how many there are, for a class-conditional model; else None.
        caption_dim, caption_length: width and number T of the text features, for a caption-conditional model.
        dim, depth, heads: sizes.
        multiple_of: the feed-forward width is 8/3 of `dim`, rounded up to a multiple of this.
        dropout: in training, on embeddings and on what a layer adds.
        caption_attention: words attend and are attended to, each for itself. In the published models they are not.
        looks_ahead: it was trained to see known cells that come later, see `look_ahead`. The published models were not.
    """

    @register_to_config
    def __init__(
        self,
        n_embed: int = 16384,
        grid: int = 16,
        classes: int | None = None,
        caption_dim: int = 2048,
        caption_length: int = 120,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        multiple_of: int = 256,
        dropout: float = 0.1,
        caption_attention: bool = False,
        looks_ahead: bool = False,
    ):
        super().__init__()
        hidden = multiple_of * -(-int(8 * dim / 3) // multiple_of)
        self.cls_embedding = (
            CaptionEmbedder(caption_length, caption_dim, dim) if classes is None else ClassEmbedder(classes, dim)
        )
        self.tok_embeddings = nn.Embedding(n_embed, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, hidden, dropout) for _ in range(depth))
        self.norm = RMSNorm(dim)
        self.output = Linear(dim, n_embed, bias=False)
        self.drop = nn.Dropout(dropout)
        self.length, self.depth = grid * grid, depth
        self.register_buffer("freqs_cis", rotary_table(dim // heads, grid_places(grid)), persistent=False)
        self.apply(_init)
        nn.init.zeros_(self.output.weight)

    @classmethod
    def from_original(cls, path: str | Path, size: str, grid: int, classes: int | None = None) -> "LlamaGen":
        """Load a published file.

        Args:
            path: as ``c2i_L_384.pt`` or ``t2i_XL_stage1_256.pt``.
            size: a name in `SIZES`.
            grid: cells on a side, which the file does not say: 16 for 256 pixels, 24 for 384, 32 for 512.
            classes: 1000 for c2i, None for t2i.
        """
        if size not in SIZES:
            raise ValueError(f"unknown LlamaGen size {size!r}: expected one of {', '.join(SIZES)}")
        model = unfilled(cls, grid=grid, classes=classes, **SIZES[size])
        return load_strict(model, converted(read_state_dict(path, averaged=False)), source=path)

    def controlled(self, x: Tensor, layer: int, control: Tensor | None) -> Tensor:
        """x [R, n, D] before a layer, with what `control` [J, R, n, D] adds there: one part before each J-th of the layers."""
        if control is None or layer % (self.depth // len(control)):
            return x
        return x + control[layer // (self.depth // len(control))]

    def condition(
        self, embedded: Tensor, mask: Tensor, control: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Pair]]:
        """Read the condition.

        Args:
            embedded: [R, T, D] from `cls_embedding`.
            mask: [R, T] bool, the positions that others see; the last one is among them.
            control: [J, R, 1, D] of the first cell, see `argen.models.controlar`.

        Returns:
            Hidden states [R, T, D], the last of which gives the first token's logits; what is added [R, P] to the scores of
            the P keys that stand for the condition; those keys and their values [R, P, H, D/H] in each layer.
        """
        attends, x, prefixes = self.config.caption_attention, self.drop(embedded), []
        for index, layer in enumerate(self.layers):
            x = torch.cat([x[:, :-1], self.controlled(x[:, -1:], index, control)], dim=1)
            x, prefix = layer.condition(x, mask, attends)
            prefixes.append(prefix)
        counts = mask if attends else mask.sum(dim=1, keepdim=True)
        return self.norm(x), counts.log(), prefixes

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor,
        scores: Tensor,
        prefixes: list[Pair] | None = None,
        cache: KeyValueCache | None = None,
        control: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [R, n, D], after the last norm; `output` makes of them the logits of the tokens that follow.

        Args:
            tokens, positions: [R, n], [n] or [R, n].
            visible: [1 or R, 1, n, m - P] bool, which picture tokens, cached and new, each token sees.
            scores: from `condition`; or [R, n, P], for each token its own.
            prefixes: from `condition`, or None where they are the first entries of `cache`.
            control: [J, R, n, D] of the cells that are predicted.
        """
        cells = positions.clamp(max=self.length - 1)  # a draft may reach behind the picture
        freqs_cis = self.freqs_cis[cells if cells.ndim == 2 else cells[None]][:, :, None]
        mask = torch.zeros(scores.shape[0], 1, *visible.shape[2:], device=tokens.device).masked_fill(
            ~visible, -torch.inf
        )
        x = self.drop(self.tok_embeddings(tokens))
        scores = scores[:, None] if scores.ndim == 3 else scores[:, None, None].expand(-1, 1, tokens.shape[1], -1)
        mask = torch.cat([scores, mask], dim=-1).to(x.dtype)
        for index, layer in enumerate(self.layers):
            x = self.controlled(x, index, control)
            x = layer(x, freqs_cis, mask, index, cache, None if prefixes is None else prefixes[index])
        return self.norm(x)

    def look_ahead(self, tokens: Tensor, known: Tensor, scores: Tensor, prefixes: list[Pair]) -> list[Pair]:
        """Read the known cells of an image for those before them, which are written first.

        Each sees the condition and the known cells from itself on, so that what it is read as does not depend on what comes before it.

        Args:
            tokens, known: [R, N], and bool.
            scores, prefixes: from `condition`.

        Returns:
            Keys and values [R, P + N, H, D/H] in each layer, of which `ahead_scores` says what is seen.
        """
        cells = torch.arange(tokens.shape[1], device=tokens.device)
        read = _Prefixes(prefixes)
        self.decode(tokens, cells, (known[:, None] & (cells >= cells[:, None]))[:, None], scores, cache=read)
        return read.joined()

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor,
        scores: Tensor,
        prefixes: list[Pair] | None = None,
        control: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`decode`, and logits [R, n, K] in float32."""
        hidden = self.decode(tokens, positions, visible, scores, prefixes, cache, control)
        return hidden, self.output(hidden).float()

    def unconditional(self, condition: Tensor) -> Tensor:
        """What stands for "none" where class ids [R] or text features [R, T, caption_dim] stand."""
        if self.config.classes is not None:
            return torch.full_like(condition, self.config.classes)
        return self.cls_embedding.uncond_embedding.to(condition.dtype).expand_as(condition)

    def forward(
        self,
        condition: Tensor,
        mask: Tensor,
        tokens: Tensor,
        control: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Teacher forcing.

        Args:
            condition: class ids [R], or text features [R, T, caption_dim] with the words last.
            mask: [R, T] bool; T is 1 for classes.
            tokens: [R, n].
            control: [J, R, n, D].
            known: [R, n] bool, the cells that all before them see, see `look_ahead`; but the first cell is written without.

        Returns:
            Logits [R, n, K], float32.
        """
        parts = (None, None) if control is None else (control[:, :, :1], control[:, :, 1:])
        hidden, scores, prefixes = self.condition(self.cls_embedding(condition), mask, parts[0])
        input_tokens = tokens[:, :-1]
        positions = torch.arange(input_tokens.shape[1], device=tokens.device)
        visible = causal_mask(len(positions), len(positions), tokens.device)
        if known is not None:
            prefixes = self.look_ahead(tokens, known, scores, prefixes)
            scores = ahead_scores(scores, known, positions)
        rest = self.decode(input_tokens, positions, visible, scores, prefixes, control=parts[1])
        return self.output(torch.cat([hidden[:, -1:], rest], dim=1)).float()


def ahead_scores(scores: Tensor, known: Tensor, positions: Tensor) -> Tensor:
    """What is added to the scores of what stands before an image, for tokens at cells `positions` [n] or [R, n]: [R, n, P + N].

    Args:
        scores: [R, P], of the condition.
        known: [R, N] bool; those behind a token are seen.
    """
    positions = positions if positions.ndim == 2 else positions[None]
    seen = known[:, None] & (torch.arange(known.shape[1], device=known.device) > positions[..., None])
    ahead = torch.zeros(seen.shape, device=scores.device).masked_fill(~seen, -torch.inf)
    return torch.cat([scores[:, None].expand(-1, ahead.shape[1], -1), ahead], dim=-1)


LLAMA_NAMES = {  # LANTERN's conversion -> LlamaGen's own names
    "model.embed_tokens.": "tok_embeddings.",
    "model.cls_embedding.": "cls_embedding.",
    "model.layers.": "layers.",
    "model.norm.": "norm.",
    "lm_head.": "output.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
}


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict, in LlamaGen's layout or in that of transformers' Llama (``jadohu/LlamaGen-T2I``), as ours."""
    out = {}
    for key, value in state.items():
        if key == "freqs_cis" or ".self_attn.k_proj." in key or ".self_attn.v_proj." in key:
            continue
        if ".self_attn.q_proj." in key:
            value = torch.cat([state[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")])
            key = key.replace(".self_attn.q_proj.", ".attention.wqkv.")
        for theirs, ours in LLAMA_NAMES.items():
            key = key.replace(theirs, ours)
        out[key] = value
    return out


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
