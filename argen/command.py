"""What the commands share: a parser with short errors, checks of paths, loading a model by id, one line for bad input."""

import argparse
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from argen.bounds import check, check_size
from argen.files import FULL, no_room
from argen.words import check_text, cut, number_of

if TYPE_CHECKING:
    import torch

    from samplers.settings import Setting

EXTRAS = {
    "scipy": "control",
    "matplotlib": "bench",
    "nudenet": "nudity",
    "sentencepiece": "seed",
    "google": "seed",
    "spacy": "grammar",
    "datasets": "train",
    "peft": "train",
    "resvg_py": "train",
    "openvino": "openvino",
    "xformers": "xformers",
}  # module -> the extra that brings it

CONTROLS = (
    "canny, hed, lineart, lineart-inverted, depth, depth-midas, segments, seg or map"  # argen.models.annotators.KINDS
)
PIPELINE = "folder of a Stable Diffusion (XL) pipeline, or OWNER/NAME on the hub (default: argen/emoji-sd)"
BINDING = "how tokens are merged: attribute (as published, for colours), object (as published, for things that belong to objects), merge (without the "
BINDING += "refinement), gentle (the noun's own length, all else stays) (default: attribute; of argen/emoji-sd gentle)"
COUNT_RATE = "(default: the authors' 0.01; of argen/emoji-sd 0.003)"
CLIP = "openai/clip-vit-base-patch32"
OPTIONS = "dtype", "attention", "quantize", "compile", "offload", "lora"  # of `argen.hub.options.LoadOptions`
CALLED = {"tokens": "num_tokens", "strength": "control_strength"}  # options -> their names in `argen.bounds`
MAX_WORD = 600  # characters in errors: of a path
MAX_NAME = 250  # bytes of a file name: 255, less the number of one of several images


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows the default of each option, where it has one and the help does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = "(default" in (action.help or "")
        without = action.default is None or action.default is False or action.default in ([], ())
        return action.help or "" if said or without else super()._get_help_string(action) or ""


class Parser(argparse.ArgumentParser):
    """An argument error is one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def printable(text: str) -> str:
    """A text in one line that any stream takes, with escapes for bytes that are no UTF-8; words and quotations longer than names of
    files are cut."""
    text = re.sub(r"'([^']{60})[^']{200,}'", r"'\1...'", text)
    words = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0").split()
    return " ".join(word if len(word) <= MAX_WORD else f"{word[:60]}..." for word in words)


def device_and_json(add: argparse.ArgumentParser) -> None:
    device_argument(add)
    add.add_argument("--json", action="store_true", help="print JSON")


def device_argument(add: argparse.ArgumentParser) -> None:
    add.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")


def load_arguments(add: argparse.ArgumentParser, *names: str) -> None:
    """How the model is loaded, the options of `argen.hub.options.LoadOptions` called `names` (all of them by default); `load_options` reads
    them."""
    from argen.hub.options import LoadOptions

    add_settings(add, LoadOptions, names or OPTIONS, "the model's")


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as `argen.load` takes them."""
    return {name: value for name in OPTIONS if (value := getattr(args, name, None)) not in (None, False)}


def size(text: str) -> tuple[int, int]:
    """ "128x64" -> width and height."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid size: expected WIDTHxHEIGHT in pixels, e.g. 128x128")
    try:
        return check_size((int(width), int(height)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def diffusion_arguments(add: argparse.ArgumentParser, steps: int, guidance: float) -> None:
    """What the tools on diffusers' pipelines share; `steps` and `guidance` are those that are usual."""
    default_note = "of argen/emoji-sd its own"
    add.add_argument("--model", default="argen/emoji-sd", metavar="DIR", help=PIPELINE)
    add.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    add.add_argument("--steps", type=int, metavar="N", help=f"of the sampler (default: {steps}; {default_note})")
    add.add_argument("--guidance-scale", type=float, metavar="G", help=f"(default: {guidance}; {default_note})")
    device_and_json(add)
    load_arguments(add, "dtype", "attention")


def add_settings(parser: argparse.ArgumentParser, cls: type, names: Iterable[str], default_text: str) -> None:
    """Add a flag for each of the settings called `names` of a class of `samplers.settings`; what is left out is None.

    Args:
        default_text: what the help says of a default that is None, e.g. "the model's".
    """
    from samplers.settings import settings_of

    for name in names:
        setting = settings_of(cls)[name]
        flag = f"--{name.replace('_', '-')}"
        if setting.kind is bool:
            parser.add_argument(
                *setting.flags, flag, dest=name, action="store_true", default=setting.default, help=setting.help
            )
            continue
        parser.add_argument(
            *setting.flags,
            flag,
            dest=name,
            type=partial(_typed, setting),
            metavar=setting.metavar,
            help=f"{setting.help}: {setting.expected} (default: {default_text if setting.default is None else setting.default})",
        )


