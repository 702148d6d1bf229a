"""What the commands share: a parser with short errors, checks of paths, loading a model by id, one line for bad input."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from argen.words import check_text

EXTRAS = {
    "scipy": "control",
    "matplotlib": "bench",
    "nudenet": "nudity",
    "sentencepiece": "seed",
}  # module -> the extra that brings it; others are of "train"


MAX_NAME = 250  # bytes of a file name: 255, less the number of one of several images


class Parser(argparse.ArgumentParser):
    """An argument error is one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def printable(text: str) -> str:
    """A text in one line that any stream takes, with escapes for bytes that are no UTF-8."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def device_and_json(add: argparse.ArgumentParser) -> None:
    add.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    add.add_argument("--json", action="store_true", help="print JSON")


def check_name(path: Path) -> None:
    """Raises:
    ValueError: the name of a file or a folder is longer than file systems take.
    """
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise ValueError(
            f"cannot write {path.name[:40]}...: its name is longer than {MAX_NAME} bytes, choose a shorter one"
        )


def writable(path: Path, suffix: str = ".png") -> Path:
    """`path`, if a file with that ending can be written there.

    Raises:
        ValueError: it has another ending, or its folder is missing or locked.
    """
    check_name(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"cannot write {path}: expected a name that ends in {suffix}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: expected a file name in a folder that exists and may be written")
    return path


def writable_folder(path: Path) -> Path:
    """`path`, if a new folder can be made there.

    Raises:
        ValueError: there is something already, or the folder above it is missing or locked.
    """
    check_name(path)
    if path.exists():
        raise ValueError(f"{path} is there already: choose another --out")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"cannot write {path}: expected the name of a new folder where one may be made")
    return path


def load_model(model: str, device: str | None, kind: str | None = None, **files):
    """The model called `model` on a device; `files` as in `argen.hub.loading.load`."""
    from argen.device import pick
    from argen.hub.cards import all_cards, ids
    from argen.hub.loading import load

    found = all_cards()[model].kind if model in all_cards() else kind
    if kind and found != kind:
        raise ValueError(f"{model} is of the kind {found}, expected a {kind}: {', '.join(ids(kind))}")
    where = pick(device)
    loaded = load(model, **files)
    if hasattr(loaded, "set_progress_bar_config"):
        loaded.set_progress_bar_config(disable=None, bar_format="{desc}{percentage:3.0f}%|{bar:30}| {elapsed}")
    return loaded.to(where)


def guarded(name: str, function: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `function` -> exit code: bad input is one line on stderr and 2, an interruption 130."""
    warnings.simplefilter("ignore")
    logging.basicConfig(format="argen: %(message)s", level=logging.WARNING)
    for library in ("transformers", "diffusers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        for option, value in vars(args).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):  # paths may have any bytes
                    check_text(text, option)
        function(args)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name, "train")
        print(f"{name}: error: {error.name} is not installed: pip install 'argen[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    return 0
