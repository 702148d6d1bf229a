"""Trainings that are killed: the next run goes on from the newest whole checkpoint, and `final` is always written."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from argen.train.loop import Schedule, Task, train

SCHEDULE = Schedule(steps=12, batch_size=2, learning_rate=1e-2, warmup=2)
FILES = ("model.safetensors", "optimizer.bin", "recipe.json", "custom_checkpoint_0.pkl", "files.json")


class Tiny(Task):
    """A matrix that learns the identity."""

    extra_state, options = (), {}

    def __init__(self):
        torch.manual_seed(0)
        self.networks = {"model": nn.Linear(3, 3)}

    def batch(self, size, generator):
        return {"x": torch.randn(size, 3, generator=generator)}

    def losses(self, batch, step, log):
        loss = (self.networks["model"](batch["x"]) - batch["x"]).square().mean()
        log["loss"] = loss.item()
        yield "model", loss

    def evaluate(self):
        return {"norm": self.networks["model"].weight.norm().item()}

    def sample(self):
        return Image.new("RGB", (2, 2))

    def save(self, folder):
        folder.mkdir()
        save_file(self.networks["model"].state_dict(), folder / "model.safetensors")


def run(out: Path, steps: int | None = None, keep: int = 1) -> dict[str, float]:
    often = {"checkpoint_every": 2, "evaluate_every": 4, "keep": keep}
    return train(Tiny(), SCHEDULE, out, steps=steps, **often, precision="fp32")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbed: its folder and its scores."""
    out = tmp_path_factory.mktemp("straight") / "out"
    return out, run(out)


def same(out: Path, straight: Path) -> bool:
    ours, theirs = (load_file(folder / "final/model.safetensors") for folder in (out, straight))
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    once = steps == sorted(set(steps)) and {4, 8, 12} <= set(steps)  # also the last of a run that was asked for fewer
    return once and all(torch.equal(ours[key], theirs[key]) for key in theirs)


class Killed(BaseException):
    pass


def killed_at(monkeypatch, moment: int) -> None:
    """End the run at the `moment`-th time that it moves, deletes or writes folders: half way through, where there is one."""
    count = 0

    def counted(function, half=None):
        def call(first, *args, **kwargs):
            nonlocal count
            count += 1
            if count == moment:
                if half:
                    half(Path(args[0] if isinstance(first, Accelerator) else first), lambda: function(first, *args))
                raise Killed
            return function(first, *args, **kwargs)

        return call

    def half_deleted(folder: Path, whole) -> None:
        for file in list(folder.rglob("*"))[::2] if folder.exists() else ():
            file.unlink()

    def half_written(folder: Path, whole) -> None:
        whole()
        (folder / "optimizer.bin").write_bytes(b"PK")

    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree, half_deleted))
    monkeypatch.setattr(Accelerator, "save_state", counted(Accelerator.save_state, half_written))


@pytest.mark.parametrize(("done", "keep"), [(4, 1), (12, 1), (6, 2)])
def test_a_kill_between_any_two_changes_of_folders_loses_one_checkpoint_at_most(
    tmp_path, straight, monkeypatch, done, keep
):
    """`done`: the steps of the run before the one that is killed."""
    for moment in range(1, 60):
        out = tmp_path / f"{moment}"
        run(out, steps=done, keep=keep)
        try:
            with monkeypatch.context() as patch:
                killed_at(patch, moment)
                run(out, steps=done + 2, keep=keep)
        except Killed:
            assert run(out, keep=keep) == straight[1]
            assert same(out, straight[0])
            assert keep == 1 or {path.name for path in out.glob("checkpoint*")} == {"checkpoint", "checkpoint-000010"}
            assert (out / "sample-000012.png").is_file()
            shutil.rmtree(out)
        else:
            break
    assert moment > (3 if done == 12 else 8)


def test_a_run_between_the_two_renames_goes_on_from_the_newer(tmp_path, straight, monkeypatch):
    run(tmp_path / "out", steps=6)
    (tmp_path / "out/checkpoint").rename(tmp_path / "out/checkpoint.new")
    seen, original = [], Tiny.batch
    monkeypatch.setattr(Tiny, "batch", lambda self, size, generator: seen.append(1) or original(self, size, generator))
    assert run(tmp_path / "out") == straight[1]
    assert len(seen) == 6
    assert same(tmp_path / "out", straight[0])


def test_final_is_written_when_asked_again(tmp_path, straight):
    run(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/final")
    assert run(tmp_path / "out") == straight[1]
    assert same(tmp_path / "out", straight[0])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["cut", "missing", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, straight, caplog, name, kind):
    out = tmp_path / "out"
    run(out, steps=6)
    damage(out / "checkpoint" / name, kind)
    with caplog.at_level(logging.WARNING):
        assert run(out) == straight[1]
    assert same(out, straight[0])
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("argen")]
    if (name, kind) != ("files.json", "missing"):  # then the rest is whole
        assert len(messages) == 1
        assert "is damaged" in messages[0]
        assert "the training goes on from the checkpoint before" in messages[0]
    assert all("\n" not in line for line in messages)


def damage(path: Path, kind: str) -> None:
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if kind == "cut" else b"")


@pytest.mark.parametrize("listed", [True, False])
def test_without_another_checkpoint_a_damaged_one_is_refused_in_one_line(tmp_path, listed):
    """Also one of before checkpoints had lists of their files."""
    out = tmp_path / "out"
    run(out, steps=2)
    if not listed:
        (out / "checkpoint/files.json").unlink()
    damage(out / "checkpoint/optimizer.bin", "cut")
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be read.*remove it to start over") as refused:
            run(out)
        assert "\n" not in str(refused.value)


CHILD = """
import random, sys, time, os, signal
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_kills
rng, out, kills, early, whole = random.Random(7), Path(sys.argv[2]), -1, 0, 60.0
while kills < 30:
    started, child = time.monotonic(), os.fork()
    if child == 0:
        import test_kills
        test_kills.torch.set_num_threads(1)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        test_kills.run(out)
        os._exit(0)
    kills += 1
    if kills == 0:  # the first is left alone, to know how long a run takes here
        os.waitpid(child, 0)
        whole = time.monotonic() - started
        test_kills.shutil.rmtree(out)
        continue
    time.sleep(rng.uniform(0.0, whole))
    os.kill(child, signal.SIGKILL)
    early += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    if (out / "final").exists() and rng.random() < 0.3:
        test_kills.shutil.rmtree(out)
print(early)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, so that each starts in no time")
def test_thirty_kills_at_random_moments(tmp_path, straight):
    out = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= 10  # of the 30, were killed before they had come to the end
    assert run(out) == straight[1]
    assert same(out, straight[0])
