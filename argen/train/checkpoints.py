"""The checkpoint of a training: written whole, swapped in, and read back after a kill at any moment.

Beside ``checkpoint`` lie, at most, ``checkpoint.new``, which is being written or waits to be renamed, and ``checkpoint.old``, the one
before, which is read where a file of the newer one is damaged. What is whole has a list of its files, written last. Where more are kept,
those before are ``checkpoint-000500`` and so on, by their steps.
"""

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from argen.files import naming
from argen.words import cut

logger = logging.getLogger(__name__)
logging.getLogger(
    "accelerate.utils.other"
).addFilter(  # said of every network with one table for reading and writing words
    lambda record: "Removed shared tensor" not in record.getMessage()
)
NEW, CURRENT, OLD, DAMAGED = "checkpoint.new", "checkpoint", "checkpoint.old", "checkpoint.damaged"
LATER = {  # settings that checkpoints of earlier releases do not name -> what they were then
    "decline": ("cosine",), "floor": (0.02,), "decayed": ("all",), "clip": ("norm",), "ema_warmup": (True,), "micro_batch": (None,),
    "hold": (0.0,),
}  # fmt: skip
NUMBERED = rf"{CURRENT}-(\d{{6,}})"
RECIPE, FILES = "recipe.json", "files.json"  # FILES: name -> size and CRC-32


def write(accelerator: Accelerator, out: Path, recipe: dict, step: int, keep: int = 1) -> None:
    """Save all that the accelerator holds after a step as ``out/checkpoint``; the one before is kept as ``checkpoint.old``.

    Args:
        keep: of how many steps checkpoints are kept, with this one; from two on those before are called by their steps.
    """
    new, current, old = out / NEW, out / CURRENT, out / OLD
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    with naming(current):
        accelerator.save_state(new)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (new / RECIPE).write_text(json.dumps(recipe | {"step": step}, indent=2))
        files = sorted(path for path in new.rglob("*") if path.is_file())
        manifest = {path.relative_to(new).as_posix(): _facts(path, flush=True) for path in files}
        (new / "files.part").write_text(json.dumps(manifest))
        (new / "files.part").rename(new / FILES)
        _retire(out, keep)  # what a kill has left
        shutil.rmtree(old, ignore_errors=True)
        _swap(new, current, old)
        _retire(out, keep)
    accelerator.wait_for_everyone()


def numbered(out: Path) -> dict[int, Path]:
    """The checkpoints that are called by their steps, the oldest first."""
    found = {int(match[1]): path for path in out.glob(f"{CURRENT}-*") if (match := re.fullmatch(NUMBERED, path.name))}
    return dict(sorted(found.items()))


def _retire(out: Path, keep: int) -> None:
    """Call the checkpoint before the present one by its step, and delete the oldest until `keep` are left with the present one; with one to
    keep nothing is done."""
    if keep == 1:
        return
    if (out / OLD / RECIPE).is_file():
        before = json.loads((out / OLD / RECIPE).read_text())["step"]
        shutil.rmtree(out / f"{CURRENT}-{before:06d}", ignore_errors=True)
        (out / OLD).rename(out / f"{CURRENT}-{before:06d}")
    for path in list(numbered(out).values())[: 1 - keep]:
        shutil.rmtree(path)


def find(accelerator: Accelerator | PartialState, out: Path) -> Path | None:
    """``out/checkpoint`` after every swap that a kill cut short is finished, and with what is damaged put aside; None where no
    checkpoint was ever whole.

    Raises:
        ValueError: there are checkpoints, but all are damaged.
    """
    if accelerator.is_main_process:
        _recover(out)
    accelerator.wait_for_everyone()
    current = out / CURRENT
    if (out / DAMAGED).exists() and not current.exists():
        raise ValueError(f"{out / DAMAGED} cannot be read and there is no other checkpoint: remove it to start over")
    return current if current.exists() else None


