"""The bounds of every number that a user can set: at the command line, in Python, on the page, over HTTP, in tables and in files.

They are checked before anything is built or allocated by such a number.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

MAX_IMAGES, MAX_CANDIDATES = 64, 64
MAX_CELLS = 16384  # of a token grid
MAX_SIDE, MAX_SCALED = 4096, 2048  # pixels of what is read or drawn, and of what is scaled for a client
MAX_TEXT = 1000  # characters of a prompt, a question or what else is typed
MAX_PIXELS = 51_000_000  # of all images that one request has scaled


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
    "port": Bound(0, 65535),
}


class InvalidValue(ValueError):
    """A setting, `param`, does not fit.

    Attributes:
        code: why, in OpenAI's words.
    """

    def __init__(self, message: str, param: str, code: str = "invalid_value"):
        super().__init__(message)
        self.param, self.code = param, code


def check(name: str, value: float | None) -> None:
    """Check a number that was set; None, which leaves it to the model, is allowed, and so is what has no bounds.

    Raises:
        ValueError: not a finite number, not a whole one where one is expected, or out of bounds.
    """
    bound = BOUNDS.get(name)
    if bound is None or value is None:
        return
    kinds = int if bound.whole else int | float
    unbounded = isinstance(value, float) and not math.isfinite(value)  # an int of any length is compared as it is
    if isinstance(value, bool) or not isinstance(value, kinds) or unbounded:
        message = f"{name} is {repr(value)[:60]}: expected a {'whole ' if bound.whole else ''}number, {bound}"
        raise InvalidValue(message, name, "invalid_type")
    if not bound.low <= value <= bound.high:
        kind = "integer" if bound.whole else "decimal"
        side = "below_min" if value < bound.low else "above_max"
        raise InvalidValue(f"{name} is {repr(value)[:60]}: expected {bound}", name, f"{kind}_{side}_value")


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
        raise InvalidValue(f"size is {size[0]}x{size[1]}: expected 1 to {high} pixels on each side", "size")
    return size


def check_length(text: str, what: str, param: str | None = None) -> str:
    """A text that was typed.

    Raises:
        InvalidValue: more than `MAX_TEXT` characters.
    """
    if len(text) > MAX_TEXT:
        message = f"{what} has {len(text):,} characters: expected at most {MAX_TEXT:,}"
        raise InvalidValue(message, param or what, "string_above_max_length")
    return text


def check_pixels(count: int) -> None:
    """Raises:
    ValueError: the images of one request have more than `MAX_PIXELS` together.
    """
    if count > MAX_PIXELS:
        raise InvalidValue(
            f"the images of this request have {count / 1e6:.0f} million pixels together: expected at most {MAX_PIXELS // 10**6} "
            "million, ask for fewer or smaller ones",
            "size",
        )
