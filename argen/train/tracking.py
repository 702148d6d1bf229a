"""What a training logs, shown by a tracker of accelerate: TensorBoard, trackio or Weights & Biases."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

from argen.registry import reason
from samplers.errors import InvalidValue

PROJECT = "argen"
FOLDER = "tensorboard"  # in that of the training


def check_tracker(name: str | None) -> None:
    """Raises:
    InvalidValue: it is not installed.
    """
    if name is not None and name not in [str(known) for known in get_available_trackers()]:
        raise InvalidValue(f"tracker is {name}, which is not installed: pip install {name}", "tracker")


def begin(accelerator: Accelerator, out: Path, recipe: dict[str, Any], step: int) -> None:
    """Start the trackers of an accelerator in its first process, from a step on; what they have of later ones is done again.

    Raises:
        ValueError: one of them cannot be started, e.g. without a login.
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    settings = recipe["schedule"] | recipe["options"] | {"seed": recipe["seed"], "precision": recipe["precision"]}
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    run = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]  # the same when it is resumed
    arguments = {
        "tensorboard": {"purge_step": step + 1},
        "trackio": {"name": f"{out.name}-{run[:6]}", "resume": "allow"},
        "wandb": {"name": out.name, "id": run, "resume": "allow", "dir": str(out)},
    }
    name = FOLDER if "tensorboard" in map(str, accelerator.log_with) else PROJECT
    try:
        accelerator.init_trackers(name, plain, arguments)
    except Exception as error:  # of a package that argen does not know
        what = f"the tracker {accelerator.log_with[0]} cannot be started"
        raise ValueError(f"{what} ({reason(error)}): set it up, or leave --tracker out") from error


def show(accelerator: Accelerator, sheet: Image.Image, step: int) -> None:
    """Give a sample sheet to those trackers that take images."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.asarray(sheet.convert("RGB"))[None]}, step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [sheet]}, step)


def end(accelerator: Accelerator) -> None:
    """Finish what the trackers of an accelerator have to write."""
    for tracker in accelerator.trackers:
        tracker.finish()
