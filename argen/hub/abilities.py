"""What a model can be loaded with, by its card or its folder, before any of its weights are read."""

import importlib
import importlib.util
import json
import typing
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from argen.hub.cards import CARD_FILE, Card, all_cards, find_card, is_own, released_card
from argen.hub.options import Dtype, LoadOptions
from argen.hub.quantized import PART, check_decodes, check_quantizes, quantized_file
from argen.models.quantized import QUANTIZED_ALREADY
from argen.registry import pipelines, resolve
from argen.words import cut
from samplers.errors import InvalidValue

T5 = ["transformers", "T5EncoderModel"]  # in an index
UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError)
OF_T5 = "dtype is fp16, in which T5 overflows: expected fp32 or bf16"


@dataclass(frozen=True)
class Abilities:
    """What is known of a model; None where only loading it tells.

    Attributes:
        network: class of the network that writes its tokens, or of the network that it is.
        pipeline: whether it is a pipeline.
        has_t5: whether it reads text through a T5.
        quantized: whether it is quantized already.
        kind: see `argen.hub.cards.Card`.
    """

    network: type | None = None
    pipeline: bool | None = None
    has_t5: bool | None = None
    quantized: bool = False
    kind: str | None = None


def abilities_of(model: str | Path) -> Abilities:
    """What a card, or the folder of a saved pipeline, says."""
    card, path = all_cards().get(str(model)), Path(model)
    if card is None and (path / "model_index.json").is_file():
        return _of_folder(path)
    if card is None and (path / CARD_FILE).is_file():
        card = find_card(str(path))
    if card is None and path.is_file():
        card = released_card(path)
    return Abilities() if card is None else _of_card(card)


def _of_card(card: Card) -> Abilities:
    loaded: Any = None
    with suppress(ImportError, AttributeError, ValueError, TypeError, NameError):  # which loading explains
        loaded = resolve(str(card.arguments["network"])) if "network" in card.arguments else _returned(card.target)
    has_t5 = card.text_parameters > 0 if is_own(card.id) else None
    pipeline = card.kind in ("generator", "diffusion")
    network = (_transformer(loaded) if pipeline else loaded) if isinstance(loaded, type) else None
    return Abilities(network, pipeline, has_t5, kind=card.kind)


def _of_folder(folder: Path) -> Abilities:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name, text_encoder = index["_class_name"], index.get("text_encoder")
        network = _transformer(pipelines[name]) if name in pipelines else None
        already = quantized_file(folder) is not None
    except UNREADABLE:  # which loading explains
        return Abilities(pipeline=True)
    return Abilities(network, True, text_encoder == T5, already)


def _returned(target: str) -> Any:
    """What a reader says that it returns."""
    return typing.get_type_hints(resolve(target)).get("return")


def _transformer(pipeline: Any) -> type | None:
    """The class of a pipeline's network, by the types of its arguments."""
    with suppress(NameError, TypeError, AttributeError):
        network = typing.get_type_hints(pipeline.__init__).get(PART)
        return network if isinstance(network, type) else None
    return None


def may_be_quantized(model: str | Path) -> bool:
    """Whether a model can be quantized, as far as that is known."""
    known = abilities_of(model)
    try:
        if known.network is not None:
            check_quantizes(known.network)
    except InvalidValue:
        return False
    return not known.quantized and known.kind in (None, "generator")


def dtype_name(dtype: Dtype | torch.dtype) -> Dtype:
    """The name of a precision, which may be torch's own.

    Raises:
        ValueError: torch's, and none of those that `load` has.
    """
    if not isinstance(dtype, torch.dtype):
        return dtype
    names: dict[torch.dtype, Dtype] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    if dtype not in names:
        expected = "auto, fp32, bf16, fp16, torch.float32, torch.bfloat16 or torch.float16"
        raise InvalidValue(f"dtype is {dtype}: expected {expected}", "dtype")
    return names[dtype]


def has_openvino() -> bool:
    """Whether OpenVINO is installed, be it broken or not."""
    return importlib.util.find_spec("openvino") is not None


