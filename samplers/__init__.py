"""How tokens are drawn: pure functions on tensors that know no network and no picture."""

from samplers.jacobi import Jacobi
from samplers.steps import Plain, Sampler

SAMPLERS: dict[str, type] = {"plain": Plain, "jacobi": Jacobi}


def by_name(name: str) -> Sampler:
    """The sampler called `name`, with its default settings."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]()
