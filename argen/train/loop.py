"""The one training loop: accelerate, the machine's fast precision, EMA, exact resume, sample grids.

A *task* (`argen/train/<model>.py`) holds the networks, draws a batch for a step and says its losses; the loop does the
rest. Batches are drawn from (seed, step) alone, so that a run that was stopped goes on exactly as if it had not been. Each of several
processes draws the whole batch and takes its part, so that they train as one process would.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from argen.device import fast_dtype, pick
from argen.files import naming
from argen.processes import processes
from argen.train import checkpoints, tracking
from argen.train.muon import FloatMuon
from argen.train.sharding import Averages, WholeCopy, check_shards, is_sharded, trained

LOG_EVERY = 10  # steps between lines of the log; those of `Training.evaluate` have scores, too


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: one for `cpu` (two cores with bf16 units), one for `gpu` (one H100).

    Attributes:
        batch_size: of all processes together.
        micro_batch: samples of one forward and backward pass of a process, whose gradients are added up; None for all at once.
        warmup: steps in which the learning rate rises.
        hold: share of the steps before it declines.
        decline: what it does after that: "cosine" or "linear", down to the share `floor` of it, or "constant".
        decayed: which parameters decay: "all", or "matrices", which have two axes or more.
        clip: what `grad_clip` bounds: the "norm" of the gradients, or each "value".
        ema_decay: of the averaged weights; 0 for those of the last step.
        ema_warmup: the first steps count less, for short runs.
        muon: train the matrices of the hidden layers with Muon, at the same rate.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 300
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    muon: bool = False
    hold: float = 0.0
    decline: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.02
    decayed: Literal["all", "matrices"] = "all"
    clip: Literal["norm", "value"] = "norm"
    ema_warmup: bool = True
    micro_batch: int | None = None

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        progress = min(1.0, max(0.0, step / self.steps - self.hold) / (1 - self.hold))
        cosine = 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item())
        left = {"cosine": cosine, "linear": 1 - progress, "constant": 1.0}[self.decline]
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.learning_rate * rise * (self.floor + (1 - self.floor) * left)


class Task(Protocol):
    networks: dict[str, nn.Module]  # "model" is the one that is averaged, evaluated and shipped
    extra_state: tuple[nn.Module, ...] = ()  # further modules that a checkpoint saves
    options: dict[str, str] = {}  # what was chosen beside the schedule
    shards: bool = False  # whether it only calls its one network, which may then be in shards, and scores a copy of it
    total: int = 0  # steps of the schedule; the loop sets it

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What is drawn by chance for a step: tensors whose first axis are the samples."""

    def read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A part of a batch, with what has to be read for it."""
        return batch

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        """Yields (network, loss) pairs, each the mean of the samples; the network takes an optimizer step before the next pair is asked for."""

    def evaluate(self) -> dict[str, float]:
        """Scores on held-out data, with the averaged weights in place."""

    def sample(self) -> Image.Image:
        """A picture to look at."""

    def save(self, folder: Path) -> None:
        """Write what ships."""

    def use(self, network: nn.Module) -> None:
        """Score, sample and save with this network, a copy of the one that is trained, or with that again."""
        self.networks["model"] = network

    def _model(self) -> nn.Module:
        """The network itself, also where training has wrapped it."""
        return getattr(self.networks["model"], "module", self.networks["model"])


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 32) + step)


def optimizers_of(network: nn.Module, schedule: Schedule, precision: str = "bf16") -> list[torch.optim.Optimizer]:
    """AdamW; with `schedule.muon`, Muon (arXiv 2502.16982) for the matrices that are no embedding, AdamW for the others.

    Muon's steps are scaled to the size of AdamW's, so that one learning rate serves both; torch computes them in bfloat16, and
    they are computed in float32 where training is.
    """
    rate, decay = schedule.learning_rate, schedule.weight_decay
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    learned = trained(network)
    matrices = [p for p in learned if schedule.muon and p.ndim == 2 and id(p) not in embeddings]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in learned if id(p) not in matrix_ids]
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": decay}]
    if schedule.decayed == "matrices":
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=schedule.betas)
    ]
    if matrices:
        muon = torch.optim.Muon if precision == "bf16" else FloatMuon
        optimizers.append(muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def short_attention(device: torch.device) -> AbstractContextManager:
    """For sequences of some 64 tokens: on a CPU plain matrix products train faster than the fused kernel. It holds for all threads, so for a
    whole training, or what is read ahead would depend on when."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@dataclass(frozen=True)
