"""From a model's id, a saved folder or a checkpoint file to a pipeline or a network in memory."""

import importlib
import importlib.util
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from argen.device import DTYPES, LOADING, auto_dtype, pick, silent
from argen.garbage import uncollected
from argen.hub.cards import CARD_FILE, DIFFUSION, Card, all_cards, check_kind, check_known, find_card, kind_of
from argen.hub.options import Attention, Dtype, LoadOptions, Quantize, check_arguments
from argen.hub.quantized import NAMES, decoding_network, quantize_model, quantized, quantizes, read_quantized
from argen.registry import pipelines, resolve
from samplers.errors import InvalidValue
from tokenizers_img.attention import DispatchedAttention, check_attention, set_attention
from tokenizers_img.checkpoint import refuse_placeholder
from tokenizers_img.hub import hub_folder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NOT_READ = OSError, ValueError, RuntimeError, SafetensorError  # by files that do not fit
UNUSABLE = (*NOT_READ, TypeError, AttributeError, LookupError)  # by settings beside them that do not
IN_BFLOAT16 = ("T5EncoderModel", "LlamaForCausalLM")  # where published: as trained; in float16 T5 overflows
CAST = ("", "transformer", "encoder", "text_encoder", "drafter")  # networks of a pipeline whose precision is chosen
CHECKPOINTS = "argen.pipelines.llamagen:read_checkpoint"  # of files that no card names
DIFFUSION_FILES = ("*.json", "*/*.json", "*/*.txt", "*/model.safetensors", "*/diffusion_pytorch_model.safetensors")
# diffusers warns whenever a network is cast, even of one in which nothing must stay float32
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "should be kept in float32: []" not in record.getMessage()
)


def load(
    model: str | Path,
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: Dtype = "auto",
    attention: Attention | None = None,
    quantize: Quantize | None = None,
    compile: bool = False,
    **others: Any,
) -> Any:
    """The pipeline of a generator, the network of a tokenizer, or a text and image encoder.

    Args:
        model: an id that `argen models` lists, a folder written by a pipeline's ``save_pretrained`` or by `argen train`, the released file of a ControlAR or
            xAR beside its tokenizer's, or a checkpoint of a LlamaGen, released or of one's own training. Published weights are taken
            from the hub's cache, or fetched into it.
        tokenizer: of a LlamaGen's checkpoint: the file of its image tokenizer; None where a released one lies beside it.
        image_size: of a LlamaGen's checkpoint: side of its images in pixels; None where the file or its name says it.
        device: where it runs; None for the CPU.
        dtype: precision of a generator's network and text encoder, whatever precision their files have: "fp32", "bf16", "fp16", or "auto",
            see `argen.device.auto_dtype`. Logits and noise are always in float32, and so are image tokenizers unless one is loaded by itself.
        attention: backend of the attention layers, a name in `tokenizers_img.attention.BACKENDS`, e.g. "xformers"; None for
            "native", PyTorch's own.
        quantize: "int8" or "int4": round the weights of a generator's network to nearest, which then take a quarter or an eighth of the memory. On a CPU
            with OpenVINO they are compiled, too; elsewhere they are unpacked in each pass, which is slow.
        compile: whether a generator's decoding pass becomes a graph: of OpenVINO on a CPU, in float32, which takes some seconds at the first
            image; CUDA graphs of ``torch.compile`` on a GPU, one for each number of tokens in a pass. Its tokens are those of the pass that is
            not compiled, but for rounding.
        others: not allowed; arguments of diffusers' ``from_pretrained`` raise an error that names the alternative.

    Raises:
        ValueError: no such model; weights that cannot be read or do not fit; a precision, a backend or a compiler that cannot be used here or by this
            model.
        FileNotFoundError, ConnectionError: published weights that are not here and cannot be fetched.
    """
    check_arguments(others)
    options = LoadOptions(dtype=dtype, attention=attention, quantize=quantize, compile=compile)
    device = None if device is None else pick(device)
    check_known(model)
    if attention is not None:
        check_attention(attention)
    if compile:
        check_compile(device, dtype)
    card = all_cards().get(str(model))
    if card is not None and dtype not in ("auto", *card.dtypes):
        raise InvalidValue(
            f"dtype is {dtype}, in which {card.id} overflows: expected {' or '.join(card.dtypes)}", "dtype"
        )
    return _prepared(_load(model, tokenizer, image_size), device, options)


def _prepared(model: Any, device: torch.device | str | None, options: LoadOptions) -> Any:
    """The model on its device, in its precision, with its attention backend."""
    where = torch.device("cpu" if device is None else device)
    cast(model, options.dtype, where)
    if options.attention is not None:
        choose_attention(model, options.attention)
    _quicken(model, where, options.quantize, options.compile)
    return model if device is None else model.to(where)