def openvino_error() -> str | None:
    """Why OpenVINO, which is installed, cannot be imported; None where it can."""
    try:
        importlib.import_module("openvino.frontend.pytorch.ts_decoder")
    except Exception as error:  # whatever a broken installation raises
        return cut(" ".join(str(error).split()) or type(error).__name__)
    return None


def check_compile(device: torch.device | str | None, dtype: Dtype) -> None:
    """Check that something can compile here, before any weights are read: OpenVINO on a CPU, ``torch.compile`` on a CUDA GPU.

    Raises:
        ValueError: it is not installed; another device; on a CPU, half precision.
    """
    kind = torch.device(device or "cpu").type
    if kind == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise InvalidValue("compile needs Triton on a GPU: pip install triton, or leave it out", "compile")
        return
    if kind != "cpu":
        raise InvalidValue(f"compile is for a CPU or a CUDA GPU, and the device is {device}: leave it out", "compile")
    if dtype in ("bf16", "fp16"):
        raise InvalidValue(f"compile takes the dtype fp32, and it is {dtype}: leave one of them out", "compile")
    if not has_openvino():
        raise InvalidValue("compile needs OpenVINO: pip install 'argen[openvino]', or leave it out", "compile")
    if (reason := openvino_error()) is not None:
        raise InvalidValue(
            f"compile needs OpenVINO, which cannot be imported ({reason}): pip install 'argen[openvino]' again, or leave it out",
            "compile",
        )


def check_dtype(model: str | Path, options: LoadOptions) -> None:
    """Raises:
    InvalidValue: the model overflows in the precision, by its card or since it reads text through a T5.
    """
    card, path = all_cards().get(str(model)), Path(model)
    if card is None and (path / CARD_FILE).is_file():
        card = find_card(str(path))
    if card is not None and options.dtype not in ("auto", *card.dtypes):
        expected = " or ".join(card.dtypes)
        raise InvalidValue(f"dtype is {options.dtype}, in which {card.id} overflows: expected {expected}", "dtype")
    if options.dtype == "fp16" and abilities_of(model).has_t5:
        raise InvalidValue(OF_T5, "dtype")


def check_options(model: str | Path, options: LoadOptions, device: torch.device) -> None:
    """Check that a model can be loaded with options, as far as that is known before.

    Raises:
        InvalidValue: it cannot; says which option.
    """
    known = abilities_of(model)
    if known.network is not None and options.quantize is not None:
        check_quantizes(known.network)
    if known.quantized and options.quantize is not None:
        raise InvalidValue(QUANTIZED_ALREADY, "quantize")
    if known.network is not None and options.compile:
        check_decodes(known.network, "compile")
    for option in ("quantize", "compile") if known.kind not in (None, "generator") else ():
        if getattr(options, option):
            what = "a diffusion pipeline" if known.kind == "diffusion" else f"a model of kind {known.kind}"
            raise InvalidValue(f"{option} is for generators of tokens, not for {what}: leave it out", option)
    offloads = known.has_t5 if device.type == "cpu" else known.pipeline
    if options.offload is not None and (offloads is False or known.pipeline is False):
        raise cannot_offload(device)
    of_transformers = known.network is not None and known.network.__module__.startswith("transformers.")
    if known.network is not None and of_transformers and options.attention not in (None, "native"):
        raise no_attention(known.network, str(options.attention))


def cannot_offload(device: torch.device) -> InvalidValue:
    """What is raised for a model that has nothing to offload."""
    what = "a generator that reads text through T5" if device.type == "cpu" else "a pipeline"
    return InvalidValue(f"offload on {device} is for {what}: leave it out", "offload")


def no_attention(network: type, name: str) -> InvalidValue:
    """What is raised for a network whose attention cannot be chosen."""
    return InvalidValue(
        f"attention {name} cannot be chosen for a {network.__name__}, whose attention is that of transformers: leave it out",
        "attention",
    )
