"""A decoding pass as CUDA graphs of fixed shapes, by ``torch.compile``.

`GraphedStep` stands where a network's own pass stands and takes the same arguments. Keys and values lie in buffers of one size: a pass writes
them into the slots that a tensor names and attends to the whole buffer under a mask, so no number of the loop is a part of a graph, and a
picture needs one graph for each number of tokens in a pass. Wider passes are padded to the next power of two.

Letters in shape comments: R rows, n tokens of a pass, S slots of a buffer, H heads, d numbers of a head.
"""

import inspect
import threading
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from argen.models.kv_cache import KeyValueCache
from tokenizers_img.attention import DispatchedAttention

SPARE = 64  # slots behind those of a picture, for trees; the last one takes the keys of what pads a pass
PER_TOKEN = {
    "control": 4,
    "scores": 3,
}  # arguments of a pass that have an entry for each of its tokens, [..., n, D], where they have so many axes
ALIGNED = 64  # a buffer's slots are a multiple of so many, as kernels like them
ROOMS = 4  # that are kept while no cache has them
GRAPHS = 32  # that a room keeps


class Room:
    """Buffers of all layers, which graphs read where they lie; taken by one cache at a time.

    Attributes:
        buffers: of each layer [2, R, H, S, d], keys and values.
        graphs: form of a pass's arguments -> its graph; the least recently used one first.
    """

    def __init__(self, buffers: list[Tensor]):
        self.buffers = buffers
        self.graphs: dict[Any, Callable[..., Any]] = {}
        self.taken: Callable[[], Any] = lambda: None

    @property
    def slots(self) -> int:
        return self.buffers[0].shape[3]

    def graph(self, form: Any, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """The graph for arguments of a form, which `make` compiles where there is none; of more than `GRAPHS` the least recently used is released."""
        graph = self.graphs.pop(form, None)
        self.graphs[form] = make() if graph is None else graph
        if len(self.graphs) > GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        return self.graphs[form]


class FixedCache(KeyValueCache):
    """A `KeyValueCache` whose buffers are those of a `Room`.

    Args:
        step: gives the room.
        layers, capacity, before: see `KeyValueCache`.
    """

    def __init__(self, step: "GraphedStep", layers: int, capacity: int, before: int):
        super().__init__(layers, capacity, before)
        self.step, self.room = step, None

    def enter(self, rows: int) -> Room:
        """The buffers, taken at the first pass."""
        if self.room is None:
            slots = -(-(self.capacity + self.before + SPARE) // ALIGNED) * ALIGNED
            self.room = self.step.room(self, len(self.buffers), rows, slots)
            self.buffers = list(self.room.buffers)
        if self.end >= self.room.slots:
            raise ValueError(f"a pass reaches slot {self.end} of {self.room.slots}: choose a smaller tree or window")
        return self.room

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `KeyValueCache.append`."""
        self.enter(len(key))
        return super().append(layer, key, value)

    def new_slots(self, n: int, padding: int, device: torch.device) -> Tensor:
        """Where a pass of n tokens writes: [n'] or, where the pictures differ, [R, n']; padding into the last slot."""
        if self.scattered is not None:
            slots = self.scattered
        elif isinstance(self.first, int):
            slots = torch.arange(self.first, self.first + n, device=device)
        else:
            slots = self._slots(torch.arange(n, device=device))[1]
        return F.pad(slots, (0, padding), value=self.room.slots - 1)


class _Slots:
    """Stands for the cache inside a graph."""

    def __init__(self, buffers: tuple[Tensor, ...], slots: Tensor):
        self.buffers, self.slots = buffers, slots

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        buffer, slots = self.buffers[layer], self.slots
        if slots.ndim == 1:
            buffer[0].index_copy_(2, slots, key.transpose(1, 2).to(buffer.dtype))
            buffer[1].index_copy_(2, slots, value.transpose(1, 2).to(buffer.dtype))
        else:
            rows = torch.arange(len(slots), device=slots.device)[:, None]
            buffer[0][rows, :, slots], buffer[1][rows, :, slots] = key.to(buffer.dtype), value.to(buffer.dtype)
        return buffer[0].transpose(1, 2), buffer[1].transpose(1, 2)


class GraphedStep:
    """Takes the arguments of a network's pass, and gives what it gives, see `argen.models.compiled.CompiledStep`.

    Args:
        network, decode: see there; the network on its device and in its precision.
        options: of ``torch.compile``.
    """

    def __init__(self, network: nn.Module, decode: Callable[..., Any], **options: Any):
        self.network, self.decode = network, decode
        self.options = options or {"mode": "reduce-overhead"}
        attention = next(part for part in network.modules() if isinstance(part, DispatchedAttention))
        self.heads, self.width = attention.heads, network.config.dim // attention.heads
        self.names = list(inspect.signature(decode).parameters)[3:]
        self.rooms: list[Room] = []  # the least recently used one first
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """State for copying and pickling, without the compiled graphs: a copy recompiles."""
        return {**vars(self), "rooms": [], "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.Lock())

    def fits(self) -> bool:
        """Whether the network is where graphs are for: on a GPU, by the default options."""
        return self.network.device.type == "cuda" or "mode" not in self.options

    def release(self) -> None:
        """Forget all graphs: the network is no longer what they were made of."""
        with self.lock:
            self.rooms = []

    def cache(self, layers: int, capacity: int, before: int = 1) -> FixedCache:
        """A cache for this pass, see `KeyValueCache`."""
        return FixedCache(self, layers, capacity, before)

    def room(self, cache: FixedCache, layers: int, rows: int, slots: int) -> Room:
        """Buffers that no living cache has, of these sizes: those of an earlier image, whose graphs fit, or new ones. Of those that no cache
        has, the `ROOMS` most recently used are kept."""
        weight = next(self.network.parameters())
        shape = 2, rows, self.heads, slots, self.width
        with self.lock:
            room = next((each for each in self.rooms if each.taken() is None and each.buffers[0].shape == shape), None)
            if room is None:
                self._release(ROOMS - 1)
                buffers = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(layers)]
                for buffer in buffers:
                    torch._dynamo.mark_static_address(buffer)
                room = Room(buffers)
            else:
                self.rooms.remove(room)
            self.rooms.append(room)  # the most recently used one last
            room.taken = weakref.ref(cache)
        return room

    def _release(self, count: int) -> None:
        """Release rooms that no cache has, but for the `count` most recently used."""
        unused = [room for room in self.rooms if room.taken() is None]
        for room in unused[: max(0, len(unused) - count)]:
            self.rooms.remove(room)

    def __call__(self, tokens: Tensor, positions: Tensor, visible: Tensor, *rest: Any, cache: FixedCache) -> Any:
        room, n = cache.enter(len(tokens)), tokens.shape[1]
        padding = (1 << (n - 1).bit_length()) - n
        skipped = cache.end - visible.shape[-1]  # slots of the condition, which the pass itself lets be seen
        visible = F.pad(visible, (0, room.slots - cache.end))
        positions = positions if positions.ndim == 2 else positions[None]
        if padding:
            tokens, positions = (
                torch.cat([part, part[:, -1:].expand(-1, padding)], dim=1) for part in (tokens, positions)
            )
            last = torch.arange(skipped, room.slots, device=visible.device) == room.slots - 1
            visible = torch.cat([visible, last.expand(len(visible), 1, padding, -1)], dim=2)
        leaves, structure = pytree.tree_flatten(tuple(map(partial(_padded, padding=padding), self.names, rest)))
        inputs = [tokens, positions, visible, cache.new_slots(n, padding, tokens.device), *leaves]
        form = str(structure), *(None if each is None else (tuple(each.shape), each.dtype) for each in inputs)
        options = {"fullgraph": True, "dynamic": False, **self.options}
        with self.lock:
            graph = room.graph(form, lambda: torch.compile(self._pass(structure), **options))
        torch.compiler.cudagraph_mark_step_begin()
        outputs = graph(*inputs, buffers=tuple(room.buffers))
        outputs = tuple(each[:, :n].clone() for each in (outputs if isinstance(outputs, tuple) else (outputs,)))
        return outputs[0] if len(outputs) == 1 else outputs  # copies: the next run of a graph writes over its results

    def _pass(self, structure: Any) -> Callable[..., Any]:
        """The network's pass with everything that it reads as tensors."""

        def decode(tokens, positions, visible, slots, *leaves, buffers):
            rest = pytree.tree_unflatten(leaves, structure)
            return self.decode(tokens, positions, visible, *rest, cache=_Slots(buffers, slots))

        code = decode.__code__.replace(
            co_name="decode_form"
        )  # graphs are kept, and limited in number, for each code object
        own = types.FunctionType(code, globals(), "decode_form", None, decode.__closure__)
        own.__kwdefaults__ = decode.__kwdefaults__
        return own


def _padded(name: str, value: Any, padding: int) -> Any:
    """An argument of a pass of more tokens."""
    each = name in PER_TOKEN and value is not None and value.ndim == PER_TOKEN[name]
    return F.pad(value, (0, 0, 0, padding)) if each else value
