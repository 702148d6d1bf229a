"""How tokens are drawn: pure functions on tensors that know no network and no image."""

from samplers.auto import Auto
from samplers.jacobi import Jacobi
from samplers.lantern import Lantern
from samplers.next_x import SOLVERS, NextX
from samplers.recycling import TokenRecycling
from samplers.sjd import GroupedJacobi, SpeculativeJacobi
from samplers.speculative import Speculative
from samplers.steps import Sampler, Sequential
from samplers.zipar import ZipAR

SAMPLERS: dict[str, type] = {
    each.name: each
    for each in (
        Auto,
        Sequential,
        Jacobi,
        SpeculativeJacobi,
        GroupedJacobi,
        TokenRecycling,
        Speculative,
        Lantern,
        ZipAR,
    )
}


def by_name(name: str, **settings) -> Sampler | NextX:
    """The sampler called `name`, of tokens or (one of `SOLVERS`) of latents, with its defaults where no settings are given.

    Raises:
        ValueError: there is no such sampler.
    """
    if name in SOLVERS:
        return NextX(name, **settings)
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: expected one of {', '.join((*SAMPLERS, *SOLVERS))}")
    return SAMPLERS[name](**settings)
