"""The folder of an evaluation: which run it belongs to, and when it is free again."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from argen.eval.run import processes
from argen.files import replacing
from argen.metadata import OTHER_WEIGHTS

logger = logging.getLogger(__name__)


def lock_run_dir(folder: Path, settings: dict) -> None:
    """Mark `folder` as the place of a run with `settings`.

    Raises:
        ValueError: another run is in it, or other files are.
    """
    state = processes()
    note = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if state.is_main_process:
        if note.exists():
            was = json.loads(note.read_text())
            changed = [key for key in settings | was if settings.get(key) != was.get(key)]
            if changed and all(_mended(was.get(key), settings.get(key)) for key in changed) and not _finished(folder):
                logger.warning("%s: the images were changed since, the run begins again", folder)
                _empty(folder)
                _write(note, settings)
            elif changed:
                others = " and ".join(_difference(key, was.get(key), settings.get(key)) for key in changed)
                raise ValueError(f"{folder} holds a run with {others}: choose another --out{_advice(changed)}")
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run of this kind: choose another --out")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _write(note, settings)
    state.wait_for_everyone()


def _difference(key: str, was: object, now: object) -> str:
    """What another setting is, in words."""
    words = {"model_weights": OTHER_WEIGHTS, "judge": "other weights of the judge", "prompts": "other prompts"}
    if key == "dtype" and was and now:
        return f"dtype {was}, not {now}"
    return words.get(key, f"another {key}")


def _advice(changed: list[str]) -> str:
    return ", or load the model as then" if set(changed) <= {"model_weights", "dtype"} else ""


def _write(note: Path, settings: dict) -> None:
    with replacing(note) as file:
        file.write(json.dumps(settings, indent=1).encode())


def _mended(was: object, now: object) -> bool:
    """Whether two settings are a set of images, [path, identity], before and after files of it were changed."""
    pair = isinstance(was, list) and isinstance(now, list) and len(was) == len(now) == 2
    return pair and was[0] == now[0]


def _finished(folder: Path) -> bool:
    return (folder / "report.json").exists()


def _empty(folder: Path) -> None:
    """Delete what an unfinished run made of a set of images."""
    for file in folder.glob("*.npy"):
        file.unlink()
    for name in ("samples", "free"):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def released_if_empty(folder: Path) -> Iterator[None]:
    """Where an error ends a run of which nothing is in `folder` yet, take away its mark, and the folder if it is new."""
    new, marked = not folder.exists(), (folder / "settings.json").exists()
    try:
        yield
    except Exception:
        files = [path for path in folder.rglob("*") if not path.is_dir()] if folder.is_dir() else []
        if not marked and processes().is_main_process and all(path == folder / "settings.json" for path in files):
            for path in [*files, *(path for path in sorted(folder.rglob("*"), reverse=True) if path.is_dir())]:
                path.unlink() if path in files else path.rmdir()
            if new and folder.is_dir():
                folder.rmdir()
        raise
