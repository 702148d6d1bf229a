"""A decoding pass as one compiled graph for the CPU, by OpenVINO.

`CompiledStep` stands where a network's own pass stands and takes the same arguments. The graph attends to the cached keys and values where
they lie, so that no token moves them, and gives those of the new tokens back. Rows do not influence each other, also with 8-bit weights,
whose activations are rounded in groups of one row.

Letters in shape comments: R rows, n tokens of a pass, M cached slots, P of them before the first cell, H heads, d numbers of a head, L layers.
"""

import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from argen.models.kv_cache import KeyValueCache
from argen.models.layers import Linear, leave_unpacked
from argen.models.quantized import QuantizedLinear
from tokenizers_img.attention import DispatchedAttention

FIRST_SLOTS = 64  # of a cache, beside those of the condition; it grows by doubling
GROUP = "32"  # numbers of a row whose activations are rounded together, with 8-bit weights


class SlotCache(KeyValueCache):
    """A `KeyValueCache` whose keys and values lie as the graph reads them: [2 L, R, H, capacity, d], keys and values of each layer in turn.

    Args:
        layers, capacity, before: see `KeyValueCache`; the room grows as it is needed.
    """

    def __init__(self, layers: int, capacity: int, before: int):
        super().__init__(layers, capacity, before)
        self.layers = layers
        self.slots: Tensor | None = None
        self.request: Any = None  # of OpenVINO, made at the first pass

    def room(self, rows: int, heads: int, width: int) -> Tensor:
        """The buffer, with room for the slots of this pass."""
        size = self.before + FIRST_SLOTS if self.slots is None else self.slots.shape[3]
        while size < self.end:
            size *= 2
        size = size if self.end > self.capacity else min(size, max(self.capacity, self.before + FIRST_SLOTS))
        if self.slots is None or self.slots.shape[3] < size:
            grown = torch.zeros(2 * self.layers, rows, heads, size, width)
            if self.slots is not None:
                grown[:, :, :, : self.slots.shape[3]] = self.slots
            self.slots = grown
        return self.slots

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `KeyValueCache.append`."""
        slots = self.room(key.shape[0], *key.shape[2:])
        for index, part in ((2 * layer, key), (2 * layer + 1, value)):
            self._write(slots[index : index + 1], part.transpose(1, 2)[None])
        return tuple(slots[2 * layer + part, :, :, : self.end].transpose(1, 2) for part in (0, 1))

    def store(self, new: Tensor) -> None:
        """Write what the graph made of a pass, [2 L, R, H, n, d], into its slots."""
        self._write(self.slots, new)

    def _write(self, slots: Tensor, new: Tensor) -> None:
        n = new.shape[3]
        if self.scattered is not None:
            slots[:, :, :, self.scattered] = new
        elif isinstance(self.first, int):
            slots[:, :, :, self.first : self.first + n] = new
        else:
            rows, places = self._slots(torch.arange(n))
            slots[:, rows, :, places] = new.permute(1, 3, 0, 2, 4)

    def keep(self, nodes: Tensor) -> None:
        """See `KeyValueCache.keep`."""
        rows, places = self._slots(torch.arange(nodes.shape[-1]), self.slots.shape[1])
        self.slots[:, rows, :, places] = self.slots[:, rows, :, self._slots(nodes, self.slots.shape[1])[1]]

    def split(self, visible: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """What a pass sees, [1 or R, 1, n, columns] bool of the slots up to `end` (all, or those from `before` on), -> of the slots in the
        buffer, its own excepted, and of its own tokens [1 or R, 1, n, n]."""
        skipped = self.end - visible.shape[-1]
        width = self.slots.shape[3] - skipped
        if self.scattered is None and isinstance(self.first, int):
            first = self.first - skipped
            cached, new_visible = visible[..., :first], visible[..., first : first + n]
        else:
            places = self.scattered[None] if self.scattered is not None else self._slots(torch.arange(n))[1]
            places = (places - skipped)[:, None, None].expand(-1, 1, n, -1)
            visible = visible.expand(max(len(visible), len(places)), -1, -1, -1)
            places = places.expand(len(visible), -1, -1, -1)
            new_visible, cached = visible.gather(3, places), visible.scatter(3, places, False)
        return nn.functional.pad(cached, (0, width - cached.shape[-1])).contiguous(), new_visible.contiguous()


class _Parts:
    """Keys or values of a layer in the graph: cached ones and new ones, [R, H, M, d] and [R, H, n, d]."""

    def __init__(self, cached: Tensor, new: Tensor):
        self.cached, self.new = cached, new


class _TracedCache:
    """Stands for a `KeyValueCache` while a pass is traced."""

    def __init__(self, slots: list[Tensor]):
        self.slots, self.new = slots, [torch.empty(0)] * len(slots)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[_Parts, _Parts]:
        parts = []
        for index, new in ((2 * layer, key), (2 * layer + 1, value)):
            self.new[index] = new.transpose(1, 2)
            parts.append(_Parts(self.slots[index], self.new[index]))
        return parts[0], parts[1]


def _attend(
    layer: Any, query: Tensor, key: Any, value: Any, mask: Tensor | None = None, *_, scale: float | None = None
):
    """`DispatchedAttention.attend` in the graph, over parts or over plain keys and values."""
    query = query.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    if not isinstance(key, _Parts):
        logits = query @ key.permute(0, 2, 3, 1)
        logits = logits if mask is None else logits + mask
        return (logits.softmax(dim=-1) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
    logits = torch.cat([query @ part.transpose(-1, -2) for part in (key.cached, key.new)], dim=-1)
    probs, m = (logits + mask).softmax(dim=-1), key.cached.shape[2]
    attended = probs[..., :m] @ value.cached + probs[..., m:] @ value.new
    return attended.transpose(1, 2).flatten(2)


class _Pass(nn.Module):
    """A pass with everything it reads as one row of tensors, for tracing."""

    def __init__(self, network: nn.Module, decode: Callable[..., Any], leaves: list[Any], structure: Any):
        super().__init__()
        self.network, self.decode, self.structure = network, decode, structure
        self.present = [leaf is not None for leaf in leaves]

    def forward(self, tokens: Tensor, positions: Tensor, cached: Tensor, new_visible: Tensor, *tensors: Tensor):
        further = iter(tensors)
        leaves = [next(further) if present else None for present in self.present]
        cache = _TracedCache(list(further))
        visible = torch.cat([cached, new_visible], dim=-1)
        output = self.decode(tokens, positions, visible, *pytree.tree_unflatten(leaves, self.structure), cache=cache)
        return *(output if isinstance(output, tuple) else (output,)), torch.stack(cache.new)


class CompiledStep:
    """Takes the arguments of a network's pass, and gives what it gives.

    Args:
        network: on the CPU, in float32; its attention layers have `heads`, its configuration `dim`.
        decode: the pass: called with tokens [R, n], positions [n] or [R, n], what is visible [1 or R, 1, n, m] bool, further tensors (or
            lists of them, or None) and ``cache=``; gives a tensor or a tuple of them.
    """

    def __init__(self, network: nn.Module, decode: Callable[..., Any]):
        self.network, self.decode = network, decode
        leave_unpacked(network)  # the graph has its own copy
        attention = next(part for part in network.modules() if isinstance(part, DispatchedAttention))
        self.heads, self.width = attention.heads, network.config.dim // attention.heads
        self.graphs: dict[Any, Any] = {}  # form of the further arguments -> the compiled graph
        self.owners: list[Any] = []  # of memory that graphs read
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """State for copying and pickling, without the compiled graphs: a copy recompiles."""
        return {**vars(self), "graphs": {}, "owners": [], "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.Lock())

    def fits(self) -> bool:
        """Whether the network is where, and in the precision, that graphs are for."""
        return self.network.device.type == "cpu" and self.network.dtype == torch.float32

    def release(self) -> None:
        """Forget all graphs: the network is no longer what they were made of."""
        with self.lock:
            self.graphs, self.owners = {}, []

    def cache(self, layers: int, capacity: int, before: int = 1) -> SlotCache:
        """A cache for this pass, see `KeyValueCache`."""
        return SlotCache(layers, capacity, before)

    def __call__(self, tokens: Tensor, positions: Tensor, visible: Tensor, *rest: Any, cache: SlotCache) -> Any:
        slots = cache.room(len(tokens), self.heads, self.width)
        leaves, structure = pytree.tree_flatten(rest)
        tensors = [leaf for leaf in leaves if leaf is not None]
        positions = positions if positions.ndim == 2 else positions[None]
        inputs = [tokens, positions, *cache.split(visible, tokens.shape[1]), *tensors, *slots.unbind()]
        form = str(structure), *(None if leaf is None else leaf.ndim for leaf in leaves)
        with self.lock:
            if form not in self.graphs:
                self.graphs[form] = self._compile(inputs, leaves, structure)
        if cache.request is None:
            cache.request = self.graphs[form].create_infer_request()
        *outputs, new = run(cache.request, inputs)
        cache.store(new)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _compile(self, inputs: list[Tensor], leaves: list[Any], structure: Any) -> Any:
        """The graph for arguments of this form, with any number of rows, tokens, text tokens and slots."""
        import openvino

        with torch.no_grad(), traceable(self.network), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", torch.jit.TracerWarning
            )  # what Python decides here depends on the network alone
            example = tuple(tensor.contiguous() for tensor in inputs)
            traced = _Pass(self.network, self.decode, leaves, structure)
            model, owner = converted(traced, example)
        layers = len(inputs) - 4 - sum(leaf is not None for leaf in leaves)
        shapes = {}
        for index, (port, tensor) in enumerate(zip(model.inputs, inputs, strict=True)):
            shape = [-1] * tensor.ndim
            if tensor.is_floating_point():
                shape[-1] = tensor.shape[-1] if tensor.ndim > 2 else -1
            if index >= len(inputs) - layers:
                shape[1] = self.heads
            shapes[port] = openvino.PartialShape(shape)
        model.reshape(shapes)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if rounds_activations() else "0",
        }
        graph = openvino.Core().compile_model(model, "CPU", settings)
        self.owners.append(owner)
        return graph


def rounds_activations() -> bool:
    """Whether the processor multiplies integers of 8 bits fast (VNNI); without, activations stay in float32."""
    return torch.cpu._is_vnni_supported()


def run(request: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Run a graph on tensors, which it reads where they lie."""
    import openvino

    arrays = [tensor.contiguous().numpy() for tensor in inputs]
    for index, array in enumerate(arrays):
        request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
    request.infer()
    return [torch.from_numpy(tensor.data.copy()) for tensor in request.output_tensors]


