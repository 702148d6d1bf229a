"""The keys and values of a decoder's layers, which can be rolled back.

Letters in shape comments: B images, n tokens of a forward pass, m keys, D width, H heads, R cache rows (2B under guidance: with the prompt,
then without).
"""

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
        self.buffers: list[Tensor | None] = [
            None
        ] * layers  # each [2, R, H, capacity, D/H]: attention reads a head in one go
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
        visible = visible.reshape(-1, 1, n, self.end).to(device, non_blocking=True)
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
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if buffer is None or buffer.shape[3] < self.end:
            room = key.new_zeros(2, *key.shape[:2], max(self.capacity, self.end), key.shape[3])
            if buffer is not None:
                room[:, :, :, : buffer.shape[3]] = buffer
            self.buffers[layer] = buffer = room
        if self.scattered is not None:
            buffer[0, :, :, self.scattered], buffer[1, :, :, self.scattered] = key, value
        elif isinstance(self.first, int):
            buffer[0, :, :, self.first : self.end], buffer[1, :, :, self.first : self.end] = key, value
        else:
            rows, slots = self._slots(torch.arange(n, device=key.device))
            buffer[0, rows, :, slots], buffer[1, rows, :, slots] = key.transpose(1, 2), value.transpose(1, 2)
        seen = buffer[:, :, :, : self.end].transpose(2, 3)
        return seen[0], seen[1]

    def keep(self, nodes: Tensor) -> None:
        """Keep the tokens `nodes` of the last forward pass ([m] or [R, m], by their number in it), moved to its first slots."""
        for buffer in self.buffers:
            index = nodes.to(buffer.device)
            rows, slots = self._slots(torch.arange(index.shape[-1], device=buffer.device), buffer.shape[1])
            kept = self._slots(index, buffer.shape[1])[1]
            for part in buffer:
                part[rows, :, slots] = part[rows, :, kept]

    def _slots(self, nodes: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows [R, 1] and slots [R, m] of tokens of the forward pass."""
        first = self.first if isinstance(self.first, Tensor) else nodes.new_full((rows,), self.first)
        return torch.arange(len(first), device=nodes.device)[:, None], first[:, None] + nodes
