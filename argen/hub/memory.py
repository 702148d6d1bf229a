"""Memory: how much is free, what a model takes, how many images fit at once, and what is said when there is too little."""

import errno
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from argen.device import free
from argen.hub.abilities import may_be_quantized
from argen.hub.cards import Card, all_cards
from argen.hub.options import LoadOptions
from samplers.errors import InvalidValue

PRECISIONS = ("fp32", "bf16", "int8", "int4")
BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "int8": 1.0,
    "int4": 0.625,
}  # of a parameter, with its share of the scales
DECODING = (
    "controlar",
    "dalle_mini",
    "flexar",
    "llamagen",
    "parti",
    "seed_llama",
)  # pipelines whose networks can be quantized
SHARE = 0.8  # of the free memory that is planned with
PROCESS = 0.34e9  # bytes of a process before any weights, and
WORKING = 0.5e9  # the most that an image took beside weights and their copies, both by docs/measurements.md
CACHE = 0.15  # keys and values of an image with guidance, of the numbers of its network: cells / (3 x width), of published ones 0.06 to 0.3
REFUSED = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|bad.alloc|out of memory|unable to allocate", re.I
)
ASKED = re.compile(r"allocat\w*:? (?:you tried to allocate )?([\d.]+) ?([KMGT]?i?B|bytes)", re.I)
UNITS = {"BYTES": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Size:
    """What a model holds.

    Attributes:
        parameters: of the networks whose precision is chosen.
        tokenizer_parameters: of the image tokenizer, which stays in float32.
        kept_parameters: those of `parameters` that quantizing leaves in float32.
        text_parameters: of a text encoder that is in bfloat16 or float32.
        fixed: bytes of what is quantized already.
        decodes: whether it can be quantized.
        stored: "int8" or "int4" of what is quantized already.
    """

    parameters: float
    tokenizer_parameters: float = 0.0
    text_parameters: float = 0.0
    fixed: int = 0
    decodes: bool = False
    kept_parameters: float = 0.0
    stored: str = ""

    def bytes(self, precision: str) -> int | None:
        """Bytes of the weights in a precision of `PRECISIONS`; None for one that it cannot have."""
        if precision.startswith("int") and not self.decodes:
            return None
        text = self.text_parameters * (4 if precision == "fp32" else 2)
        kept = self.kept_parameters if precision.startswith("int") else 0.0
        chosen = (self.parameters - kept) * BYTES[precision]
        return round(chosen + 4 * (kept + self.tokenizer_parameters) + text) + self.fixed

    def table(self) -> dict[str, int | None]:
        """`bytes` in each of `PRECISIONS`, of what is quantized already in its own alone."""
        if not self.stored:
            return {name: self.bytes(name) for name in PRECISIONS}
        own = round(self.fixed + 4 * (self.parameters + self.tokenizer_parameters) + 2 * self.text_parameters)
        return {name: own if name == self.stored else None for name in PRECISIONS}

    def running(self, precision: str, generates: bool = True) -> int:
        """Bytes that drawing one image needs beside the weights. Copies of weights that make it faster are not among them: they are made where
        memory is free."""
        numbers = self.parameters + self.fixed * (2 if self.stored == "int4" else 1)
        return round(PROCESS + WORKING + (CACHE * numbers * (2 if precision == "bf16" else 4) if generates else 0))


def size_of_card(card: Card) -> Size:
    """The size that a card says."""
    decodes = card.target.removeprefix("argen.pipelines.").partition(":")[0] in DECODING
    tokenizer = card.tokenizer_parameters * 1e6
    decodes = decodes and card.kind == "generator"
    text, kept = card.text_parameters * 1e6, card.kept_parameters * 1e6
    return Size(card.parameters * 1e6 - tokenizer, tokenizer, text, decodes=decodes, kept_parameters=kept)


def size_of(model: str | Path) -> Size | None:
    """The size of a model, by its card or by the headers of its files; None where they do not say it."""
    if (card := all_cards().get(str(model))) is not None:
        return size_of_card(card) if card.parameters else None
    try:
        return size_of_files(model)
    except (OSError, ValueError, RuntimeError):  # which loading explains
        return None


def size_of_files(model: str | Path) -> Size:
    """The size of a model by the headers of its files.

    Raises:
        ValueError: a file is damaged, or there is none with weights.
    """
    from tokenizers_img.checkpoint import read_file, weight_files

    path = Path(model)
    whole = (path / "model_index.json").is_file()
    files = sorted(path.rglob("*.safetensors")) if whole else weight_files(path)
    counts, stored = {"text": 0, "other": 0, "fixed": 0}, ""
    for file in files:
        is_text = whole and file.parent.name == "text_encoder"
        try:
            tensors = list(_tensors(read_file(file)))
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"a file of {model} is damaged: {error}") from error
        for tensor in tensors:
            kind = "fixed" if not tensor.is_floating_point() else "text" if is_text else "other"
            counts[kind] += tensor.nbytes if kind == "fixed" else tensor.numel()
            if tensor.dtype in (torch.int8, torch.uint8):  # packed, heads keep 8 bits
                stored = "int4" if tensor.dtype == torch.uint8 or stored == "int4" else "int8"
    if not any(counts.values()):
        raise ValueError(f"{model} holds no weights: expected an id, the folder of a saved pipeline or a checkpoint")
    return Size(
        counts["other"], 0.0, counts["text"], counts["fixed"], not stored and may_be_quantized(model), stored=stored
    )


