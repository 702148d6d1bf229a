"""Decoding as graphs of fixed shapes: the same tokens, one graph for each number of tokens in a pass, and no wait for the device between two
tokens. No GPU is needed: graphs are run by PyTorch's own operations here, and a device without memory stands for one that is waited for."""

import gc
import traceback
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import argen
from argen.hub.abilities import check_compile
from argen.models import graphed
from argen.models.graphed import GraphedStep
from argen.models.llamagen import LlamaGen
from argen.models.session import LlamaGenSession
from samplers.logits import Gumbel, Sampling
from samplers.steps import Sequential

SAMPLERS = {
    "argen/emoji-parti": ["jacobi"],
    "argen/emoji-llamagen": ["speculative", "zipar"],
}  # chains, trees, scattered cells


class Graphs:
    """A backend of ``torch.compile`` that counts what is compiled, and runs it as it is."""

    def __init__(self):
        self.count = 0

    def __call__(self, module, _):
        self.count += 1
        return module.forward


def tokens_of(pipe, sampler: str, seeds: list[int]) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"num_images_per_prompt": len(seeds), "generator": generator, "output_type": "latent"}
    return pipe("a pizza", sampler=sampler, **settings).tokens


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_tokens_are_the_same_and_a_second_image_compiles_nothing(name):
    pipe, graphs = argen.load(name), Graphs()
    pipe.set_progress_bar_config(disable=True)
    samplers = ["sequential", *SAMPLERS[name]]
    plain = {sampler: tokens_of(pipe, sampler, [0, 1]) for sampler in samplers}
    network = pipe.transformer
    network.compiled = GraphedStep(network, getattr(network, "step", network.decode), backend=graphs)
    assert torch.equal(tokens_of(pipe, "sequential", [0, 1]), plain["sequential"])
    assert graphs.count == 1  # of one token
    for sampler in samplers:
        assert torch.equal(tokens_of(pipe, sampler, [0, 1]), plain[sampler]), sampler
    compiled = graphs.count
    assert compiled <= 6  # of 1, 2, 4, ... tokens
    for sampler in samplers:
        assert torch.equal(tokens_of(pipe, sampler, [0, 1]), plain[sampler]), sampler
    assert graphs.count == compiled
    assert len(network.compiled.rooms) == 1  # one after the other in the same memory


@torch.no_grad()
def test_two_pictures_at_a_time_have_a_memory_each():
    torch.manual_seed(0)
    network = LlamaGen(grid=4, classes=5, dim=64, depth=2, heads=4, n_embed=96).eval()
    torch.nn.init.normal_(network.output.weight, std=0.5)
    prompts = torch.randint(0, 96, (2, 1, 12))

    def session(condition: int) -> LlamaGenSession:
        ids = torch.tensor([condition])
        return LlamaGenSession(network, network.cls_embedding(ids), torch.ones(1, 1, dtype=torch.bool), guided=False)

    def logits(sessions: list[LlamaGenSession]) -> torch.Tensor:
        """Of both, in turn token by token."""
        steps = [
            [
                each.forward(prompts[index][:, cell : cell + 1], torch.tensor([cell]))[0]
                for index, each in enumerate(sessions)
            ]
            for cell in range(12)
        ]
        return torch.stack([torch.cat([step[index] for step in steps], dim=1) for index in range(len(sessions))])

    expected = logits([session(1), session(2)])
    network.compiled = GraphedStep(network, network.step, backend=Graphs())
    together = [session(1), session(2)]
    torch.testing.assert_close(logits(together), expected, rtol=1e-5, atol=1e-5)
    assert len(network.compiled.rooms) == 2
    del together
    torch.testing.assert_close(logits([session(1), session(2)]), expected, rtol=1e-5, atol=1e-5)
    assert len(network.compiled.rooms) == 2


class Waits(TorchDispatchMode):
    """Collects where the CPU would wait for the device "meta"."""

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, source = str(func), args[0].device.type if args and isinstance(args[0], torch.Tensor) else "cpu"
        target = torch.device(kwargs.get("device") or source).type
        copies = "_to_copy" in name and source != target and not kwargs.get("non_blocking", False)
        if copies or (source == "meta" and ("_local_scalar_dense" in name or "nonzero" in name)):
            self.places += [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[-2:-1]]
        return func(*args, **kwargs)


@torch.no_grad()
def test_nothing_waits_for_the_device_between_two_tokens(monkeypatch):
    with Waits() as waits:
        torch.zeros(3).to("meta")
    assert len(waits.places) == 1  # it does see a copy that waits
    looks = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: looks.append(tensor) or [False] * tensor.numel())
    network = LlamaGen(grid=4, classes=5, dim=64, depth=2, heads=4, n_embed=96).eval().to("meta")
    classes, keys = torch.zeros(4, dtype=torch.int64, device="meta"), torch.zeros(2, 16, dtype=torch.int64)
    mask = torch.ones(4, 1, dtype=torch.bool, device="meta")
    session = LlamaGenSession(network, network.cls_embedding(classes), mask, guided=True)
    tokens = torch.full((2, 16), -1, device="meta")
    with Waits() as waits:
        steps = [step.decided for step in Sequential()(session, tokens, Sampling(1.0, 20), 4.0, Gumbel(keys))]
    assert (waits.places, steps) == ([], list(range(1, 17)))
    assert len(looks) == 1  # at the tokens to keep, before the first pass


def test_what_cannot_compile_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="compile needs Triton on a GPU: pip install triton, or leave it out"):
        check_compile("cuda", "bf16")
    with pytest.raises(ValueError, match="compile is for a CPU or a CUDA GPU, and the device is mps: leave it out"):
        check_compile("mps", "auto")


@torch.no_grad()
def test_buffers_of_other_sizes_are_released_but_for_the_latest():
    torch.manual_seed(0)
    network = LlamaGen(grid=4, classes=5, dim=64, depth=2, heads=4, n_embed=96).eval()
    graphs = Graphs()
    network.compiled = GraphedStep(network, network.step, backend=graphs)

    def session(rows: int) -> LlamaGenSession:
        ids, mask = torch.ones(rows, dtype=torch.int64), torch.ones(rows, 1, dtype=torch.bool)
        begun = LlamaGenSession(network, network.cls_embedding(ids), mask, guided=False)
        begun.forward(torch.zeros(rows, 1, dtype=torch.int64), torch.tensor([0]))
        return begun

    def sizes() -> list[int]:
        return [room.buffers[0].shape[1] for room in network.compiled.rooms]

    held, buffers = session(1), []
    for rows in range(2, 10):
        session(rows)
        buffers.append(weakref.ref(network.compiled.rooms[-1].buffers[0]))
    assert sizes() == [1, 6, 7, 8, 9]  # the first is in use
    gc.collect()
    assert [buffer() is not None for buffer in buffers] == [False] * 4 + [True] * 4
    compiled = graphs.count
    session(6)
    assert graphs.count == compiled
    assert sizes() == [1, 7, 8, 9, 6]
    del held
    session(2)
    assert sizes() == [8, 9, 6, 2]


def test_a_room_keeps_the_graphs_that_were_used_last():
    room, made = graphed.Room([torch.zeros(1)]), []
    for form in range(graphed.GRAPHS + 2):
        room.graph(form, lambda form=form: made.append(form) or (lambda: form))
        room.graph(0, lambda: made.append("again") or (lambda: 0))
    assert made == list(range(graphed.GRAPHS + 2))
    assert len(room.graphs) == graphed.GRAPHS
    assert 1 not in room.graphs
    assert list(room.graphs)[-1] == 0
