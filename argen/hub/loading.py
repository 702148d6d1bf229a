"""From a model's id, a saved folder or a checkpoint file to a pipeline or a network in memory."""

import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from argen.device import DTYPES, LOADING, ON_DEMAND, auto_dtype, free, pick, silent
from argen.files import WEIGHTS
from argen.garbage import uncollected
from argen.hub.abilities import (
    OF_T5,
    cannot_offload,
    check_compile,
    check_dtype,
    check_options,
    dtype_name,
    has_openvino,
    no_attention,
    openvino_error,
)
from argen.hub.cards import (
    CARD_FILE,
    DIFFUSION,
    Card,
    all_cards,
    check_kind,
    check_known,
    find_card,
    kind_of,
    released_card,
)
from argen.hub.memory import SHARE, check_memory, out_of_memory
from argen.hub.options import Attention, Dtype, LoadOptions, Offload, Quantize, check_arguments
from argen.hub.quantized import NAMES, decoding_network, quantized, quantizes, writing_network
from argen.models.lora import add_adapters, read_adapter, read_adapters
from argen.models.quantized import Quantization, check_quantizable, quantized_bytes
from argen.models.quantized import quantize as quantize_network
from argen.registry import pipelines, resolve
from samplers.errors import InvalidValue
from tokenizers_img.attention import DispatchedAttention, check_attention, set_attention
from tokenizers_img.checkpoint import refuse_placeholder
from tokenizers_img.hub import hub_folder
from tokenizers_img.mapped import as_stored, give_back

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
NOT_READ = OSError, ValueError, RuntimeError, SafetensorError  # by files that do not fit
UNUSABLE = (*NOT_READ, TypeError, AttributeError, LookupError, ArithmeticError)  # by settings beside them that do not
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
    dtype: Dtype | torch.dtype = "auto",
    attention: Attention | None = None,
    quantize: Quantize | None = None,
    compile: bool = False,
    offload: Offload | None = None,
    lora: str | None = None,
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
        dtype: precision of a generator's network and text encoder, whatever precision their files have: "fp32", "bf16", "fp16" or the same of
            torch, e.g. ``torch.bfloat16``, or "auto", see `argen.device.auto_dtype`. Logits and noise are always in float32, and so are image tokenizers unless one is loaded by itself.
        attention: backend of the attention layers, a name in `tokenizers_img.attention.BACKENDS`, e.g. "xformers"; None for
            "native", PyTorch's own.
        quantize: "int8" or "int4": round the weights of a generator's network to nearest, which then take a quarter or an eighth of the memory. On a CPU
            with OpenVINO they are compiled, too, unless `dtype` is "bf16" or "fp16"; elsewhere they are unpacked in each pass, which is slow.
        compile: whether a generator's decoding pass becomes a graph: of OpenVINO on a CPU, in float32, which takes some seconds at the first
            image; CUDA graphs of ``torch.compile`` on a GPU, one for each number of tokens in a pass. Its tokens are those of the pass that is
            not compiled, but for rounding.
        offload: "model": networks are out of memory while they do nothing. On a GPU all but the one that works wait on the CPU; on a CPU a T5
            stays on disk until a prompt must be encoded whose features are not kept there (`argen.models.prompt_cache`).
        lora: folders of LoRA that are added to the network that writes the tokens, "PATH" or "PATH:WEIGHT", several with commas between.
        others: not allowed; arguments of diffusers' ``from_pretrained`` raise an error that names the alternative.

    Raises:
        ValueError: no such model; weights that cannot be read or do not fit; a precision, a backend or a compiler that cannot be used here or by this
            model.
        FileNotFoundError, ConnectionError: published weights that are not here and cannot be fetched.
    """
    check_arguments(others)
    name = dtype_name(dtype)
    options = LoadOptions(
        dtype=name, attention=attention, quantize=quantize, compile=compile, offload=offload, lora=lora
    )
    return _open(model, None if device is None else pick(device), options, tokenizer, image_size)


def load_to_quantize(model: str | Path, how: Quantization, device: torch.device) -> Any:
    """`load` in float32, for `argen.hub.calibration`.

    Raises:
        ValueError: see `load`; it cannot be quantized so, which is checked before its weights are read.
    """
    return _open(model, device, LoadOptions(dtype="fp32"), how=how)


def _open(
    model: str | Path,
    device: torch.device | None,
    options: LoadOptions,
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
    lenient: bool = False,
    how: Quantization | None = None,
) -> Any:
    """See `load`.

    Args:
        lenient: what decoding networks and text encoders alone have is left out for models without.
        how: it is to be quantized later, which is checked before its weights are read.
    """
    check_known(model)
    where = torch.device("cpu") if device is None else device
    if options.attention is not None:
        check_attention(options.attention)
    if options.compile:
        check_compile(device, options.dtype)
    check_dtype(model, options)
    if not lenient:
        check_options(model, options if how is None else replace(options, quantize="int8"), where)
    check_memory(model, options, where)
    adapters = read_adapters(options.lora)
    token = ON_DEMAND.set(options.offload is not None and where.type == "cpu")
    try:
        loaded = _load(model, tokenizer, image_size)
    finally:
        ON_DEMAND.reset(token)
    if how is not None:
        check_quantizable(writing_network(loaded), how)
    if adapters:
        add_adapters(adapted_network(loaded), adapters)
    if lenient:
        decodes = hasattr(getattr(loaded, "transformer", None), "compiled") and not quantized(loaded)
        options = replace(
            options, quantize=options.quantize if quantizes(loaded) else None, compile=options.compile and decodes
        )
        options = options if can_offload(loaded, where) else replace(options, offload=None)
    return _prepared(loaded, device, options)


def adapted_network(model: Any) -> torch.nn.Module:
    """The network of a generator that LoRA is added to.

    Raises:
        InvalidValue: the model has none, or is quantized.
    """
    network = getattr(model, "transformer", None)
    if not isinstance(network, torch.nn.Module):
        raise InvalidValue(f"lora is for generators, not for a {type(model).__name__}: leave it out", "lora")
    if quantized(model):
        raise InvalidValue("the model is quantized: add lora to the one that it was made of", "lora")
    return network


def read_adapted(folder: Path, base: str) -> Any:
    """A LoRA that was trained, on the model that it was trained on."""
    loaded = _load(base, None, None)
    add_adapters(adapted_network(loaded), [(read_adapter(folder), 1.0)])
    return loaded


def _prepared(model: Any, device: torch.device | str | None, options: LoadOptions) -> Any:
    """The model on its device, in its precision, with its attention backend, quantized, compiled and offloaded. It is read only now, layer by
    layer, so that what is cast, rounded or moved is never held twice."""
    where = torch.device("cpu" if device is None else device)
    rounded = None if options.quantize is None else writing_network(model)
    if options.offload is not None and not can_offload(model, where):
        raise cannot_offload(where)
    on_device = None if device is None or options.offload is not None else where
    for network, dtypes in precisions(model, options.dtype, where):
        if options.quantize is not None and network is rounded:
            quantize_network(network, NAMES[options.quantize], dtypes=dtypes)
        settle(network, dtypes, on_device)
    if options.attention is not None:
        choose_attention(model, options.attention)
    halved = options.dtype in ("bf16", "fp16")  # which a graph of OpenVINO would not be
    if options.compile or not halved and compiles_quantized(model, where):
        compile_decoding(model, where)
    if options.offload is not None and where.type != "cpu":
        model.enable_model_cpu_offload(device=where)
        return model
    return model if device is None else move(model, where)


def move(model: Any, device: torch.device) -> Any:
    """A pipeline or a network on a device. diffusers warns that float16 does not run on a CPU, which PyTorch has had the operations of for long."""
    return model.to(device, **({"silence_dtype_warnings": True} if hasattr(model, "components") else {}))


def compiles_quantized(model: Any, device: torch.device) -> bool:
    """Whether quantized weights are compiled without being asked: on a CPU with OpenVINO, if memory holds the copy of them that its graph has."""
    network = getattr(model, "transformer", None)
    if device.type != "cpu" or network is None or not hasattr(network, "compiled") or not quantized(model):
        return False
    if not has_openvino() or quantized_bytes(network) > SHARE * free(device):
        return False
    if (reason := openvino_error()) is not None:
        logger.warning("OpenVINO cannot be imported (%s): weights are unpacked in each pass, which is slow", reason)
    return reason is None


def can_offload(model: Any, device: torch.device) -> bool:
    """Whether a model has what is offloaded: on a GPU the networks of a pipeline, on a CPU a T5."""
    if device.type == "cpu":
        return any(type(network).__name__ == "OffloadedT5" for network in networks_of(model))
    return hasattr(model, "enable_model_cpu_offload")


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


def precisions(model: Any, dtype: Dtype, device: torch.device) -> Iterator[tuple[torch.nn.Module, list[torch.dtype]]]:
    """The networks of a model, and the precisions that each is brought into in turn: float32, whatever its file has, or for those of
    `IN_BFLOAT16` at most bfloat16; then, of the networks that `load` names, that of `dtype`. "auto" leaves single networks, the diffusion tools'
    pipelines, whose weights are edited, and those of `IN_BFLOAT16` as they are.

    Raises:
        ValueError: T5 in float16.
    """
    parts = getattr(model, "components", {"": model})
    names = parts if "unet" in parts else CAST  # diffusers' own pipelines have one precision
    chosen = {id(parts[name]) for name in names if isinstance(parts.get(name), torch.nn.Module)}
    for network in networks_of(model):
        name = type(network).__name__
        t5 = name in ("T5EncoderModel", "OffloadedT5")
        if name in IN_BFLOAT16:
            dtypes = [torch.bfloat16] if network.dtype == torch.float16 else []
        else:
            dtypes = [] if t5 else [torch.float32]
        if id(network) in chosen:
            if dtype == "fp16" and t5:
                raise InvalidValue(OF_T5, "dtype")
            if dtype != "auto":
                dtypes.append(DTYPES[dtype])
            elif name not in IN_BFLOAT16 and not t5 and not {"", "unet"} & parts.keys():
                dtypes.append(auto_dtype(device, sum(part.numel() for part in network.parameters())))
        yield network, dtypes


def settle(network: torch.nn.Module, dtypes: list[torch.dtype], device: torch.device | None = None) -> None:
    """Bring a network into precisions, one after the other, and to a device, layer by layer: what a layer was read from is released before
    the next one is read."""

    def settled(tensor: torch.Tensor) -> torch.Tensor:
        for dtype in dtypes if tensor.is_floating_point() else ():
            tensor = tensor.to(dtype)
        return tensor.to(device)

    if (later := getattr(network, "cast_when_read", None)) is not None:  # a T5 that is still on disk
        later(partial(settle, dtypes=dtypes), dtypes)
    for module in network.modules():
        module._apply(settled, recurse=False)
    give_back()


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
    if path.is_file() and (card := released_card(path)):
        return _read_card(path.parent, card)
    try:
        with _alone():
            return resolve(CHECKPOINTS)(path, tokenizer, image_size)
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read ({error.strerror}): expected a checkpoint") from error


def check_files(model: str | Path) -> None:
    """Check that a path without a card is a saved pipeline or a checkpoint that `load` reads, by the names of its tensors.

    Raises:
        ValueError: it is neither.
    """
    path = Path(model)
    known = (path / "model_index.json").is_file() or os.path.lexists(path / CARD_FILE)
    if not known and not (path.is_file() and released_card(path)):
        resolve("argen.models.llamagen_files:check_checkpoint")(path)


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
    """Return the result of `read`, with the defaults of the card; one clear line if its files cannot be used."""
    try:
        with _alone():
            loaded = read()
        if card is not None and card.kind == "generator":
            if not hasattr(loaded, "samplers"):
                raise ValueError(f"{card.target} gives a {type(loaded).__name__}, expected a pipeline")
            loaded.card = card
            _ = loaded.defaults  # checked
    except UNUSABLE as error:
        if isinstance(error, FileNotFoundError) or out_of_memory(error):
            raise
        for file in folder.rglob("*.safetensors"):
            refuse_placeholder(file)
        reason, fault = " ".join(str(error).split()), f"the weights in {folder} cannot be used"
        if reason.endswith(" again"):  # it says itself what to do
            raise ValueError(f"{fault}: {reason}") from error
        advice = "install argen again" if folder.is_relative_to(WEIGHTS) else "make or fetch them again"
        raise ValueError(f"{fault} ({reason[:300]}): {advice}") from error
    return loaded


def loader(device: torch.device | str | None = None, **options: Any) -> Callable[[str], Any]:
    """`load` with options for generators, image tokenizers and saved folders; other models have none. What decodes token by token is
    quantized and compiled, and what has a T5, or is a pipeline on a GPU, is offloaded.

    Raises:
        ValueError: nothing can be compiled here.
    """
    asked = LoadOptions(**options | {"dtype": dtype_name(options.get("dtype", "auto"))})
    if asked.compile:
        check_compile(device, asked.dtype)

    def loading(model: str) -> Any:
        card = all_cards().get(model)
        optional = card is None or card.kind in ("generator", "tokenizer")
        where = None if device is None else pick(device)
        return _open(model, where, asked if optional else LoadOptions(), lenient=True)

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
        raise no_attention(type(main), name)
    set_attention(networks_of(model), name)


def load_diffusion(
    model: str | Path,
    device: torch.device | str | None = None,
    dtype: Dtype | torch.dtype = "auto",
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
    options = LoadOptions(dtype=dtype_name(dtype), attention=attention)
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
            pipe = _pipeline(folder, generators=False)
    except UNUSABLE as error:
        if out_of_memory(error):
            raise
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
        parts = {}
        if ON_DEMAND.get() and index.get("text_encoder") == ["transformers", "T5EncoderModel"]:
            parts["text_encoder"] = resolve("argen.models.t5:OffloadedT5")(str(folder / "text_encoder"))
        return cls.from_pretrained(folder, **options, **parts)
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


@contextmanager
def _alone() -> Iterator[None]:
    """No other model is loaded meanwhile, numbers stay as their files have them, until `settle`, and no progress bars are shown: the weights load
    faster than one is drawn."""
    with LOADING, uncollected(), silent(), as_stored():
        yield
