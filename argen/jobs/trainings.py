"""Trainings that run beside the page: each is a process of `argen train` and a folder, from which everything that is shown is read.

A folder has the settings (``training.json``), the images where they were uploaded, what the process prints (``output.log``), and what
`argen.train.loop.train` writes. It is locked while its process runs, so that a page that was started again knows.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import filelock

from argen.command import missing
from argen.files import replacing
from argen.hub.cards import all_cards
from argen.jobs.access import ModelAccess
from argen.registry import pipelines
from argen.train import checkpoints
from argen.words import cut
from samplers.errors import InvalidValue

MINI = "mini"  # in the place of a model to start from: a new small network
PARTS = {  # recipe -> what a new small network reads, None where there is no such network
    "llamagen": {"tokenizer": "argen/emoji-vitvqgan", "text_encoder": "argen/emoji-clip"},
    "parti": {"tokenizer": "argen/emoji-vitvqgan", "text_encoder": "argen/emoji-clip"},
    "xar": {"tokenizer": "argen/emoji-vae", "text_encoder": "argen/emoji-clip"},
    "flexar": {"tokenizer": "argen/emoji-flextok", "text_encoder": "argen/emoji-clip"},
    "seed-lm": None,
}
MODULES = {"seed-lm": "seed_llama"}  # recipe -> module of its pipeline, where they have other names
RUNNING, STOPPING, FINISHED, STOPPED, FAILED = "running", "stopping", "finished", "stopped", "failed"
NAME = r"\w[\w.+-]{0,59}"
MOST_STEPS = 1_000_000
SETTINGS, OUTPUT, LOG, LOCK, IMAGES = "training.json", "output.log", "log.jsonl", "running.lock", "images.zip"
ATTACHED = "ARGEN_ATTACHED"  # variable of the environment of a process that `attach` concerns
TAIL = 20_000  # bytes of the output that are looked at
UNWINDING = 60  # seconds that a process without a server has to end by itself


@dataclass(frozen=True)
class Plan:
    """What a training is asked with; the rest is left to the recipe.

    Attributes:
        images: a folder or a .zip.
        init: model to start from with a LoRA of the rank `lora`, or `MINI`.
        every: steps between scores, sample sheets and checkpoints.
    """

    recipe: str
    images: str
    init: str
    steps: int
    lora: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    every: int = 10

    def arguments(self, init: str) -> list[str]:
        """Those of `argen train` but --out.

        Args:
            init: what `argen.load` takes for the attribute of this name.
        """
        new = {"size": MINI} | (PARTS[self.recipe] or {})
        options = {"images": self.images} | (new if self.init == MINI else {"init": init, "lora": self.lora})
        options |= {"steps": self.steps, "batch_size": self.batch_size, "learning_rate": self.learning_rate}
        options |= {"evaluate_every": self.every}
        given = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
        return [self.recipe, *(f"--{name}={value}" for name, value in given.items())]


@dataclass(frozen=True)
class State:
    """A training as its folder shows it.

    Attributes:
        log: what the loop has logged, see `argen.train.loop.train`.
        left: seconds to the end, None while unknown.
        kept: step of the checkpoint that it goes on from, None where there is none.
        error: last line of what a failed one has printed.
        sample: the newest sample sheet.
    """

    name: str
    plan: Plan
    status: str
    log: list[dict]
    left: float | None
    kept: int | None
    error: str
    sample: Path | None

    @property
    def step(self) -> int:
        return self.log[-1]["step"] if self.log else 0


class Trainings:
    """The trainings in a folder, of which one runs at a time.

    Args:
        models: access to the models that they start from, and to what they make.
    """

    def __init__(self, models: ModelAccess):
        self.models, self.folder = models, models.trainings
        self.lock = threading.RLock()
        self.current: tuple[str, subprocess.Popen] | None = None  # the latest that was started here
        self.stopping = False

    def names(self) -> list[str]:
        """The newest first."""
        files = {file: file.stat().st_mtime for file in self.folder.glob(f"[!.]*/{SETTINGS}")}
        return [file.parent.name for file in sorted(files, key=lambda file: -files[file])]

    def shipped(self, recipe: str) -> list[str]:
        """Models that a recipe can start from, of those that ship."""
        module = f"argen.pipelines.{MODULES.get(recipe, recipe)}:"
        generators = [card for card in all_cards().values() if card.kind == "generator" and card.ships]
        return [card.id for card in generators if card.target.startswith(module)]

    def starts(self, recipe: str) -> list[str]:
        """Also those that were trained, and those in the folders of models."""
        module = f"argen.pipelines.{MODULES.get(recipe, recipe)}:"
        kind = next(name for name, target in pipelines.built_in.items() if target.startswith(module))
        return self.shipped(recipe) + self.models.saved(kind)

    def start(self, name: str, plan: Plan, upload: Path | None = None) -> None:
        """Begin a training; its folder is made.

        Args:
            upload: a .zip, which is copied, in the place of the plan's images.

        Raises:
            ValueError: a name that is taken or none; a setting that is out of bounds; another one runs.
            FileNotFoundError, UnknownModel: there are no images, or there is no such model; see `look`.
        """
        check_name(name)
        self.check(plan)
        images = Path(plan.images if upload is None else upload)
        check_fits(plan, look(images), plan.init != MINI and self.models.draws_classes(plan.init))
        with self.lock:
            self._check_free()
            folder = self.folder / name
            try:
                folder.mkdir(mode=0o700, parents=True)
            except FileExistsError:
                raise InvalidValue(f"there is a training {name}: choose another name, or delete it", "name") from None
            try:
                if upload is not None:
                    shutil.copyfile(upload, folder / IMAGES)
                plan = replace(plan, images=IMAGES if upload else str(images.resolve()))
                with replacing(folder / SETTINGS) as file:
                    file.write(json.dumps(asdict(plan), indent=2).encode())
                self._run(name, plan)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

    def resume(self, name: str) -> None:
        """Go on with a training that was stopped or failed. Raises as `start` does."""
        with self.lock:
            state = self.state(name)
            if state.status not in (STOPPED, FAILED):
                raise ValueError(f"the training {name} is {state.status}: only one that was stopped can be resumed")
            self._check_free()
            self._run(name, state.plan)

    def stop(self, name: str) -> None:
        """End the process of a training; what its last checkpoint has is kept. A second time it ends at once.

        Raises:
            ValueError: it does not run.
        """
        with self.lock:
            if self.current is None or self.current[0] != name or self.current[1].poll() is not None:
                raise ValueError(f"the training {name} does not run: there is nothing to stop")
            process = self.current[1]
            process.kill() if self.stopping else process.terminate()
            self.stopping = True

    def delete(self, name: str, typed: str) -> None:
        """Delete the folder of a training with what it has made.

        Args:
            typed: its name again.

        Raises:
            ValueError: it runs, or another name was typed.
        """
        with self.lock:
            if self.state(name).status in (RUNNING, STOPPING):
                raise ValueError(f"the training {name} runs: stop it first")
            if typed.strip() != name:
                raise InvalidValue(f"the name is {cut(repr(typed))}: type {name} to delete this training", "name")
            gone = self.folder / f".{name}.deleted"
            shutil.rmtree(gone, ignore_errors=True)
            (self.folder / name).rename(gone)
            shutil.rmtree(gone)
            if forget := getattr(self.models.load, "forget", None):
                forget(str(self.folder / name / "final"))  # another one may get its name

    def state(self, name: str) -> State:
        """Read what a training is at.

        Raises:
            ValueError: there is none of this name.
        """
        folder = self.folder / name
        try:
            check_name(name)
            plan = Plan(**json.loads((folder / SETTINGS).read_text()))
        except (OSError, ValueError, TypeError):
            raise ValueError(f"there is no training {cut(name)!r}: choose one of the list") from None
        log = read_log(folder / LOG)
        sheets = [sheet for entry in log if (sheet := folder / f"sample-{entry['step']:06d}.png").is_file()]
        status, error = self._status(name)
        left = time_left(log, plan.steps, folder / LOG) if status == RUNNING else None
        kept = None if status == FINISHED else checkpoints.step_of(folder)
        return State(name, plan, status, log, left, kept, error, sheets[-1] if sheets else None)

    def check(self, plan: Plan) -> None:
        """Raises:
        ValueError, UnknownModel: settings out of bounds, a recipe or a model that there is none of, or peft is missing.
        """
        from argen.train.own.options import OwnOptions

        if plan.recipe not in PARTS:
            raise InvalidValue(f"recipe is {cut(plan.recipe)}: expected one of {', '.join(PARTS)}", "recipe")
        if not isinstance(plan.steps, int) or not 1 <= plan.steps <= MOST_STEPS:
            raise InvalidValue(f"steps is {cut(plan.steps)}: expected a whole number from 1 to {MOST_STEPS:,}", "steps")
        if plan.init == MINI and PARTS[plan.recipe] is None:
            raise InvalidValue(f"{plan.recipe} trains no new small network: choose a model to start from", "init")
        if plan.init != MINI:
            self.models.check(plan.init)
            if plan.lora is None:
                raise InvalidValue("lora is missing: expected a rank from 1 to 256, as 16", "lora")
            check_peft()
        OwnOptions(plan.images, lora=plan.lora, batch_size=plan.batch_size, learning_rate=plan.learning_rate)

    def _check_free(self) -> None:
        """Raises a ValueError where a training runs."""
        if running := next((name for name in self.names() if self._runs(name)), None):
            raise ValueError(f"the training {running} runs, and one runs at a time: stop it, or wait for its end")

    def _runs(self, name: str) -> bool:
        if self.current is not None and self.current[0] == name:
            return self.current[1].poll() is None
        lock = self.folder / name / LOCK
        if not lock.exists():
            return False
        try:
            with filelock.FileLock(lock, timeout=0):
                return False
        except filelock.Timeout:
            return True

    def _status(self, name: str) -> tuple[str, str]:
        """Also the error of one that failed."""
        folder = self.folder / name
        if self._runs(name):
            ours = self.current is not None and self.current[0] == name and not self.stopping
            return RUNNING if ours else STOPPING, ""
        if (folder / "final").is_dir():
            return FINISHED, ""
        said = _last_lines(folder / OUTPUT)
        last = said[-1] if said else ""
        if ": error: " in last or any(line.startswith("Traceback (most") for line in said):
            return FAILED, last.partition(": error: ")[2] or last
        ended = self.current[1].returncode if self.current is not None and self.current[0] == name else 0
        if ended == -9 and not self.stopping:  # SIGKILL
            return FAILED, "the system has ended it, as it does where memory is short: try a smaller batch"
        return STOPPED, ""

    def _run(self, name: str, plan: Plan) -> None:
        """Start the process of a training, whose standard input ends with this one."""
        folder = self.folder / name
        init = plan.init if plan.init == MINI else self.models.check(plan.init)
        plan = replace(plan, images=str((folder / plan.images).resolve()))
        command = [sys.executable, "-m", "argen", "train", *plan.arguments(init), f"--out={folder.resolve()}"]
        environment = os.environ | {ATTACHED: "1", "TQDM_MININTERVAL": "10", "PYTHONUNBUFFERED": "1"}
        with (folder / OUTPUT).open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        self.current, self.stopping = (name, process), False


def attach(folder: Path, environment: dict[str, str] | os._Environ = os.environ) -> filelock.FileLock | None:
    """Where a page has started this process: lock the folder of its training as long as it lives, leave others the processor first, and end
    with that page. Elsewhere do nothing.

    Raises:
        ValueError: another process trains in the folder.
    """
    if ATTACHED not in environment:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, timeout=UNWINDING)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"another process trains in {folder}: wait for its end") from None
    with suppress(AttributeError, OSError):
        os.nice(5)

    def wait() -> None:
        with suppress(OSError):
            while os.read(0, 1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(UNWINDING)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, name="argen page", daemon=True).start()
    return lock


def look(images: Path):
    """The images at a path, checked; `str` of its report is what is shown.

    Raises:
        FileNotFoundError, ValueError: see `argen.train.sources.open_source`; they have neither classes nor captions.
    """
    from argen.train.own.tokens import check_conditions
    from argen.train.sources import open_source

    source = open_source(images)
    check_conditions(source)
    return source


def check_fits(plan: Plan, source, by_class: bool = False) -> None:
    """Check that what is trained can learn what the images have, as the process of the training does later.

    Args:
        by_class: whether the model that it starts from draws classes alone.

    Raises:
        ValueError: it cannot, or no LoRA can.
    """
    by_captions = not by_class and (plan.recipe in ("parti", "seed-lm") or plan.init != MINI)
    if source.classes is not None and by_captions:
        what = "Parti" if plan.init == MINI else plan.init
        raise ValueError(
            f"the images have classes, and {what} reads captions: put a .txt file beside each image, or train a new small "
            "network of another recipe"
        )
    if plan.init != MINI:
        from argen.train.own.start import check_conditions_of

        check_conditions_of(plan.init, by_class, source.classes is not None, plan.lora)


def check_name(name: str) -> None:
    """Raises:
    InvalidValue: a training or a folder cannot have this name.
    """
    if not name:
        raise InvalidValue("the training has no name: type one", "name")
    if not re.fullmatch(NAME, name):
        raise InvalidValue(f"the name is {cut(repr(name))}: expected at most 60 letters, digits, - and _", "name")


def check_peft(find: Callable[[str], object] = find_spec) -> None:
    """Raises:
    ValueError: peft, which trains LoRA, is not installed.
    """
    if find("peft") is None:
        raise ValueError(missing(ModuleNotFoundError(name="peft")))


def read_log(path: Path) -> list[dict]:
    """The entries of a log; a line that is being written is left out."""
    entries = []
    with suppress(OSError):
        for line in path.read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                entries.append(entry | {"step": int(entry["step"]), "seconds": float(entry["seconds"])})
    return entries


def time_left(log: list[dict], steps: int, path: Path) -> float | None:
    """Seconds that the other steps take at the pace of the last ones of the same process; None while unknown."""
    last = log[-1] if log else None
    begun = next((i for i in range(len(log) - 1, 0, -1) if log[i]["seconds"] < log[i - 1]["seconds"]), 0)
    run = log[max(begun, len(log) - 30) :]
    first = run[0] if len(run) > 1 else {"step": 0, "seconds": 0.0}
    if last is None or (begun and len(run) < 2):
        return None
    pace = (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"])
    since = time.time() - path.stat().st_mtime if path.is_file() else 0.0
    return max(0.0, pace * (steps - last["step"]) - max(0.0, since))


def _last_lines(path: Path) -> list[str]:
    """The last lines of what a process has printed, without the progress that it wrote over."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for part in text.split("\n") if (line := part.rsplit("\r", 1)[-1].strip())]
