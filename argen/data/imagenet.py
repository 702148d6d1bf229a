"""The 1,000 classes of ImageNet by name, in the order of every published class-conditional model.

`imagenet_classes.txt` has the short names that torchvision ships (BSD-3-Clause).
"""

import difflib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path


@cache
def class_names() -> tuple[str, ...]:
    """Name of each class."""
    return tuple(Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="utf-8").splitlines())


def class_id(text: str, names: Sequence[str] | None = None) -> int:
    """The id of the class with this number or name, e.g. "class:207", "class:golden retriever", "golden retriever"; the first
    words of a name will do where only one begins so.

    Args:
        names: of the classes; None are ImageNet's.

    Raises:
        ValueError: there is none; says the nearest names.
    """
    names = class_names() if names is None else names
    word = text.strip().lower().removeprefix("class:").strip()
    if word.isdigit():
        if int(word) >= len(names):
            raise ValueError(f"class {word} does not exist: expected 0 to {len(names) - 1}, or a name")
        return int(word)
    lowered = [name.lower() for name in names]
    if word in lowered:
        return lowered.index(word)
    matches = [name for name in lowered if word and re.match(rf"{re.escape(word)}\b", name)]
    if len(matches) == 1:
        return lowered.index(matches[0])
    near = difflib.get_close_matches(word, lowered, n=3, cutoff=0.5)
    near = near or [name for name in lowered if word and word in name][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f'expected a number or a name, as in "class:{names[0]}"'
    raise ValueError(f"no class is named {word!r}: {hint}")
