"""The bounds of every number that a user can set: at the command line, in Python, on the page, over HTTP, in tables and in files.

They are checked before anything is built or allocated by such a number.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from argen.words import cut

MAX_IMAGES, MAX_CANDIDATES = 64, 64
MAX_CELLS = 16384  # of a token grid
MAX_SIDE, MAX_SCALED = 4096, 2048  # pixels of what is read or drawn, and of what is scaled for a client


@dataclass(frozen=True)
class Bound:
    """What a number may be.

    Attributes:
        low, high: both are allowed.
        whole: whether it is an integer.
        note: what an end means.
    """

    low: float
    high: float
    whole: bool = True
    note: str = ""

    def __str__(self) -> str:
        return f"{self.low:,} to {self.high:,}" + (f" ({self.note})" if self.note else "")


BOUNDS = {
    "num_images": Bound(1, MAX_IMAGES),
    "num_candidates": Bound(1, MAX_CANDIDATES),
    "num_beams": Bound(1, MAX_CANDIDATES),
    "num": Bound(1, 10**6),
    "others": Bound(1, 1000),
    "batch_size": Bound(1, 4096),
    "threshold": Bound(0, 1, False),
    "num_tokens": Bound(1, MAX_CELLS),
    "seed": Bound(0, 2**63 - 1 - MAX_CANDIDATES),
    "guidance_scale": Bound(0, 100, False, "1: no guidance"),
    "temperature": Bound(0, 100, False, "0: the most probable token"),
    "top_k": Bound(0, 2**20, note="0: all"),
    "top_p": Bound(0, 1, False, "1: all"),
    "lantern_k": Bound(0, 2**16),
    "lantern_delta": Bound(0, 1, False),
    "lantern_lambda": Bound(1, 10**6, False),
    "steps": Bound(1, 1000),
    "control_strength": Bound(0, 10, False, "0: no control"),
    "iterations": Bound(1, 1000),
    "noises": Bound(1, 64),
    "learning_rate": Bound(0, 1, False),
    "epochs": Bound(0, 1000),
    "verify": Bound(1, 1000),
    "run_seed": Bound(0, 2**31 - 1),
    "port": Bound(0, 65535),
}


def check(name: str, value: float | None, called: str | None = None) -> None:
    """Check a number that was set; None, which leaves it to the model, is allowed, and so is what has no bounds.

    Args:
        called: how errors name it, if not as here.

    Raises:
        ValueError: not a finite number, not a whole one where one is expected, or out of bounds.
    """
    bound = BOUNDS.get(name)
    if bound is None or value is None:
        return
    shown = cut(value if isinstance(value, int | float) else repr(value))
    kinds = int if bound.whole else int | float
    unbounded = isinstance(value, float) and not math.isfinite(value)  # an int of any length is compared as it is
    if isinstance(value, bool) or not isinstance(value, kinds) or unbounded:
        raise ValueError(f"{called or name} is {shown}: expected a {'whole ' if bound.whole else ''}number, {bound}")
    if not bound.low <= value <= bound.high:
        raise ValueError(f"{called or name} is {shown}: expected {bound}")


def check_all(settings: Iterable[tuple[str, object]]) -> None:
    """`check` of every setting of which the name has bounds; of steps for two parts each."""
    for name, value in settings:
        for each in value if isinstance(value, tuple) and name == "steps" else (value,):
            check(name, each)


def with_integers(settings: dict) -> dict:
    """The same settings with integers in place of floats such as 4.0 where whole numbers are expected, as pages and tables have them."""

    def whole(name: str, value) -> bool:
        return name in BOUNDS and BOUNDS[name].whole and isinstance(value, float) and value.is_integer()

    return {name: int(value) if whole(name, value) else value for name, value in settings.items()}


def check_size(size: tuple[int, int] | None, high: int = MAX_SIDE) -> tuple[int, int] | None:
    """Width and height in pixels.

    Raises:
        ValueError: a side below 1 or above `high`.
    """
    if size is not None and not all(isinstance(side, int) and 1 <= side <= high for side in size):
        raise ValueError(f"size is {size[0]}x{size[1]}: expected 1 to {high} pixels on each side")
    return size