def converted(traced: nn.Module, example: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """The graph of a module, and the owner of the memory that its constants share. The steps of `openvino.convert_model`, without those that copy what it has constants of."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    modules, conversion = extensions()
    frontend = FrontEndManager().load_by_framework("pytorch")
    frontend.add_extension(conversion)
    kinds = {extension.module: extension for extension in modules}
    decoder = TorchScriptPythonDecoder(
        traced, example_input=example, module_extensions=kinds, skip_freeze=True, trace_kwargs={"check_trace": False}
    )
    return frontend.convert(frontend.load(decoder)), decoder


def extensions() -> tuple[list[Any], Any]:
    """How linear layers come into the graph: as products with constants that keep their 8 or 4 bits, which tracing neither computes nor
    unpacks."""
    from openvino import opset13 as ops
    from openvino.frontend.pytorch import ConversionExtension, ModuleExtension

    def empty(layer: Any, x: Tensor, *_: Tensor) -> Tensor:
        return x.new_zeros(
            *x.shape[:-1], layer.scales.shape[0] if isinstance(layer, QuantizedLinear) else layer.out_features
        )

    def product(layer: Any, operation: Any, x: Tensor) -> Tensor:
        weights = (layer.qweight, layer.scales) if isinstance(layer, QuantizedLinear) else (layer.weight,)
        y = operation(x, *weights)
        return y if layer.bias is None else y + layer.bias

    def convert(context: Any) -> list[Any]:
        x, weight = context.get_input(0), context.get_input(1)
        if context.get_input_size() > 2:
            weight = unpack(weight.get_node(), context.get_input(2).get_node())
        return [ops.matmul(x, weight, transpose_a=False, transpose_b=True).output(0)]

    def unpack(stored: Any, scales: Any) -> Any:
        """Constants int8 [O, I] or uint8 [O, I/2] and [O, G] -> [O, I]."""
        data, (rows, groups) = stored.data, scales.data.shape
        signed = data.dtype == np.int8
        columns = data.shape[1] * (1 if signed else 2)
        kind = openvino.Type.i8 if signed else openvino.Type.u4
        shared = openvino.Tensor(data.reshape(-1), openvino.Shape([rows, groups, columns // groups]), kind)
        values = ops.convert(ops.constant(shared, shared_memory=True), "f32")
        if not signed:
            values = ops.subtract(values, ops.convert(ops.constant(np.full((1, 1, 1), 8, np.uint8)), "f32"))
        weight = ops.multiply(values, ops.constant(scales.data.reshape(rows, groups, 1)))
        return ops.reshape(weight, ops.constant(np.array([rows, columns])), special_zero=False)

    import openvino

    kinds = (nn.Linear, Linear, QuantizedLinear)
    modules = [ModuleExtension(kind, "argen.linear", evaluate=empty, convert=product) for kind in kinds]
    return modules, ConversionExtension("argen.linear", convert)


@contextmanager
def traceable(network: nn.Module) -> Iterator[None]:
    """Attention as plain products meanwhile, which the graph may split; afterwards all layers are as they were, also those that OpenVINO
    replaced."""
    layers = [part for part in network.modules() if isinstance(part, DispatchedAttention)]
    for layer in layers:
        layer.attend = types.MethodType(_attend, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.attend
        for part in network.modules():
            for name in [name for name in vars(part) if name == "forward" or name.startswith("_openvino")]:
                delattr(part, name)