def _tensors(content: Any) -> Iterator[Tensor]:
    """The tensors of the wrapper in a file that has most of them: training keeps averages and optimisers beside the weights."""
    if isinstance(content, dict):
        yield from (value for value in content.values() if isinstance(value, Tensor))
        inner = [list(_tensors(value)) for value in content.values() if isinstance(value, dict)]
        yield from min((part for part in inner if part), key=len, default=[])


def check_memory(model: str | Path, options: LoadOptions, device: torch.device) -> None:
    """Check that the weights of a model can be held, by what its card or its files' headers say, before it is loaded. Where that is not sure, nothing is refused.

    Raises:
        InvalidValue: its weights alone are larger than the memory that is free, swap included; says what would fit.
    """
    if (size := size_of(model)) is None:
        return
    whole = size
    if options.offload is not None:
        size = replace(whole, text_parameters=0.0)
    there = free(device) + (psutil.swap_memory().free if device.type == "cpu" else 0)
    auto = "bf16" if device.type != "cpu" else "fp32"
    precision = (
        options.quantize if options.quantize and size.decodes else auto if options.dtype == "auto" else options.dtype
    )
    surely = "bf16" if precision == "fp32" and options.dtype == "auto" else precision  # auto may be either
    if (size.bytes(surely) or 0) <= there:
        return
    fitting = [name for name in PRECISIONS[1:] if (needed := size.bytes(name)) is not None and needed <= there]
    settings = [f"{'quantize' if name.startswith('int') else 'dtype'} {name}" for name in fitting]
    if options.offload is None and (replace(whole, text_parameters=0.0).bytes(surely) or 0) <= there:
        settings.append("offload model")
    advice = f"choose {' or '.join(settings)}" if settings else "choose a smaller model"
    raise InvalidValue(
        f"{model} needs {gigabytes(size.bytes(precision) or 0)} for its weights in {precision}, and {gigabytes(there)} are free on {device.type}: {advice}",
        "model",
    )


def gigabytes(count: float) -> str:
    """ "3.1 GB"."""
    return f"{count / 1e9:.1f} GB"


def out_of_memory(error: BaseException | None) -> str | None:
    """One line for an error that says that memory is used up, be it that of a GPU or of the machine; None for other errors."""
    while error is not None:
        is_kind = isinstance(error, MemoryError | torch.OutOfMemoryError)
        is_kind |= isinstance(error, OSError) and error.errno == errno.ENOMEM
        if is_kind or isinstance(error, RuntimeError) and REFUSED.search(str(error)):
            break
        error = error.__cause__
    if error is None:
        return None
    match = ASKED.search(str(error))
    asked = (
        f"{gigabytes(float(match[1]) * UNITS.get(match[2].upper(), 1))} more were asked for"
        if match
        else "no more can be had"
    )
    return f"out of memory, {asked}: choose dtype bf16, quantize int8 or int4, offload model, or fewer images at once"


def images_at_once(count: int, image_bytes: int, device: torch.device | str) -> int:
    """How many of `count` images are generated together, 1 or more, so that what they need beside the weights fits into free memory, in
    parts of about one size."""
    most = max(1, int(SHARE * free(device)) // max(1, image_bytes))
    parts = math.ceil(count / most)
    return math.ceil(count / parts)
