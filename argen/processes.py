"""The processes of a training or an evaluation, which `accelerate launch` or `torchrun` has started."""

import os

from accelerate import PartialState

from argen.device import pick


def processes() -> PartialState:
    """This process among the others. accelerate by itself has no others on a machine without GPUs, whoever started it."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    return PartialState(cpu=asked or pick(None).type == "cpu")
