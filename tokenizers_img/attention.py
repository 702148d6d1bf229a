"""Attention backends: what computes soft-max(QK^T)V, chosen for each network.

diffusers' dispatcher has the backends. Its own choice (`ModelMixin.set_attention_backend`, `attention_backend`, DIFFUSERS_ATTN_BACKEND) is
one for the whole process, and so is PyTorch's choice of a kernel (`torch.nn.attention.sdpa_kernel`); here each layer keeps its own and
calls its kernel directly, so that models on different backends may run side by side, in several threads.

Letters in shape comments: R rows, n queries, m keys, H heads, D/H numbers of a head.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn

from samplers.errors import InvalidValue

ALIGNED = 16  # keys: kernels read a mask whose rows begin at multiples of so many


@dataclass(frozen=True)
class Backend:
    """What a backend needs.

    Attributes:
        name: of diffusers.
        devices: types that it has kernels for; empty for any.
        masks: whether it takes a mask.
        half: whether it computes in bfloat16 and float16 only.
        install: how its package is installed; empty for PyTorch's own.
    """

    name: AttentionBackendName
    devices: tuple[str, ...] = ()
    masks: bool = True
    half: bool = False
    install: str = ""


BACKENDS = {
    "native": Backend(AttentionBackendName.NATIVE),  # PyTorch chooses a kernel at each call
    "sdpa-math": Backend(AttentionBackendName._NATIVE_MATH),
    "sdpa-flash": Backend(AttentionBackendName._NATIVE_FLASH, ("cpu", "cuda"), masks=False),
    "sdpa-efficient": Backend(AttentionBackendName._NATIVE_EFFICIENT, ("cuda",)),
    "sdpa-cudnn": Backend(AttentionBackendName._NATIVE_CUDNN, ("cuda",), half=True),
    "xformers": Backend(AttentionBackendName.XFORMERS, ("cuda",), install="pip install 'argen[xformers]'"),
    "flash": Backend(AttentionBackendName.FLASH, ("cuda",), masks=False, half=True, install="pip install flash-attn"),
}


class DispatchedAttention(nn.Module):
    """Base of the attention layers of argen's networks.

    Attributes:
        attention: a name in `BACKENDS`.
        masked: whether it attends under a mask when images are made.
    """

    attention = "native"
    masked = True

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """Queries [R, n, H, D/H], keys and values [R, m, H, D/H], mask [R or 1, 1, n or 1, m] -> [R, n, H D/H]; a mask is bool,
        true for what is seen, or is added to the logits.

        Raises:
            ValueError: the backend cannot run on this device, or not in this precision.
        """
        backend = BACKENDS[self.attention]
        _check_device(self.attention, query.device.type)
        if query.dtype not in (torch.bfloat16, torch.float16) and (
            backend.half or (self.attention == "sdpa-flash" and query.device.type == "cuda")
        ):
            raise ValueError(
                f"attention {self.attention} computes in bfloat16 or float16, and the model is in {query.dtype}: "
                "move it, as pipe.to(torch.bfloat16), or choose native"
            )
        if self.attention in ("xformers", *KERNELS) and mask is not None:
            mask = _additive(mask, query, key.shape[1])
        if self.attention in KERNELS:
            queries, keys, values = (part.transpose(1, 2) for part in (query, key, value))
            return KERNELS[self.attention](queries, keys, values, mask, dropout_p, scale).transpose(1, 2).flatten(2)
        return dispatch_attention_fn(query, key, value, mask, dropout_p, scale=scale, backend=backend.name).flatten(2)


def _math(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    """Queries [R, H, n, D/H], keys and values [R, H, m, D/H], mask [R, H, n, m] -> [R, H, n, D/H], as all of `KERNELS`."""
    attend = torch.ops.aten._scaled_dot_product_attention_math
    return attend(query, key, value, mask, dropout_p, False, None, scale=scale)[0]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    if query.device.type == "cpu":
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attend(query, key, value, dropout_p, False, scale=scale)[0]
    size = query.shape[-1]
    query, key, value = (F.pad(part, (0, -size % 8)) for part in (query, key, value))
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(query, key, value, dropout_p, False, False, scale=scale or size**-0.5)[0][..., :size]


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    attend, trains = torch.ops.aten._scaled_dot_product_efficient_attention, torch.is_grad_enabled()
    return attend(query, key, value, mask, trains, dropout_p, False, scale=scale)[0]


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    attend, trains = torch.ops.aten._scaled_dot_product_cudnn_attention, torch.is_grad_enabled()
    query, key, value = (part.contiguous() for part in (query, key, value))
    return attend(query, key, value, mask, trains, dropout_p, False, False, scale=scale)[0]


KERNELS = {"sdpa-math": _math, "sdpa-flash": _flash, "sdpa-efficient": _efficient, "sdpa-cudnn": _cudnn}


def _additive(mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """A mask of `DispatchedAttention.attend` as kernels take it, [R, H, n, m]: what is added to the logits, its rows aligned."""
    rows, queries, heads, _ = query.shape
    added = query.new_zeros(rows, heads, queries, keys)
    added = added.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else added + mask.to(query.dtype)
    return F.pad(added, (0, -keys % ALIGNED))[..., :keys]


def check_attention(name: str, device: torch.device | str | None = None) -> None:
    """Whether a backend can be used, before any weights are read.

    Args:
        device: where the network will run; None where that is not known: then any device of this machine will do.

    Raises:
        ValueError: it is unknown, has no kernels for the device, or is not installed.
    """
    if name not in BACKENDS:
        raise InvalidValue(f"unknown attention {str(name)[:60]!r}: expected one of {', '.join(BACKENDS)}", "attention")
    if device is not None or not torch.cuda.is_available():
        _check_device(name, "cpu" if device is None else torch.device(device).type)
    try:
        attention_dispatch._check_attention_backend_requirements(BACKENDS[name].name)
    except RuntimeError as error:
        reason = f"attention {name} is not installed, or too old"
        raise InvalidValue(f"{reason}: {BACKENDS[name].install}, or choose native", "attention") from error


def _usable(name: str) -> bool:
    """Whether a backend can be used on this machine."""
    try:
        check_attention(name)
    except ValueError:
        return False
    return True


def _check_device(name: str, kind: str) -> None:
    backend = BACKENDS[name]
    if backend.devices and kind not in backend.devices:
        there = f" (where it is installed: {backend.install})" if backend.install else ""
        devices = " and ".join(backend.devices)
        raise InvalidValue(
            f"attention {name} runs on {devices} only, and the device is {kind}: choose native, or a device of {devices}{there}",
            "attention",
        )


def set_attention(networks: Iterable[nn.Module], name: str) -> None:
    """Choose the backend of all attention layers of some networks: those of argen and of diffusers; transformers' networks, as text
    encoders, keep their own. The classic layers of diffusers (of a VAE or a U-Net) know "native" and "xformers" only, and stay native
    with the others; the newer ones stay native with those of `KERNELS`, which diffusers would choose for the whole process.

    Raises:
        ValueError: see `check_attention`; a network attends under a mask, which the backend does not take, or none of them has a layer
            whose backend can be chosen. Then nothing is changed.
    """
    check_attention(name)
    backend, layers = BACKENDS[name], [layer for network in networks for layer in network.modules()]
    dispatched = [layer for layer in layers if isinstance(layer, DispatchedAttention)]
    masked = next((layer for layer in dispatched if layer.masked), None)
    if masked is not None and not backend.masks:
        fitting = [other for other, needs in BACKENDS.items() if needs.masks and _usable(other)]
        raise InvalidValue(
            f"attention {name} takes no mask, and this model attends under one ({type(masked).__module__}): choose one of "
            f"{', '.join(fitting)}",
            "attention",
        )
    processed = [layer for layer in layers if isinstance(layer, Attention | AttentionModuleMixin)]
    modern = (
        []
        if name in KERNELS
        else [layer.processor for layer in processed if hasattr(layer.processor, "_attention_backend")]
    )
    classic = [layer for layer in processed if isinstance(layer.processor, AttnProcessor2_0 | XFormersAttnProcessor)]
    if not (dispatched or modern or (classic and name in ("native", "xformers"))) and name != "native":
        raise InvalidValue(
            f"this model has no attention that {name} could compute (its networks are those of transformers, or of diffusers, "
            "which know native and xformers only): leave attention out",
            "attention",
        )
    for layer in dispatched:
        layer.attention = name
    for processor in modern:
        processor._attention_backend = backend.name
    for block in classic:
        block.set_processor(XFormersAttnProcessor() if name == "xformers" else AttnProcessor2_0())
