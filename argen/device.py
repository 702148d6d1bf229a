"""Where networks run, and when they are loaded."""

import threading

import torch

# While diffusers or transformers load a network, those that any thread makes have no storage, and after two at once all have none
# (accelerate's init_empty_weights changes torch's classes for the while): whoever loads one holds this.
LOADING = threading.RLock()


def pick(name: str | None = None) -> torch.device:
    """The device called `name`, or the best that is here: CUDA, Apple GPU, CPU.

    Raises:
        ValueError: no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}): expected cpu, cuda or mps") from error
    return device