def _quicken(model: Any, device: torch.device, quantize: Quantize | None, compile: bool) -> None:
    """Quantize and compile the network that decodes; one whose weights are quantized is compiled wherever it can be."""
    if quantize is not None:
        quantize_model(model, NAMES[quantize])
    compiles = device.type == "cpu" and hasattr(getattr(model, "transformer", None), "compiled")
    if compile or (compiles and quantized(model) and importlib.util.find_spec("openvino")):
        compile_decoding(model, device)


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
    if importlib.util.find_spec("openvino") is None:
        raise InvalidValue("compile needs OpenVINO: pip install 'argen[openvino]', or leave it out", "compile")


def compile_decoding(model: Any, device: torch.device | str = "cpu") -> None:
    """Let the network of a generator decode through graphs: of `argen.models.compiled` on a CPU, of `argen.models.graphed` on a GPU.

    Raises:
        ValueError: this model does not decode token by token with a cache of argen's.
    """
    network = decoding_network(model, "compile")
    decode = getattr(network, "step", network.decode)
    if torch.device(device).type == "cpu":
        from argen.models.compiled import CompiledStep

        network.float()
        network.compiled = CompiledStep(network, decode)
    else:
        from argen.models.graphed import GraphedStep

        network.compiled = GraphedStep(network, decode)


def cast(model: Any, dtype: Dtype, device: torch.device) -> None:
    """Bring the networks that `load` names into a precision; "auto" leaves single networks, the diffusion tools' pipelines, whose weights
    are edited, and those of `IN_BFLOAT16` as they are.

    Raises:
        ValueError: T5 in float16.
    """
    parts = getattr(model, "components", {"": model})
    cast_parts = parts if "unet" in parts else CAST  # diffusers' own pipelines have one precision
    for network in (parts[name] for name in cast_parts if isinstance(parts.get(name), torch.nn.Module)):
        name = type(network).__name__
        if dtype == "fp16" and name == "T5EncoderModel":
            raise InvalidValue("dtype is fp16, in which T5 overflows: expected fp32 or bf16", "dtype")
        if dtype != "auto":
            network.to(DTYPES[dtype])
        elif name not in IN_BFLOAT16 and not {"", "unet"} & parts.keys():
            network.to(auto_dtype(device, sum(part.numel() for part in network.parameters())))


def _load(model: str | Path, tokenizer: str | Path | None, image_size: int | None) -> Any:
    """See `load`."""
    card, path = all_cards().get(str(model)), Path(model)
    if card is not None:
        return _read_card(hub_folder(card.repo, card.files) if card.repo else card.path, card)
    has_card = os.path.lexists(path / CARD_FILE)
    if (path / "model_index.json").is_file():
        kind_of(path)  # refuses a card of another kind
        return _read(path, find_card(str(path)) if has_card else None, lambda: _pipeline(path))
    if has_card:  # as `argen train` writes it
        return _read_card(path, find_card(str(path)))
    if path.is_file() and (card := _released(path)):
        return _read_card(path.parent, card)
    try:
        with _alone():
            return _in_float32(resolve(CHECKPOINTS)(path, tokenizer, image_size))
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read ({error.strerror}): expected a checkpoint") from error


def _released(path: Path) -> Card | None:
    """The card of a released file by its name, of those that need more than their tensors; of the others the tensors say all."""
    by_name = {card.arguments["name"]: card for card in all_cards().values() if card.arguments.keys() > {"name"}}
    return by_name.get(path.stem)


def _read_card(folder: Path, card: Card) -> Any:
    """What the card's target reads out of a folder, see `_read`.

    Raises:
        ValueError: the target cannot be imported, or takes other arguments.
    """
    try:
        reader = resolve(card.target)
        inspect.signature(reader).bind(folder, **card.arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, ImportError) and error.name and not card.target.startswith(error.name):
            raise  # a library that its reader needs
        raise ValueError(
            f"the card {card.id} cannot be loaded by {card.target!r} with its arguments ({error})"
        ) from error
    return _read(folder, card, lambda: reader(folder, **card.arguments))


def _read(folder: Path, card: Card | None, read: Callable[[], Any]) -> Any:
    """Return the result of `read` in float32, with the defaults of the card; one clear line if its files cannot be used."""
    try:
        with _alone():
            loaded = _in_float32(read())
        if card is not None and card.kind == "generator":
            if not hasattr(loaded, "samplers"):
                raise ValueError(f"{card.target} gives a {type(loaded).__name__}, expected a pipeline")
            loaded.card = card
            _ = loaded.defaults  # checked
    except UNUSABLE as error:
        if isinstance(error, FileNotFoundError):
            raise
        for file in folder.rglob("*.safetensors"):
            refuse_placeholder(file)
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the weights in {folder} cannot be used ({reason}): install argen or fetch them again"
        ) from error
    return loaded


def loader(
    device: torch.device | str | None = None, quantize: Quantize | None = None, compile: bool = False, **options
) -> Callable[[str], Any]:
    """`load` with options for generators, image tokenizers and saved folders; other models have none. What decodes token by token is
    quantized and compiled.

    Raises:
        ValueError: nothing can be compiled here.
    """
    where = torch.device("cpu" if device is None else device)
    if compile:
        check_compile(where, options.get("dtype", "auto"))

    def loading(model: str) -> Any:
        card = all_cards().get(model)
        optional = card is None or card.kind in ("generator", "tokenizer")
        loaded = load(model, device=device, **options if optional else {})
        if quantizes(loaded):
            _quicken(loaded, where, quantize, compile and hasattr(loaded.transformer, "compiled"))
        return loaded

    return loading


