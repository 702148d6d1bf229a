"""Linear layers with weights of 8 or 4 bits: smaller, and on a CPU faster through `argen.models.compiled`.

A weight [O, I] becomes integers and a scale for each row, or for each group of `group` columns of a row; activations stay as they are. A
saved network has `NAME.qweight` and `NAME.scales` in place of `NAME.weight`, and says `quantization` in its file's metadata.

Letters in shape comments: O outputs, I inputs, G groups of a row.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from argen.words import cut, number_of
from samplers.errors import InvalidValue
from tokenizers_img.mapped import give_back

logger = logging.getLogger(__name__)
BITS = (8, 4)
KEY = "quantization"  # in the metadata of a file
METHODS = ("rtn", "gptq", "rsq")
HEADS = ("output", "lm_head", "linear")  # last names of layers that give logits: they keep 8 bits
QUANTIZED_ALREADY = "the model is quantized already: quantize the one that it was made of"
FEW_ROWS = 4  # of one pass, for which weights are not unpacked
LARGE = 1_000_000  # weights of a layer whose temporary copies are given back at once
SMALLEST = 1e-5  # largest weight of a group, at least


@dataclass(frozen=True)
class Quantization:
    """How the weights of a network were rounded.

    Attributes:
        bits: 8 or 4.
        group: columns that share a scale; 0 for a whole row.
        method: "rtn", to nearest; "gptq" or "rsq", so that outputs on images of the model change least, see `argen.models.calibration`; the
            latter with tokens weighted by attention, and rotated where that is possible.
        act_order: of gptq and rsq, whether columns with large inputs are rounded first; with whole rows alone.
    """

    bits: int = 8
    group: int = 0
    method: str = "rtn"
    act_order: bool = False

    def __post_init__(self):
        if self.bits not in BITS:
            raise InvalidValue(f"bits is {self.bits}: expected 8 or 4", "bits")
        if not isinstance(self.group, int) or self.group < 0 or self.group % 2:
            raise InvalidValue(f"group is {cut(self.group)}: expected an even number, or 0 for whole rows", "group")
        if self.method not in METHODS:
            raise InvalidValue(f"method is {cut(self.method)}: expected rtn, gptq or rsq", "method")
        if self.act_order and (self.group or not self.calibrated):
            raise InvalidValue(
                "act_order is for gptq and rsq with whole rows: leave it out, or choose group 0", "act_order"
            )

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at inputs."""
        return self.method != "rtn"

    def to_dict(self) -> dict[str, Any]:
        """For the metadata of a file."""
        return {"bits": self.bits, "group": self.group, "method": self.method, "symmetric": True}


