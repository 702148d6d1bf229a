"""Calibrated rounding of a network's linear layers, one layer of the network after the other, on tokens that it drew itself.

The network runs through its sessions, as it decodes, with all tokens of an image in one pass. While a block (one of the layers that repeat)
is rounded, those before it give what they gave after their own rounding, and those behind it do nothing, so that a pass costs one block.
In a block, the linear layers that read the same tensor are rounded together, in the order in which they run; the inputs of each are those
that the rounded ones before it make. What runs before the first block, as a text encoder that belongs to the network, comes first.

Letters in shape comments: R rows, n tokens of a pass, m keys, T positions of a condition, H heads, I inputs of a linear layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from argen.models.gptq import Levels, Rounded, gptq, hessian, token_weights
from argen.models.quantized import Quantization, is_head, layers_of, layout_of
from samplers.steps import Session
from tokenizers_img.attention import DispatchedAttention

BLOCKS = "decoder_layers", "model.layers", "models.ar_image_model.trunk.blocks", "layers"  # where networks have them
ATTENTION = "self_attn", "attn", "attention"  # what blocks call their self-attention
METHODS = "condition", "forward"  # of blocks; the first is LlamaGen's, for what stands before the image


@dataclass(frozen=True)
class Batch:
    """Images to calibrate with.

    Attributes:
        start: starts a session of them.
        tokens: [B, N], theirs.
    """

    start: Callable[[], Session]
    tokens: Tensor

    def read(self, session: Session) -> tuple[Tensor, Tensor | None]:
        """Logits of all tokens, in one pass of a session that has just begun: with the condition and, under guidance, without."""
        positions = torch.arange(-1, self.tokens.shape[1] - 1)
        return session.forward(F.pad(self.tokens[:, :-1], (1, 0), value=-1), positions)


class _Stop(Exception):
    """Nothing behind is needed."""


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The layers that repeat, in order.

    Raises:
        ValueError: there are none.
    """
    for path in BLOCKS:
        with suppress(AttributeError):
            return list(network.get_submodule(path))
    raise ValueError(f"a {type(network).__name__} cannot be calibrated: quantize with the method rtn")


@torch.no_grad()
def calibrate(network: nn.Module, batches: Sequence[Batch], how: Quantization) -> dict[str, Rounded]:
    """The rounded weights of the linear layers that run, by name; the network's own become what these stand for. Heads are left out."""
    return _Calibration(network, batches, how).run()


