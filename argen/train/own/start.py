"""What a training on own images starts from: a model, or the parts of a new one."""

from collections.abc import Callable
from typing import Any

from argen.hub.loading import load
from argen.models.clip import TextImageEncoder
from argen.models.t5 import T5, read_t5
from argen.train.own.options import OwnOptions
from argen.train.sources import Source
from argen.words import cut
from samplers.errors import InvalidValue


def check_conditions_of(name: str, by_class: bool, has_classes: bool, lora: int | None) -> None:
    """Check that a model to start from can learn what the images have.

    Args:
        name: of the model.
        by_class: whether it draws classes, not captions.
        has_classes: whether the images have classes, not captions.
        lora: rank of the LoRA that is asked for.

    Raises:
        InvalidValue: it draws captions where the images have classes, or the other way round; a LoRA of a model of classes.
    """
    if by_class != has_classes:
        has, needs = ("captions", "classes") if by_class else ("classes", "captions")
        raise InvalidValue(
            f"{name} draws {needs}, and the images have {has}: choose another model to start from", "init"
        )
    if by_class and lora is not None:
        raise InvalidValue("lora is for models of captions, and this one draws classes: leave it out", "lora")


def model_of(options: OwnOptions, kind: type, network: type, name: str) -> Any:
    """The pipeline that `--init` names, in float32.

    Args:
        kind, network: classes of the pipeline and of its network.
        name: what errors call it.

    Raises:
        InvalidValue: it is another kind of model, or a setting is for new networks alone.
    """
    for setting in ("size", "tokenizer", "text_encoder"):
        if getattr(options, setting) is not None:
            raise InvalidValue(
                f"{setting} is for a new network, and {options.init} has its own: leave one of them out", setting
            )
    pipe = load(options.init, dtype="fp32")
    if not isinstance(pipe, kind) or not isinstance(pipe.transformer, network):
        raise InvalidValue(f"{options.init} is no {name}: expected one to start from", "init")
    if options.image_size not in (None, pipe.image_size):
        raise InvalidValue(
            f"image_size is {options.image_size}: expected {pipe.image_size}, that of {options.init}", "image_size"
        )
    return pipe


def start_of(
    options: OwnOptions, source: Source, kind: type, network: type, name: str, with_classes: Callable[[Any, int], None]
) -> Any:
    """The pipeline that `--init` names, in float32, with a table of the images' own classes where they have some.

    Args:
        kind, network, name: see `model_of`.
        with_classes: gives such a network a table of so many other classes.

    Raises:
        InvalidValue: see `model_of`; it draws captions where the images have classes or the other way round.
    """
    pipe = model_of(options, kind, network, name)
    by_class = pipe.components.get("text_encoder") is None
    check_conditions_of(options.init, by_class, source.classes is not None, options.lora)
    if source.classes is not None:
        with_classes(pipe.transformer, len(source.classes))
        pipe.transformer.register_to_config(classes=len(source.classes))
        pipe.register_to_config(class_names=list(source.classes))
    return pipe


def image_tokenizer_of(options: OwnOptions, kind: Any, name: str, expected: str, example: str) -> Any:
    """The image tokenizer of a new network.

    Args:
        kind: class of it, or a union of classes.
        name: what errors call the network.
        expected, example: what it reads, in words, and an id.

    Raises:
        InvalidValue: none is named, or one of another kind.
    """
    if options.tokenizer is None:
        raise InvalidValue(
            f"a new network needs an image tokenizer: give --tokenizer, e.g. {example}, or --init a model to start from",
            "tokenizer",
        )
    tokenizer = load(options.tokenizer)
    if not isinstance(tokenizer, kind):
        raise InvalidValue(f"{options.tokenizer} is no tokenizer that {name} reads: expected {expected}", "tokenizer")
    return tokenizer


def size_of(options: OwnOptions, sizes: dict[str, dict], usual: str) -> dict:
    """The sizes of a new network.

    Raises:
        InvalidValue: there is no such size.
    """
    size = options.size or usual
    if size not in sizes:
        *others, last = sizes
        raise InvalidValue(f"size is {cut(size)}: expected {', '.join(others)} or {last}", "size")
    return sizes[size]


def read_text_encoder(name: str) -> tuple[Any, Any, int]:
    """A text encoder, its tokenizer, and the width of its states.

    Raises:
        InvalidValue: it is none.
        ConnectionError: it is a T5 that is not here and cannot be fetched.
    """
    if name == T5 or "t5" in name.lower():
        try:
            encoder, tokenizer = read_t5(name)
        except OSError as error:
            raise ConnectionError(
                f"the text encoder {name} is not on this machine and could not be fetched: connect to the network, or give "
                "--text-encoder a folder that holds it, or argen/emoji-clip, which ships"
            ) from error
        return encoder, tokenizer, encoder.config.d_model
    encoder = load(name)
    if not isinstance(encoder, TextImageEncoder):
        raise InvalidValue(f"{name} is no text encoder: expected {T5} or argen/emoji-clip", "text_encoder")
    return encoder.clip, encoder.tokenizer, encoder.clip.config.text_config.hidden_size
