"""Python's garbage collector, while modules are imported and networks loaded: what they make stays, so that each search is in vain."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No searches for garbage meanwhile: they are a fifth of the time that torch, diffusers and transformers take to import.

    What there is at the end counts as old, so that only the rare searches through everything look at it, and not the very next one.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # else the program keeps some out of all searches
                gc.freeze()
                gc.unfreeze()
            gc.enable()
