"""What the discrete decoders share: heads, masks, a key/value cache that can be rolled back, and the session of samplers.

Letters in shape comments: B pictures, n tokens of a pass, m keys, T text tokens, D width, H heads, K codes, R cache
rows (2B under guidance: with the prompt, then without).
"""

from typing import Protocol

import torch
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, n, D] -> [B, n, H, D/H], the layout of diffusers' attention dispatcher."""
    return x.unflatten(-1, (heads, -1))


def causal_mask(new: int, total: int, device: torch.device) -> Tensor:
    """[1, 1, new, total] bool: the last `new` of `total` tokens, each seeing everything up to itself."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)[None, None]


class KeyValueCache:
    """Keys and values of every layer, in buffers that are made once, at the first pass.

    Args:
        layers: decoder layers.
        capacity: entries that fit; more room is made when a tree needs it.
    """

    def __init__(self, layers: int, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.buffers: list[Tensor | None] = [None] * layers  # each [2, R, capacity, H, D/H]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values [R, n, H, D/H] of a pass; returns all of them so far.

        The pass counts from the moment in which the last layer has stored.
        """
        start, end = self.length, self.length + key.shape[1]
        buffer = self.buffers[layer]
        if buffer is None or buffer.shape[2] < end:
            room = key.new_empty(2, key.shape[0], max(self.capacity, end), *key.shape[2:])
            if buffer is not None:
                room[:, :, :start] = buffer[:, :, :start]
            self.buffers[layer] = buffer = room
        buffer[0, :, start:end], buffer[1, :, start:end] = key, value
        if layer == len(self.buffers) - 1:
            self.length = end
        return buffer[0, :, :end], buffer[1, :, :end]

    def mask(self, new: int, tree: Tensor | None, device: torch.device) -> Tensor:
        """[1, 1, new, length + new] bool: what `new` tokens see; `tree` [new, new] as in `Session.forward`."""
        if tree is None:
            return causal_mask(new, self.length + new, device)
        past = torch.ones(new, self.length, dtype=torch.bool, device=device)
        return torch.cat([past, tree.to(device)], dim=1)[None, None]

    def keep(self, entries: Tensor) -> None:
        """Keep `entries` ([m] or [R, m]) of the cache, in this order."""
        for buffer in self.buffers:
            index = entries.to(buffer.device)
            if index.ndim == 1:
                index = index.expand(buffer.shape[1], -1)
            rows = torch.arange(buffer.shape[1], device=buffer.device)[:, None]
            buffer[:, :, : index.shape[1]] = buffer[:, rows, index]
        self.length = entries.shape[-1]


KeysValues = list[tuple[Tensor, Tensor]]  # of each layer's cross-attention, each [R, T, H, D/H]


class CrossAttentionDecoder(Protocol):
    """A causal decoder that reads its prompt through cross-attention, as `DecoderSession` drives it."""

    length: int  # cells of a picture
    depth: int  # layers

    def project_text(self, encoded: Tensor) -> KeysValues: ...

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        text_keys_values: KeysValues,
        text_mask: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor: ...


class DecoderSession:
    """`samplers.steps.Session` of a `CrossAttentionDecoder`, bound to the prompts of B pictures.

    Args:
        encoded, text_mask: [R, T, D] and [R, T] bool (true: a token). Under guidance R = 2B: the prompts of all
            pictures, then the empty prompt as often; else R = B.
    """

    def __init__(self, decoder: CrossAttentionDecoder, encoded: Tensor, text_mask: Tensor, guided: bool):
        self.decoder, self.length, self.guided = decoder, decoder.length, guided
        self.text_mask = text_mask
        self.text_keys_values = decoder.project_text(encoded)
        self.cache = KeyValueCache(decoder.depth, decoder.length)

    @property
    def cached(self) -> int:
        return self.cache.length

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """See `samplers.steps.Session.forward`."""
        visible = self.cache.mask(tokens.shape[1], mask, tokens.device)
        if self.guided:
            tokens = torch.cat([tokens, tokens])
            positions = torch.cat([positions, positions]) if positions.ndim == 2 else positions
        logits = self.decoder.decode(tokens, positions, visible, self.text_keys_values, self.text_mask, self.cache)
        return logits.chunk(2) if self.guided else (logits, None)

    def keep(self, entries: Tensor) -> None:
        """See `samplers.steps.Session.keep`."""
        self.cache.keep(torch.cat([entries, entries]) if self.guided and entries.ndim == 2 else entries)