def _typed(setting: "Setting", text: str) -> object:
    try:
        return setting.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def described(tokens) -> str:
    """What one image became, ids [N] or latents [C, h, w], in words."""
    return number_of(len(tokens), "token") if tokens.ndim == 1 else f"{tokens[0].size} latents of {len(tokens)} numbers"


def check_name(path: Path) -> None:
    """Raises:
    ValueError: the name of a file or a folder is longer than file systems take, or holds a zero byte.
    """
    if "\0" in str(path):
        raise ValueError(f"cannot write {cut(repr(str(path)))}: its name holds a zero byte, choose another")
    sizes = [len(os.fsencode(name)) for name in path.parts]
    if sizes and (max(sizes) > 255 or sizes[-1] > MAX_NAME or sum(sizes) > 3500):
        raise ValueError(
            f"cannot write {cut(path.name)}: its name is longer than {MAX_NAME} bytes, choose a shorter one"
        )


def writable(path: Path, suffix: str = ".png") -> Path:
    """`path`, if a file with that ending can be written there.

    Raises:
        ValueError: it has another ending, or its folder is missing or locked.
    """
    check_name(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"cannot write {path}: expected a name that ends in {suffix}")
    if (
        path.is_dir()
        or not path.parent.is_dir()
        or not os.access(path.parent, os.W_OK)
        or not _takes_files(path.parent)
    ):
        raise ValueError(f"cannot write {path}: expected a file name in a folder that exists and may be written")
    return path


def writable_all(*paths: Path | None, suffix: str = ".png") -> list[Path]:
    """Those of some paths that are given, if a file each can be written there.

    Raises:
        ValueError: see `writable`; two are the same.
    """
    writable_paths = [writable(path, suffix) for path in paths if path]
    if len({path.resolve() for path in writable_paths}) < len(writable_paths):
        raise ValueError(f"{writable_paths[0]} is given for two files: choose another name for one")
    return writable_paths


def writable_images(path: Path, count: int) -> list[Path]:
    """`path` for one image, the same with -1, -2 ... for several, if all can be written.

    Raises:
        ValueError: see `writable`.
    """
    writable(path)
    if count == 1:
        return [path]
    return [writable(path.with_stem(f"{path.stem}-{number}")) for number in range(1, count + 1)]


def writable_folder(path: Path, new: bool = True) -> Path:
    """`path`, if a folder can be made there, or is there for files where it need not be new.

    Raises:
        ValueError: there is something else already, or the folder above it is missing or locked.
    """
    check_name(path)
    if path.exists() and new:
        raise ValueError(f"{path} is there already: choose another --out")
    absolute = path.absolute()
    above = next(ancestor for ancestor in (absolute, *absolute.parents) if os.path.lexists(ancestor))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK) or not _takes_files(above):
        raise ValueError(
            f"cannot write {path}: expected the name of a {'new ' if new else ''}folder where one may be made"
        )
    return path


def _takes_files(folder: Path) -> bool:
    """Whether the file system of a folder takes files; that of /proc and of /sys does not."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_model(model: str, kind: str | None = None) -> None:
    """Raises:
    ValueError: there is no such model, or it is of another kind.
    """
    from argen.hub.cards import check_kind, check_known

    check_known(model)
    if kind:
        check_kind(model, kind)


def check_numbers(args: argparse.Namespace) -> None:
    """Check every number among the options of a command, before anything is loaded.

    Raises:
        ValueError: see `argen.bounds.check`.
    """
    for name, value in vars(args).items():
        for number in value if isinstance(value, tuple) and name == "steps" else (value,):
            if not isinstance(number, str):
                check(CALLED.get(name, name), number, name)


def load_model(
    model: str, device: str | None, kind: str | None = None, options: Mapping[str, Any] = MappingProxyType({}), **files
):
    """The model called `model` on a device; `options` from `load_options`, `files` as in `argen.hub.loading.load`."""
    from argen.hub.loading import load

    where = device_for(device, options)
    check_model(model, kind)
    loaded = load(model, device=where, **options, **files)
    if hasattr(loaded, "set_progress_bar_config"):
        loaded.set_progress_bar_config(disable=None, bar_format="{desc}{percentage:3.0f}%|{bar:30}| {elapsed}")
    return loaded


def check_loading(model: str, device: "torch.device", options: Mapping[str, Any], kind: str | None = None) -> None:
    """Check that a model can be loaded on a device with `options` from `load_options`, as far as that is known before.

    Raises:
        ValueError: see `check_model` and `argen.hub.abilities.check_options`.
    """
    from argen.hub.abilities import check_compile, check_dtype, check_options
    from argen.hub.options import LoadOptions

    check_model(model, kind)
    asked = LoadOptions(**options)
    if asked.compile:
        check_compile(device, asked.dtype)
    check_dtype(model, asked)
    check_options(model, asked, device)


def load_diffusion_model(model: str, device: str | None, options: Mapping[str, Any]):
    """The diffusers pipeline called `model` on a device; `options` from `load_options`."""
    from argen.hub.loading import load_diffusion

    return load_diffusion(model, device=device_for(device, options), **options)


def device_for(device: str | None, options: Mapping[str, Any]) -> "torch.device":
    """The device of that name, on which the attention backend can run.

    Raises:
        ValueError: there is no such device, or the backend cannot be used on it.
    """
    from argen.device import pick
    from tokenizers_img.attention import check_attention

    where = pick(device)
    if "attention" in options:
        check_attention(options["attention"], where)
    return where


def open_streams() -> None:
    """Open the standard streams that are closed, so that what is printed goes nowhere, and no file gets their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - to the end of the program


