"""What the discrete decoders share: a key/value cache that can be rolled back, and the session of samplers.

Letters in shape comments: B images, n tokens of a forward pass, m keys, T text tokens, D width, H heads, K codes, R cache
rows (2B under guidance: with the prompt, then without).
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """Keys and values of every layer: those of the token at cell p in slot p + `before`, those of what leads to the
    picture, as a start token, before.

    A forward pass is stored in consecutive slots, from that of its first token on, over whatever stands there. What lies behind a
    picture's last token is never seen, so the pictures of a batch may have different lengths, and a guess that was wrong is
    simply written over.

    Args:
        layers: decoder layers.
        capacity: slots; more room is made when a tree needs it.
        before: slots before that of the first cell.
    """

    def __init__(self, layers: int, capacity: int, before: int = 1):
        self.capacity, self.before = capacity, before
        self.buffers: list[Tensor | None] = [None] * layers  # each [2, R, capacity, H, D/H]
        self.first: int | Tensor = 0  # slot of the forward pass's first token; [R] where the pictures differ
        self.scattered: Tensor | None = None  # [n], slots of the forward pass's tokens where they are not consecutive
        self.end = 0  # slots up to here may be seen

    def place(
        self, positions: Tensor, tree: Tensor | None, guided: bool, device: torch.device, root: Tensor | None = None
    ) -> Tensor:
        """Choose the slots of a forward pass, and say what it sees: [1 or R, 1, n, end] bool.

        Args:
            positions, tree: as in `samplers.steps.Session.forward`.
            guided: the rows are those of the pictures, twice.
            root: [B], cells at which the trees begin that the forward pass goes on with; then `tree` is [B, n, m], and the forward pass
                has the last n of the m nodes.
        """
        self.scattered = None
        slots, n = positions + self.before, positions.shape[-1]
        nodes = n if tree is None else tree.shape[-1]
        base = slots[..., 0] if root is None else root + self.before  # of the tree's first node
        first = base + nodes - n
        self.end = int(first.max()) + n
        columns = torch.arange(self.end)
        if tree is None:
            visible = columns <= slots[..., None]
        else:
            place = columns - base[..., None]  # among the tree's nodes
            inside = tree.gather(-1, place.clamp(0, nodes - 1)[..., None, :].expand(*tree.shape[:-1], self.end))
            visible = torch.where(((place >= 0) & (place < nodes))[..., None, :], inside, (place < 0)[..., None, :])
        visible = visible.reshape(-1, 1, n, self.end).to(device)
        if positions.ndim == 1:
            self.first = int(first)
            return visible
        twice = 2 if guided else 1
        self.first = first.repeat(twice).to(device)
        return visible.repeat(twice, 1, 1, 1)

    def visible(
        self, positions: Tensor, tree: Tensor | None, seen: Tensor | None, guided: bool, device: torch.device
    ) -> Tensor:
        """`place` or, where `seen` is given, `scatter`."""
        if seen is not None:
            return self.scatter(positions, seen, device)
        return self.place(positions, tree, guided, device)

    def scatter(self, positions: Tensor, seen: Tensor, device: torch.device) -> Tensor:
        """The same for cells that are not next to each other; `positions` and `seen` as in `samplers.steps.Session.forward`."""
        self.scattered, self.end = (positions + self.before).to(device), seen.shape[-1] + self.before
        return F.pad(seen, (self.before, 0), value=True)[None, None].to(device)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values [R, n, H, D/H] of a forward pass in its slots; returns all up to the last of them."""
        n, buffer = key.shape[1], self.buffers[layer]
        if buffer is None or buffer.shape[2] < self.end:
            room = key.new_zeros(2, key.shape[0], max(self.capacity, self.end), *key.shape[2:])
            if buffer is not None:
                room[:, :, : buffer.shape[2]] = buffer
            self.buffers[layer] = buffer = room
        if self.scattered is not None:
            buffer[0, :, self.scattered], buffer[1, :, self.scattered] = key, value
        elif isinstance(self.first, int):
            buffer[0, :, self.first : self.end], buffer[1, :, self.first : self.end] = key, value
        else:
            rows, slots = self._slots(torch.arange(n, device=key.device))
            buffer[0, rows, slots], buffer[1, rows, slots] = key, value
        return buffer[0, :, : self.end], buffer[1, :, : self.end]

    def keep(self, nodes: Tensor) -> None:
        """Keep the tokens `nodes` of the last forward pass ([m] or [R, m], by their number in it), moved to its first slots."""
        for buffer in self.buffers:
            index = nodes.to(buffer.device)
            rows, slots = self._slots(torch.arange(index.shape[-1], device=buffer.device), len(buffer[0]))
            buffer[:, rows, slots] = buffer[:, rows, self._slots(index, len(buffer[0]))[1]]

    def _slots(self, nodes: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows [R, 1] and slots [R, m] of tokens of the forward pass."""
        first = self.first if isinstance(self.first, Tensor) else nodes.new_full((rows,), self.first)
        return torch.arange(len(first), device=nodes.device)[:, None], first[:, None] + nodes


def decoding(
    network: Any, decode: Callable[..., Any], layers: int, capacity: int, before: int = 1
) -> tuple[Callable[..., Any], KeyValueCache]:
    """The pass that a session calls, `decode` or what was compiled of it (`argen.models.compiled`), and a cache for it."""
    if network.compiled is None:
        return decode, KeyValueCache(layers, capacity, before)
    return network.compiled, network.compiled.cache(layers, capacity, before)


KeysValues = list[tuple[Tensor, Tensor]]  # of each layer's cross-attention, each [R, T, H, D/H]


class CrossAttentionDecoder(Protocol):
    """A causal decoder that reads its prompt through cross-attention, as `DecoderSession` drives it."""

    length: int  # cells of a picture
    depth: int  # layers
    compiled: Any  # `argen.models.compiled.CompiledStep` of `decode`, or None

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
    """`samplers.steps.Session` of a `CrossAttentionDecoder`, bound to the prompts of B images.

    Args:
        encoded, text_mask: [R, T, D] and [R, T] bool (true: a token). Under guidance R = 2B: the prompts of all
            pictures, then the empty prompt as often; else R = B.
    """

    def __init__(self, decoder: CrossAttentionDecoder, encoded: Tensor, text_mask: Tensor, guided: bool):
        self.decoder, self.length, self.guided = decoder, decoder.length, guided
        self.columns = int(decoder.length**0.5)
        self.text_mask = text_mask
        self.text_keys_values = decoder.project_text(encoded)
        self.decode, self.cache = decoding(decoder, decoder.decode, decoder.depth, decoder.length)

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `samplers.steps.Session.forward`."""
        visible = self.cache.visible(positions, mask, seen, self.guided, tokens.device)
        positions = positions.to(tokens.device)
        if self.guided:
            tokens = torch.cat([tokens, tokens])
            positions = torch.cat([positions, positions]) if positions.ndim == 2 else positions
        logits = self.decode(tokens, positions, visible, self.text_keys_values, self.text_mask, cache=self.cache)
        return logits.chunk(2) if self.guided else (logits, None)

    def keep(self, nodes: Tensor) -> None:
        """See `samplers.steps.Session.keep`."""
        self.cache.keep(torch.cat([nodes, nodes]) if self.guided and nodes.ndim == 2 else nodes)