def choose_attention(model: Any, name: str) -> None:
    """Set the attention backend of all networks of a model, see `tokenizers_img.attention.set_attention`.

    Raises:
        ValueError: it cannot be used here, or not by this model.
    """
    main = getattr(model, "transformer", None)
    if isinstance(main, torch.nn.Module) and not any(isinstance(part, DispatchedAttention) for part in main.modules()):
        if name == "native":
            return
        raise InvalidValue(
            f"attention {name} cannot be chosen for a {type(main).__name__}, whose attention is that of transformers: leave it out",
            "attention",
        )
    set_attention(networks_of(model), name)


def load_diffusion(
    model: str | Path,
    device: torch.device | str | None = None,
    dtype: Dtype = "auto",
    attention: Attention | None = None,
) -> "DiffusionPipeline":
    """A Stable Diffusion (XL) pipeline for the tools of `argen.diffusion`, without a safety checker.

    Args:
        model: an id of kind "diffusion", a folder in diffusers' layout, or "owner/name" of one on the hub.
        device: see `load`.
        dtype: of the whole pipeline; "auto" is "fp32", since its weights are edited.
        attention: "native" or "xformers", see `load`.

    Raises:
        ValueError: no such folder; another kind of pipeline; files that cannot be read.
        ConnectionError: it is not here and cannot be fetched.
    """
    card = all_cards().get(str(model))
    if card is not None:
        check_kind(model, "diffusion")
        return load(model, device=device, dtype=dtype, attention=attention)
    options = LoadOptions(dtype=dtype, attention=attention)
    if attention is not None:
        check_attention(attention)
    folder = Path(model)
    if not (folder / "model_index.json").is_file():
        if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
            raise ValueError(
                f"no pipeline in {str(model)!r}: expected a folder with a model_index.json, or OWNER/NAME on the hub"
            )
        folder = hub_folder(str(model), DIFFUSION_FILES)
    try:
        with _alone():
            pipe = _in_float32(_pipeline(folder, generators=False))
    except UNUSABLE as error:
        raise ValueError(f"the pipeline in {folder} cannot be used ({' '.join(str(error).split())[:300]})") from error
    return _prepared(pipe, device, options)


def _pipeline(folder: Path, generators: bool = True) -> "DiffusionPipeline":
    """A generator or a Stable Diffusion, or only the latter, as ``save_pretrained`` wrote it."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str):
        raise ValueError("its model_index.json names no class of a pipeline")
    if name not in DIFFUSION and not (generators and name in pipelines):
        known = ", ".join((*pipelines, *DIFFUSION) if generators else DIFFUSION)
        raise ValueError(f"its model_index.json names a {name[:60]}, expected one of {known}")
    cls = pipelines[name] if name in pipelines else resolve(f"diffusers:{name}")
    _check_parts({part: index.get(part) for part in cls._get_signature_keys(cls)[0]})
    options = {"safety_checker": None, "requires_safety_checker": False} if name == "StableDiffusionPipeline" else {}
    try:
        network = read_quantized(folder)
        return cls.from_pretrained(folder, **options, **{} if network is None else {"transformer": network})
    except ImportError as error:  # a part of a library that is not here, or does not exist
        raise ValueError(f"it names a part that cannot be imported: {error}") from error


def _check_parts(parts: dict[str, Any]) -> None:
    """Raises:
    ValueError: a part is of a library that is neither diffusers, transformers, argen nor a package that brings pipelines.
    """
    libraries = {"diffusers", "transformers", "argen", "tokenizers_img"}
    libraries |= {point.point.module.partition(".")[0] for point in pipelines.installed.values()}
    libraries |= {cls.__module__.partition(".")[0] for cls in pipelines.added.values()}
    for part, value in parts.items():
        if value is not None and (not isinstance(value, list) or len(value) != 2):
            raise ValueError(f"its part {part[:60]} is {str(value)[:60]!r}: expected a library and a class")
        if value is not None and value[0] is not None:
            library = str(value[0])[:60]
            if library.partition(".")[0] not in libraries:
                raise ValueError(
                    f"its part {part[:60]} is of the library {library}, expected one of {', '.join(sorted(libraries))}"
                )


def networks_of(model: Any) -> list[torch.nn.Module]:
    """Those of a pipeline, or the one network that a model is."""
    parts = getattr(model, "components", {"": model}).values()
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def _in_float32(model: Any) -> Any:
    """The same in float32, except for the networks of `IN_BFLOAT16`, which stay as they are or, out of float16, are made bfloat16."""
    for network in networks_of(model):
        if type(network).__name__ not in IN_BFLOAT16:
            network.float()
        elif network.dtype == torch.float16:
            network.to(torch.bfloat16)
    return model


@contextmanager
def _alone() -> Iterator[None]:
    """No other model is loaded meanwhile, and no progress bars are shown: the weights load faster than one is drawn."""
    with LOADING, uncollected(), silent():
        yield