def flush_output() -> OSError | None:
    """Write what was printed -> why the rest of it goes nowhere; None where all is written, or a program like `head` has read enough."""
    failure = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                error.filename, failure = "standard output", error
    return failure


def explained(name: str, error: Exception) -> int:
    """Say on stderr what is wrong, in one line -> exit code: 2 for bad input or a full disk, 1 for too little memory; other errors are
    raised again."""
    from argen.hub.memory import out_of_memory

    message, number = out_of_memory(error), no_room(error)
    if number is not None and (not isinstance(error, OSError) or error.errno is None):
        error = OSError(number, os.strerror(number))
    if message is None and not isinstance(error, ValueError | OSError):
        raise error
    if number is not None and error.filename is None:
        error = flush_output() or error
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        file = error.filename if isinstance(error.filename, str | bytes) else ""
        reasons = [os.fsdecode(file), error.strerror.lower(), FULL.get(number, "")]
        reason = ": ".join(filter(None, reasons))
    print(f"{name}: error: {printable(message or reason)}", file=sys.stderr)
    return 1 if message else 2


def missing(error: ModuleNotFoundError) -> str:
    """What is said of a module that is not installed."""
    extra = EXTRAS.get((error.name or "").partition(".")[0])
    return f"{error.name or error} is not installed" + (f": pip install 'argen[{extra}]'" if extra else "")


def check_texts(args: argparse.Namespace) -> None:
    """Check the texts and paths among the options of a command; a path through a folder that is not there and back is made one without, or
    making it would make that folder.

    Raises:
        ValueError: see `argen.words.check_text`; a path holds a zero byte.
    """
    for option, value in dict(vars(args)).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):  # paths may have any bytes but zero
                check_text(text, option)
            if isinstance(text, Path) and "\0" in str(text):
                raise ValueError(f"{option} is {cut(repr(str(text)))}, with a zero byte: no file has such a name")
        if isinstance(value, Path) and ".." in value.parts and not value.parent.exists():
            setattr(args, option, value.resolve())


def guarded(name: str, function: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `function` -> exit code: bad input is one line on stderr and 2, too little memory one and 1, an interruption 130, another signal that
    ends programs 128 and its number."""
    warnings.simplefilter("ignore")
    logging.basicConfig(format="argen: %(message)s", level=logging.WARNING)
    for library in ("transformers", "diffusers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        if sys.flags.optimize > 1:
            raise ValueError("python -OO takes away texts that diffusers needs: use python -O")
        check_texts(args)
        with _unwinding():
            function(args)
    except BrokenPipeError:  # whoever reads what is printed has read enough
        return 141  # as programs end that SIGPIPE kills
    except ModuleNotFoundError as error:
        print(f"{name}: error: {missing(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        return explained(name, error)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    except _Terminated as signalled:
        print(f"{name}: stopped", file=sys.stderr)
        return 128 + signalled.number
    return 0


class _Terminated(BaseException):
    """A signal that ends the program, so that it unwinds, and files and folders that are half-written are deleted, as at Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def _unwinding() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `_Terminated` meanwhile, once; where a program has handlers of its own they stay, and so in other threads."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def terminate(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # or a second one stops the cleaning up
        raise _Terminated(number)

    for number in numbers:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