def recipe_of(folder: Path) -> dict:
    """Recipe of a checkpoint; those that do not name their precision were trained in bf16."""
    recipe = json.loads((folder / RECIPE).read_text())
    return {"precision": "bf16"} | {key: value for key, value in recipe.items() if key != "step"}


def step_of(out: Path) -> int | None:
    """The step after which the checkpoint was written that a training in `out` goes on from, without reading all of it; None where there
    is none."""
    for name in (NEW, CURRENT, OLD, *(path.name for path in reversed(numbered(out).values()))):
        try:
            if (out / name / FILES).is_file():
                return json.loads((out / name / RECIPE).read_text())["step"]
        except (OSError, ValueError, LookupError):
            continue
    return None


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two recipes, e.g. "learning_rate was 0.001 and is 0.0001". What one of them has not, as of an earlier release,
    counts only where it is no default."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if key in before or now[key] not in LATER.get(key, ())]
        return [text for key in keys for text in differences(before.get(key), now.get(key), key)]
    return [] if before == now else [f"{name} was {cut(str(before))} and is {cut(str(now))}"]


def load(accelerator: Accelerator, folder: Path, recipe: dict) -> None:
    """Give the accelerator what `write` has saved.

    Raises:
        ValueError: it is of another training, or cannot be read.
    """
    if differing := differences(recipe_of(folder), json.loads(json.dumps(recipe))):
        raise ValueError(
            f"{folder.parent} holds a training with other settings ({'; '.join(differing[:3])}): choose another --out, or the same settings"
        )
    try:
        accelerator.load_state(folder)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{folder} cannot be read ({reason}): remove it to start over") from error


def replace_folder(new: Path, folder: Path) -> None:
    """Put the folder `new`, which is whole, in the place of another."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    _swap(new, folder, old)
    shutil.rmtree(old, ignore_errors=True)


def trim_log(path: Path, step: int) -> None:
    """Drop the entries of steps after `step`, which will be done again, and a line that was cut."""
    if not path.is_file():
        return
    entries = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                entries.append(f"{line}\n")
        except (ValueError, KeyError, TypeError):
            continue
    part = path.with_suffix(".part")
    part.write_text("".join(entries))
    part.replace(path)


def _swap(new: Path, current: Path, old: Path) -> None:
    if current.exists():
        current.rename(old)
    new.rename(current)


def _recover(out: Path) -> None:
    new, current, old = out / NEW, out / CURRENT, out / OLD
    if new.exists() and damage(new) is None:
        shutil.rmtree(old, ignore_errors=True)
        _swap(new, current, old)
    if current.exists() and (reason := damage(current)):
        shutil.rmtree(out / DAMAGED, ignore_errors=True)
        current.rename(out / DAMAGED)
        has_previous = previous(out) is not None
        then = "; the training goes on from the checkpoint before" if has_previous else ""
        logger.warning("%s is damaged (%s) and put aside as %s%s", current, reason, DAMAGED, then)
    if not current.exists() and (before := previous(out)) is not None:
        before.rename(current)


def previous(out: Path) -> Path | None:
    """The newest whole checkpoint before the present one; None where there is none."""
    candidates = [out / OLD, *reversed(numbered(out).values())]
    return next((path for path in candidates if path.exists() and damage(path) is None), None)


def damage(folder: Path) -> str | None:
    """Describe what is damaged in a checkpoint; None where it is whole. One without a list of its files is whole with its recipe, which was
    written last."""
    name = FILES if (folder / FILES).is_file() else RECIPE
    try:
        manifest = json.loads((folder / name).read_text())
    except (OSError, ValueError):
        return f"{name} is missing or cut"
    for file, facts in manifest.items() if name == FILES else ():
        if not (folder / file).is_file():
            return f"{file} is missing"
        if _facts(folder / file) != facts:
            return f"{file} is cut or changed"
    return None


def _facts(path: Path, flush: bool = False) -> list[int]:
    """Size and CRC-32 of a file."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            crc, size = zlib.crc32(part, crc), size + len(part)
        if flush:
            os.fsync(file.fileno())
    return [size, crc]