def rounded(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Weights [O, I] -> integers [O, I] int8 and scales [O, G] float32, of groups of `group` columns, which divides I; G = 1 where it is 0."""
    most = 2 ** (bits - 1) - 1
    parts = weight.detach().float().unflatten(1, (-1, group or weight.shape[1]))
    scales = parts.abs().amax(dim=2).clamp(min=SMALLEST) / most
    return (parts / scales[..., None]).round().clamp(-most - 1, most).flatten(1).to(torch.int8), scales


def packed(integers: Tensor) -> Tensor:
    """Integers [O, I] of 4 bits -> bytes [O, I/2]: the even columns in the low halves, 8 added."""
    low, high = (integers + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return low | high << 4


def unpacked(data: Tensor) -> Tensor:
    """Bytes [O, I/2] -> integers [O, I], 8 not yet taken away."""
    return torch.stack([torch.bitwise_and(data, 15), torch.bitwise_right_shift(data, 4)], dim=-1).flatten(1)


class QuantizedLinear(nn.Module):
    """`nn.Linear` with weights of 8 or 4 bits.

    Args:
        integers, scales: from `rounded`.
        bits: 8 or 4.
    """

    def __init__(self, integers: Tensor, scales: Tensor, bias: Tensor | None, bits: int):
        super().__init__()
        self.bits = bits
        self.qweight: Tensor
        self.scales: Tensor
        self.register_buffer("qweight", integers if bits == 8 else packed(integers))
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def _apply(self, fn, recurse: bool = True):
        """As torch's, but the scales stay in float32, whatever precision the network goes to."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.qweight.device)
        return self

    def dequantized(self) -> Tensor:
        """The weights [O, I] that the integers stand for, in the precision of the scales."""
        groups = self.scales.shape[1]
        integers = self.qweight if self.bits == 8 else unpacked(self.qweight)
        if groups == 1 and self.bits == 8:
            return integers.to(self.scales.dtype) * self.scales
        values = integers.unflatten(1, (groups, -1)).to(self.scales.dtype)
        return ((values if self.bits == 8 else values - 8) * self.scales[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        if self._multiplies_integers(x):
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.qweight, self.scales[:, 0])
            y = y.unflatten(0, x.shape[:-1])
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)

    def _multiplies_integers(self, x: Tensor) -> bool:
        """Whether PyTorch multiplies with the integers as they are faster than unpacked: for a few rows [..., I] on a CPU."""
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim > 1 and not x.requires_grad
        return plain and self.bits == 8 and self.scales.shape[1] == 1 and 0 < x.shape[:-1].numel() <= FEW_ROWS


def layers_of(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantized: those of the repeated layers, and those that give logits."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and (re.search(r"\.\d+\.", name) or name.split(".")[-1] in HEADS)
    }


def is_head(name: str) -> bool:
    """Whether a layer gives logits, by its name."""
    return name.split(".")[-1] in HEADS


def layout_of(name: str, layer: nn.Linear, how: Quantization) -> tuple[int, int]:
    """Bits of the weights of a layer, and how many columns share a scale, 0 for whole rows: heads keep 8 bits, with whole rows where others
    have 4, and layers whose columns `how.group` does not divide have whole rows, too."""
    if is_head(name) and how.bits == 4:
        return 8, 0
    return how.bits, how.group if how.group and layer.in_features % how.group == 0 else 0


def without_groups(network: nn.Module, how: Quantization) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """The layers that are to have groups of columns, and those among them that have whole rows all the same, see `layout_of`."""
    layers = layers_of(network).items()
    grouped = [(name, layer) for name, layer in layers if how.group and not (is_head(name) and how.bits == 4)]
    return [layer for _, layer in grouped], [layer for name, layer in grouped if not layout_of(name, layer, how)[1]]


def columns_of(layers: Sequence[nn.Linear]) -> str:
    """How many columns layers have, for messages: "96, 128"."""
    return cut(", ".join(map(str, sorted({layer.in_features for layer in layers}))))


def check_quantizable(network: nn.Module, how: Quantization) -> None:
    """Raises:
    InvalidValue: it is quantized already, or has no layers to quantize, or none that the group fits.
    """
    if is_quantized(network):
        raise InvalidValue(QUANTIZED_ALREADY, "quantize")
    if not layers_of(network):
        raise InvalidValue(f"a {type(network).__name__} has no layers to quantize: leave quantize out", "quantize")
    grouped, whole = without_groups(network, how)
    if grouped and len(whole) == len(grouped):
        raise InvalidValue(
            f"group is {how.group}, and layers have {columns_of(grouped)} columns: expected an even number that divides them, or 0 "
            "for whole rows",
            "group",
        )
    if how.bits == 4 and (odd := [layer for layer in layers_of(network).values() if layer.in_features % 2]):
        raise InvalidValue(
            f"bits is 4, and a layer has {columns_of(odd)} columns, which are not even: choose 8", "bits"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises:
    ValueError: a tensor of a network holds NaN or infinite numbers.
    """
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite: the file is damaged, fetch or train it again")


def quantize(
    network: nn.Module,
    how: Quantization,
    calibrated: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    dtypes: Sequence[torch.dtype] = (),
) -> None:
    """Replace a network's linear layers by those with rounded weights, in place, see `layout_of`; layers that the group does not fit are logged.
    Each layer is released once it is replaced.

    Args:
        calibrated: integers and scales of layers, by their names; the others are rounded to nearest.
        dtypes: precisions that the weights are brought into before, in turn.

    Raises:
        InvalidValue: see `check_quantizable`.
        ValueError: see `check_finite`.
    """
    check_quantizable(network, how)
    grouped, whole = without_groups(network, how)
    if whole:
        logger.warning(
            "%d of %d layers have one scale a row: group %d does not divide their %s columns",
            *(len(whole), len(grouped), how.group, columns_of(whole)),
        )
    del grouped, whole  # which would keep the layers
    for name in list(layers_of(network)):
        layer = network.get_submodule(name)
        bits, group = layout_of(name, layer, how)
        if calibrated is not None and name in calibrated:
            integers, scales = calibrated[name]
        else:
            weight = layer.weight.detach()
            for dtype in dtypes:
                weight = weight.to(dtype)
            integers, scales = rounded(weight, bits, group)
            check_finite(f"{name}.weight", scales)  # which are not where one of its numbers is not
        _replace(network, name, QuantizedLinear(integers, scales, layer.bias, bits))
        if layer.weight.numel() >= LARGE:
            give_back()
    network.quantization = how.to_dict()  # for its file
    if getattr(
        getattr(network, "config", None), "tie_word_embeddings", False
    ):  # of transformers; the embeddings stay as they are
        network.config.tie_word_embeddings = False


def is_quantized(network: nn.Module) -> bool:
    return any(isinstance(part, QuantizedLinear) for part in network.modules())


def quantized_bytes(network: nn.Module) -> int:
    """Bytes of the weights that are quantized."""
    layers = [part for part in network.modules() if isinstance(part, QuantizedLinear)]
    return sum(layer.qweight.nbytes + layer.scales.nbytes for layer in layers)


def stores_quantized(file: Path) -> bool:
    """Whether a ``.safetensors`` file holds a quantized network.

    Raises:
        SafetensorError: it is damaged.
    """
    with safe_open(file, "pt") as stored:  # some programs that write such files again drop their metadata
        names = stored.keys()
        return any(name.endswith(".qweight") for name in names) or KEY in (stored.metadata() or {})


def read_metadata(text: str) -> tuple[Quantization, dict[str, Any]]:
    """How a network was quantized, out of the metadata of its file, and all that these say.

    Raises:
        ValueError: they say nothing of the kind, or what argen does not read.
    """
    try:
        content = json.loads(text)
        bits, group, method = (content[name] for name in ("bits", "group", "method"))
        for name, value, kind in (("bits", bits, int), ("group", group, int), ("method", method, str)):
            if type(value) is not kind:
                raise ValueError(
                    f"{name} is {cut(repr(value))}: expected {'a name' if kind is str else 'a whole number'}"
                )
        if content.get("symmetric", True) is not True:
            raise ValueError(f"symmetric is {cut(repr(content['symmetric']))}: expected true")
        return Quantization(bits, group, method), content
    except (ValueError, RecursionError) as error:
        reason = str(error) if "expected" in str(error) else f"{cut(text)!r} is no JSON"
    except LookupError as error:
        reason = f"{error.args[0]!r} is missing"
    except (TypeError, AttributeError):
        reason = f"it is {cut(text)}: expected an object with bits, group and method"
    raise ValueError(
        f"the quantization in the metadata of its file cannot be used ({reason}), quantize the model again"
    )


def prepare(network: nn.Module, state: dict[str, Tensor], how: Quantization | None) -> None:
    """Give a network the quantized layers of a saved state, whose tensors it can then load.

    Args:
        how: they were rounded; None where the file does not say it.

    Raises:
        ValueError: a tensor of the state does not fit its layer, or is not as `how` says; says which.
    """
    for name, layer in layers_of(network).items():
        if f"{name}.qweight" not in state:
            if how is not None:
                raise ValueError(f"{name}.qweight is missing: quantize the model again")
        else:
            bits = check_stored(name, layer, state[f"{name}.qweight"], state.get(f"{name}.scales"))
            if how is not None:
                check_layout(name, layer, bits, state[f"{name}.scales"].shape[1], how)
            integers = torch.empty(layer.out_features, layer.in_features, dtype=torch.int8, device="meta")
            scales = torch.empty_like(state[f"{name}.scales"])
            _replace(network, name, QuantizedLinear(integers, scales, layer.bias, bits))


def check_stored(name: str, layer: nn.Linear, stored: Tensor, scales: Tensor | None) -> int:
    """The bits of a layer's stored weights.

    Raises:
        ValueError: they or their scales are not those of such a layer.
    """
    bits = {torch.int8: 8, torch.uint8: 4}.get(stored.dtype, 0)
    shape = (layer.out_features, layer.in_features // (2 if bits == 4 else 1))
    if not bits or stored.shape != shape:
        raise ValueError(
            f"{name}.qweight is {stored.dtype} {list(stored.shape)}: expected int8 or packed uint8 of a layer "
            f"[{layer.out_features}, {layer.in_features}], quantize the model again"
        )
    fits = scales is not None and scales.ndim == 2 and scales.shape[0] == layer.out_features and scales.shape[1] > 0
    if scales is None or not fits or layer.in_features % scales.shape[1] or scales.dtype != torch.float32:
        found = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise ValueError(
            f"{name}.scales do not fit its weights, they are {found}: expected torch.float32 [{layer.out_features}, G], where G "
            f"divides {layer.in_features}, quantize the model again"
        )
    if not scales.isfinite().all():
        raise ValueError(f"{name}.scales are not finite: quantize the model again")
    return bits


def check_layout(name: str, layer: nn.Linear, bits: int, groups: int, how: Quantization) -> None:
    """Raises:
    ValueError: the weights of a layer have other bits, or more or fewer scales a row, than `layout_of` says.
    """
    expected_bits, group = layout_of(name, layer, how)
    expected_groups = layer.in_features // group if group else 1
    if (bits, groups) != (expected_bits, expected_groups):
        raise ValueError(
            f"{name} has {bits} bits and {number_of(groups, 'scale')} a row, and by the metadata of its file (bits {how.bits}, group "
            f"{how.group}) {expected_bits} and {expected_groups}: quantize the model again"
        )


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, layer)
