"""The bounds of every number of the tools; a generation's others stand in `argen.request.Request`, a sampler's in its class.

They are checked before anything is built or allocated by such a number.
"""

import math
from dataclasses import dataclass

from argen.words import cut
from samplers.errors import InvalidValue

MAX_IMAGES, MAX_CANDIDATES = 64, 64
MAX_CELLS = 16384  # of a token grid
MAX_SEED = 2**63 - 1 - MAX_CANDIDATES
MAX_SIDE, MAX_SCALED = 4096, 2048  # pixels of what is read or drawn, and of what is scaled for a client
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
    "num": Bound(1, 10**6),
    "others": Bound(1, 1000),
    "batch_size": Bound(1, 4096),
    "threshold": Bound(0, 1, False),
    "seed": Bound(0, MAX_SEED),
    "num_candidates": Bound(1, MAX_CANDIDATES),
    "num_tokens": Bound(1, MAX_CELLS),
    "temperature": Bound(0, 100, False, "0: always the most probable token"),
    "top_k": Bound(0, 2**20, note="0: all"),
    "top_p": Bound(0, 1, False, "1: all"),
    "guidance_scale": Bound(0, 100, False, "1: no guidance"),
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
    value_text = cut(value if isinstance(value, int | float) else repr(value))
    kinds = int if bound.whole else int | float
    unbounded = isinstance(value, float) and not math.isfinite(value)  # an int of any length is compared as it is
    if isinstance(value, bool) or not isinstance(value, kinds) or unbounded:
        message = f"{called or name} is {value_text}: expected a {'whole ' if bound.whole else ''}number, {bound}"
        raise InvalidValue(message, name, "invalid_type")
    if not bound.low <= value <= bound.high:
        kind = "integer" if bound.whole else "decimal"
        side = "below_min" if value < bound.low else "above_max"
        raise InvalidValue(f"{called or name} is {value_text}: expected {bound}", name, f"{kind}_{side}_value")


def check_size(size: tuple[int, int] | None, high: int = MAX_SIDE) -> tuple[int, int] | None:
    """Width and height in pixels.

    Raises:
        ValueError: a side below 1 or above `high`.
    """
    if size is not None and not all(isinstance(side, int) and 1 <= side <= high for side in size):
        raise InvalidValue(f"size is {size[0]}x{size[1]}: expected 1 to {high} pixels on each side", "size")
    return size


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
