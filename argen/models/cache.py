"""What the decoders share: heads, masks, and a static key/value cache that can be rolled back."""

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