class _Calibration:
    def __init__(self, network: nn.Module, batches: Sequence[Batch], how: Quantization):
        self.network, self.batches, self.how = network, batches, how
        self.blocks = blocks_of(network)
        layers = layers_of(network).items()
        self.layers = {name: layer for name, layer in layers if not is_head(name)}
        self.rounded: dict[str, Rounded] = {}
        self.current = -1  # block; -1 for what runs before
        self.outputs: dict[tuple[int, str], Any] = {}  # batch, method -> what the block before the current gives
        self.new: dict[tuple[int, str], Any] = {}  # the same of the current
        self.latest: Any = None  # that of the last pass
        self.weights: dict[tuple[int, str], Tensor] = {}  # batch, method -> of the tokens in the current block [R, n]
        self.place: tuple[int, str] | None = None  # batch and method in which a block runs; None outside
        self.batch = 0
        self.valid: Tensor | None = None  # [R, n], of the tokens of a pass, false for padding

    def run(self) -> dict[str, Rounded]:
        with self._alone(), _eager(self.network):
            for current in range(-1, len(self.blocks)):
                self.current = current
                groups = self._groups()
                self.weights = self._importance() if self.how.method == "rsq" and self.current >= 0 else {}
                for names in groups:
                    matrix = self._hessian(self.layers[names[0]])
                    for name in names:
                        self._round(name, matrix)
                if self.current >= 0:
                    self.new = {}
                    self._passes()
                    self.outputs, self.new = self.new, {}
        return self.rounded

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Blocks run as `_block` says, meanwhile."""
        wrapped = [(block, method) for block in self.blocks for method in METHODS if hasattr(type(block), method)]
        for block, method in wrapped:
            setattr(block, method, self._block(self.blocks.index(block), method, getattr(block, method)))
        try:
            yield
        finally:
            for block, method in wrapped:
                delattr(block, method)

    def _block(self, index: int, method: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.current < 0:
                raise _Stop
            if index < self.current:
                return self.outputs[self.batch, method]
            if index == self.current:
                self.place = self.batch, method
                self.latest = run(*args, **kwargs)
                self.new[self.place], self.place = self.latest, None
            if method == "forward" and index == len(self.blocks) - 1:
                raise _Stop
            return self.latest

        return wrapped

    def _passes(self, count: int | None = None, after: Callable[[Session | None], None] | None = None) -> None:
        """Run the batches, or the first of them; `after` each session has begun, it is called with it, or None if none could."""
        for number, batch in enumerate(self.batches[:count]):
            self.batch, self.valid, session = number, None, None
            with suppress(_Stop):
                session = batch.start()
            if after is not None:
                after(session)
            if session is None:
                continue
            if isinstance(mask := getattr(session, "mask", None), Tensor):
                self.valid = F.pad(mask.bool(), (0, batch.tokens.shape[1]), value=True)
            with suppress(_Stop):
                batch.read(session)

    def _groups(self) -> list[list[str]]:
        """Layers that run here and are not rounded yet: those that read the same tensor together, in the order in which they run."""
        calls: list[tuple[str, Tensor]] = []

        def hook(name: str) -> Callable[..., None]:
            def called(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
                if (self.place is None) == (self.current < 0):
                    calls.append((name, args[0]))

            return called

        todo = {name: layer for name, layer in self.layers.items() if name not in self.rounded}
        handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in todo.items()]
        self._passes(1)
        for handle in handles:
            handle.remove()
        last = {name: number for number, (name, _) in enumerate(calls)}  # a condition may skip some of them
        groups: list[list[str]] = []
        previous: Tensor | None = None
        for name, number in sorted(last.items(), key=lambda item: item[1]):
            x = calls[number][1]
            if x is previous:
                groups[-1].append(name)
            else:
                groups.append([name])
            previous = x
        return groups

    def _hessian(self, layer: nn.Linear) -> Tensor:
        """Of the inputs of a layer [I, I], over all passes."""
        total = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        outside: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if self.place is None:
                outside.append(x)  # until the session says which of its tokens are text
                return
            weights = self.weights.get(self.place)
            if self.valid is not None and self.valid.shape == x.shape[:2]:
                weights = self.valid.float() if weights is None else weights * self.valid
            total.add_(hessian(x, None if weights is None or weights.shape != x.shape[:2] else weights))

        def after(session: Session | None) -> None:
            mask = getattr(session, "text_mask", None)
            for x in outside:
                fits = mask is not None and mask.shape == x.shape[:2]
                total.add_(hessian(x, mask.float() if fits else None))
            outside.clear()

        handle = layer.register_forward_pre_hook(hook)
        self._passes(after=after)
        handle.remove()
        return total

    def _round(self, name: str, matrix: Tensor) -> None:
        layer, how = self.layers[name], self.how
        bits, group = layout_of(name, layer, how)
        rounded = gptq(layer.weight, matrix, Levels(bits, clip=True), group, how.act_order)
        layer.weight.copy_(rounded.dequantized())
        self.rounded[name] = rounded

    def _importance(self) -> dict[tuple[int, str], Tensor]:
        """Weights of the tokens of each pass through the current block, by how much its self-attention looks at them."""
        block = self.blocks[self.current]
        columns: dict[Any, tuple[Tensor, int]] = {}  # and how many tokens the pass has
        attention = next(getattr(block, name) for name in ATTENTION if hasattr(block, name))
        if isinstance(attention, DispatchedAttention):
            attend = attention.attend

            def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
                columns[self.place] = attention_columns(query, key, mask), query.shape[1]
                return attend(query, key, value, mask)

            vars(attention)["attend"] = attended
            self._passes()
            del vars(attention)["attend"]
        else:

            def hook(_: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
                seen = output[1].float() * (1 if self.valid is None else self.valid[:, None, :, None])
                columns[self.place] = seen.sum(dim=(1, 2)), seen.shape[2]

            handle = attention.register_forward_hook(hook)
            self._passes()
            handle.remove()
        return self._sequence_weights(columns)

    def _sequence_weights(self, columns: dict[Any, tuple[Tensor, int]]) -> dict[tuple[int, str], Tensor]:
        weights = {}
        for batch in range(len(self.batches)):
            seen, n = columns[batch, "forward"]
            before = seen.shape[1] - n  # keys of the condition
            first = seen[:, :before]
            if (batch, "condition") in columns:
                first = first + columns[batch, "condition"][0]
            elif before:  # one key stands for all positions
                positions = self._positions(batch)
                first = first.expand(-1, positions) / positions
            r = token_weights(torch.cat([first, seen[:, before:]], dim=1))
            weights[batch, "forward"] = r[:, first.shape[1] :]
            if before:
                weights[batch, "condition"] = r[:, : first.shape[1]]
        return weights

    def _positions(self, batch: int) -> int:
        """T, of a LlamaGen whose condition does not attend."""
        return self.new[batch, "condition"][0].shape[1]


def attention_columns(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """How much attention each key gets, of all heads and queries together: [R, n, H, D/H], [R, m, H, D/H], mask -> [R, m]."""
    rows = []
    for index, (q, k) in enumerate(zip(query.float(), key.float(), strict=True)):
        scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
        visible = mask[index if len(mask) > 1 else 0]
        scores = scores.masked_fill(~visible, -torch.inf) if visible.dtype == torch.bool else scores + visible
        rows.append(scores.softmax(dim=-1).sum(dim=(0, 1)))
    return torch.stack(rows)


@contextmanager
def _eager(network: nn.Module) -> Iterator[None]:
    """Attention that says where it looks, of networks of transformers."""
    if not isinstance(network, PreTrainedModel):
        yield
        return
    before = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation(before)