class Recipe:
    """What `argen train NAME` runs.

    Attributes:
        task: called with the folder of images, then with what it `takes`.
        schedules: by setting, "cpu" and "gpu".
        takes: "scenes", "clip", "tokenizer", "vae" or "generator" (folders), "total" (steps of the schedule), "x" (see
            `argen.train.xar.XARTask`).
        needs_data: whether it learns from a folder of images; if not, `task` is not called with one.
        start: the model that "generator" is.
        tokenizer: the model that "tokenizer" is.
    """

    task: Callable[..., Task]
    schedules: dict[str, Schedule]
    takes: tuple[str, ...] = ()
    needs_data: bool = True
    start: str | None = None
    tokenizer: str = "emoji-vitvqgan"


class Training:
    """A task in training, at the last checkpoint of its folder if there is one; see `train`."""

    def __init__(
        self, task: Task, schedule: Schedule, out: Path, seed: int, precision: str | None, tracker: str | None = None
    ):
        out.mkdir(parents=True, exist_ok=True)
        set_seed(seed)
        checkpoint = checkpoints.find(processes(), out)
        precision = precision or _precision(checkpoint)
        AcceleratorState._reset_state()  # an earlier training of this process may have had another precision
        mixed = "bf16" if precision == "bf16" else "no"
        self.accelerator = Accelerator(mixed_precision=mixed, log_with=tracker, project_dir=out)
        check_shards(self.accelerator, task.networks, task.shards, schedule.muon)
        slower = precision == "bf16" and _fast_precision() == "fp32"
        note = " (as it began; this machine is faster in fp32)" if slower else ""
        self.accelerator.print(f"{out.name}: training in {precision} on {self.accelerator.device}{note}")
        settings = {"seed": seed, "networks": list(task.networks), "options": task.options}
        shards = {"shards": True} if is_sharded(self.accelerator) else {}  # whose checkpoints are others
        self.recipe = {"precision": precision, "schedule": asdict(schedule), **settings, **shards}
        self.task, self.schedule, self.out, self.seed = task, schedule, out, seed
        task.total = schedule.steps
        self.prepare(precision, checkpoint)
        tracking.begin(self.accelerator, out, self.recipe, self.progress.step)
        self.log: dict[str, float] = {}
        self.reader = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future] | None = None  # the next step's batch, which is read while this one is learned
        self.started = time.time()

    def prepare(self, precision: str, checkpoint: Path | None) -> None:
        """Make the optimizers and the averaged weights, and load the checkpoint."""
        accelerator, networks = self.accelerator, self.task.networks
        optimizers = {name: optimizers_of(network, self.schedule, precision) for name, network in networks.items()}
        copied = accelerator.is_main_process and is_sharded(accelerator)
        self.copy = WholeCopy(networks["model"], copied)
        self.task.networks, self.optimizers = {}, {}
        for name, network in networks.items():
            self.task.networks[name], *self.optimizers[name] = accelerator.prepare(network, *optimizers[name])
        self.model = accelerator.unwrap_model(self.task.networks["model"])
        decay, warmup = self.schedule.ema_decay, self.schedule.ema_warmup
        least, after = (0.0, 0) if warmup else (decay, -1)  # of all steps alike
        self.ema = Averages(trained(self.model), decay, least, after, use_ema_warmup=warmup, power=0.75)
        self.ema.to(accelerator.device)
        self.progress = Progress()
        accelerator.register_for_checkpointing(self.ema, self.progress, *self.task.extra_state)
        if checkpoint:
            checkpoints.load(accelerator, checkpoint, self.recipe)
        if accelerator.is_main_process:
            checkpoints.trim_log(self.out / "log.jsonl", self.progress.step)
            if checkpoint:
                accelerator.print(f"{self.out.name}: goes on from step {self.progress.step}")

    def step(self, last: bool = False) -> None:
        """One step of every network: on each its loss on every part of the batch, then its optimizers.

        Args:
            last: the batch of no further step is read ahead.
        """
        accelerator, step, size = self.accelerator, self.progress.step, self.schedule.batch_size
        parts = self.ahead[1].result() if self.ahead and self.ahead[0] == step else self.read(step)
        self.ahead = None if last else (step + 1, self.reader.submit(self.read, step + 1))
        losses, logs = [], []
        for part, count in parts:
            part = {key: value.to(accelerator.device) for key, value in part.items()}
            logs.append((count, {}))
            losses.append(self.task.losses(part, step, logs[-1][1]))
        while (
            name := self._backward(losses, [count * accelerator.num_processes / size for _, count in parts])
        ) is not None:
            norm = self._clip(self.task.networks[name])
            if norm is not None and name == "model":
                self.log["gradient norm"] = norm
            for optimizer in self.optimizers[name]:
                for group in optimizer.param_groups:
                    group["lr"] = self.schedule.rate(step)
                optimizer.step()
            self.task.networks[name].zero_grad()
        for key in logs[0][1]:
            self.log[key] = sum(count * log[key] for count, log in logs) / sum(count for count, _ in logs)
        self.ema.step(trained(self.model))
        self.progress.step += 1

    def read(self, step: int) -> list[tuple[dict[str, Tensor], int]]:
        """The parts of the batch of a step that this process takes, with what has to be read for them, and how many samples each has."""
        batch = self.task.batch(self.schedule.batch_size, step_generator(self.seed * 1000, step))
        return [(self.task.read(part), count) for part, count in self.parts(batch)]

    def parts(self, batch: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], int]]:
        """The parts of a batch that this process takes, one after the other, and how many samples each has."""
        size, rank, processes = self.schedule.batch_size, self.accelerator.process_index, self.accelerator.num_processes
        first, last = size * rank // processes, size * (rank + 1) // processes
        for start in range(first, last, self.schedule.micro_batch or size):
            end = min(start + (self.schedule.micro_batch or size), last)
            whole = end - start == size
            yield (batch if whole else {key: value[start:end] for key, value in batch.items()}), end - start

    def _backward(self, losses: list[Iterator[tuple[str, Tensor]]], shares: list[float]) -> str | None:
        """Add up the gradients of the parts' next losses -> the network they are of; None where there are no more."""
        name = None
        for index, (part, share) in enumerate(zip(losses, shares, strict=True)):
            with ExitStack() as unsynced:  # around the forward pass, too, or each part is
                for network in self.task.networks.values() if index < len(losses) - 1 else ():
                    unsynced.enter_context(self.accelerator.no_sync(network))
                if (item := _next(part, self.accelerator)) is None:
                    return None
                name, loss = item
                self.accelerator.backward(loss * share if share != 1 else loss)
        return name

    def _clip(self, network: nn.Module) -> float | None:
        """Bound the gradients -> their norm before, where that is what is bounded."""
        if self.schedule.clip == "value":
            self.accelerator.clip_grad_value_(network.parameters(), self.schedule.grad_clip)
            return None
        return float(self.accelerator.clip_grad_norm_(network.parameters(), self.schedule.grad_clip))

    def evaluate(self) -> dict[str, float]:
        """Write a sample and a line of the log; gives the scores, none in processes other than the first."""
        if self.ahead:
            self.ahead[1].exception()  # what is measured may use the parts that are read with: one after the other
        with self.averaged() as ready:
            if not ready:
                return {}
            scores = self.task.evaluate()
            sheet = self.task.sample()
        sheet.save(self.out / f"sample-{self.progress.step:06d}.png")
        tracking.show(self.accelerator, sheet, self.progress.step)
        entry = self.write_log(scores)
        tqdm.write(json.dumps({key: round(value, 4) for key, value in entry.items()}))
        return scores

    @contextmanager
    def averaged(self) -> Iterator[bool]:
        """Meanwhile the task has the averaged weights in the first process -> whether this is the first."""
        first = self.accelerator.is_main_process
        if not is_sharded(self.accelerator):
            with _averaged(self.model, self.ema) if first else nullcontext():
                yield first
            return
        own, network = self.task.networks["model"], self.copy.fill(self.ema, self.accelerator.device)
        if network is not None:
            self.task.use(network)
        yield first
        self.task.use(own)
        self.copy.release()

    def write_log(self, scores: dict[str, float]) -> dict[str, float]:
        """Add a line to the log -> what it says."""
        step, rate = self.progress.step, self.schedule.rate(max(0, self.progress.step - 1))
        entry = {"step": step, "seconds": time.time() - self.started, "rate": rate, **self.log, **scores}
        if self.accelerator.is_main_process:
            with (self.out / "log.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.accelerator.log({key: value for key, value in entry.items() if key != "step"}, step=step)
        return entry

    def finish(self, scores: dict[str, float]) -> dict[str, float]:
        """Write what ships; gives the scores, measured now if there are none."""
        with self.averaged() as ready:
            if ready:
                scores = scores or self.task.evaluate()  # where there was nothing left to do
                shutil.rmtree(self.out / "final.new", ignore_errors=True)
                with naming(self.out / "final"):
                    self.task.save(self.out / "final.new")
                checkpoints.replace_folder(self.out / "final.new", self.out / "final")
        tracking.end(self.accelerator)
        return scores


def train(
    task: Task,
    schedule: Schedule,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    checkpoint_every: int = 500,
    evaluate_every: int = 1000,
    precision: str | None = None,
    keep: int = 1,
    tracker: str | None = None,
) -> dict[str, float]:
    """Train until ``schedule.steps`` (or `steps`), resuming from the last checkpoint in `out`; returns the last scores.

    Writes ``out/checkpoint`` (everything needed to go on, see `checkpoints`), ``out/log.jsonl``, ``out/sample-<step>.png`` and,
    at the end, ``out/final`` with the averaged weights.

    Args:
        keep: how many checkpoints are kept, the last ones.
        tracker: name of one of accelerate's that gets the log and the samples, too; None for none.
        precision: "bf16" (mixed) or "fp32"; None for that of the checkpoint, or without one the faster one here.
    """
    training = Training(task, schedule, out, seed, precision, tracker)
    progress, scores = training.progress, {}
    end = min(steps or schedule.steps, schedule.steps)
    hidden = not training.accelerator.is_main_process
    with (
        short_attention(training.accelerator.device),
        tqdm(initial=progress.step, total=end, desc=out.name, disable=hidden) as bar,
    ):
        while progress.step < end:
            training.step(last=progress.step + 1 == end)
            bar.update()
            if progress.step % 20 == 0:
                bar.set_postfix({key: f"{value:.4g}" for key, value in training.log.items()})
            if progress.step % evaluate_every == 0 or progress.step == end:
                scores = training.evaluate()
            elif progress.step % LOG_EVERY == 0:
                training.write_log({})
            if progress.step % checkpoint_every == 0 or progress.step == end:
                checkpoints.write(training.accelerator, out, training.recipe, progress.step, keep)
    return training.finish(scores)


def _precision(begun: Path | None) -> str:
    """That of a checkpoint, which goes on exactly as it began, also on another machine; without one the faster one here."""
    if begun:
        return checkpoints.recipe_of(begun)["precision"]
    return _fast_precision()


def _fast_precision() -> str:
    return "bf16" if fast_dtype(pick(None)) == torch.bfloat16 else "fp32"


def _next(losses: Iterator[tuple[str, Tensor]], accelerator: Accelerator) -> tuple[str, Tensor] | None:
    with accelerator.autocast():
        return next(losses, None)


@contextmanager
def _averaged(model: nn.Module, ema: EMAModel) -> Iterator[None]:
    ema.store(trained(model))
    ema.copy_to(trained(model))
    model.eval()
    yield
    model.train()
    ema.restore(trained(model))


class Progress:
    """The step count, kept with the checkpoint."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
