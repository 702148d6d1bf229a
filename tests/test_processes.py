"""Several processes train as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from argen.models.llamagen import LlamaGen
from argen.train import checkpoints
from argen.train.loop import Training
from argen.train.own.llamagen import SCHEDULE, LlamaGenTask
from argen.train.sharding import is_sharded


class Task(LlamaGenTask):
    def __init__(self):
        torch.manual_seed(0)
        model = LlamaGen(32, 4, classes=5, dim=32, depth=2, heads=2, multiple_of=16, dropout=0.0)
        model.output.weight.data.normal_(std=0.02)
        self.networks, self.pipe = {"model": model.train()}, SimpleNamespace(transformer=model)

    def batch(self, size, generator):
        return {
            "tokens": torch.randint(32, (size, 16), generator=generator),
            "condition": torch.randint(5, (size,), generator=generator),
            "dropped": torch.rand(size, generator=generator) < 0.1,
            "mask": torch.ones(size, 1, dtype=torch.bool),
        }

    def read(self, batch):
        return batch


if sys.argv[4] == "fsdp":  # accelerate has it on GPUs alone
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from argen.train import loop

    class OnCPU(Accelerator):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="NO_WRAP",
                cpu_ram_efficient_loading=False,
                state_dict_type="SHARDED_STATE_DICT",
            )

    loop.Accelerator = OnCPU

micro = int(sys.argv[2]) or None
schedule = replace(SCHEDULE, batch_size=6, micro_batch=micro, grad_clip=0.5, ema_decay=0.5)
training = Training(Task(), schedule, Path(sys.argv[1]), 0, "fp32")
assert training.accelerator.num_processes == int(sys.argv[3])
assert is_sharded(training.accelerator) == (sys.argv[4] == "fsdp")
while training.progress.step < 20:
    training.step()
    if training.progress.step == 10 and sys.argv[4] == "fsdp":  # goes on from its checkpoint
        checkpoints.write(training.accelerator, Path(sys.argv[1]), training.recipe, 10)
        training = Training(Task(), schedule, Path(sys.argv[1]), 0, "fp32")
        assert training.progress.step == 10
with training.averaged() as ready:
    if ready:
        torch.save(training.task._model().state_dict(), Path(sys.argv[1]) / "weights.pt")
"""


def trained(tmp_path: Path, processes: int, micro: int, how: str = "ddp") -> dict[str, torch.Tensor]:
    out = tmp_path / f"{processes}-{micro}-{how}"
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launch = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"] if processes > 1 else []
    )
    command = [sys.executable, *launch, str(script), str(out), str(micro), str(processes), how]
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out / "weights.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "micro"), [(1, 2), (2, 0), (4, 1)])
def test_the_weights_are_those_of_one_process(tmp_path, processes, micro):
    one, many = trained(tmp_path, 1, 0), trained(tmp_path, processes, micro)
    start = max(value.abs().max() for value in one.values())
    assert start > 0.1
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_shards_have_the_weights_of_one_process(tmp_path):
    one, shards = trained(tmp_path, 1, 0), trained(tmp_path, 2, 2, "fsdp")
    assert one.keys() == shards.keys()
    for name, value in one.items():
        torch.testing.assert_close(shards[name], value, atol=1e-5, rtol=0)
