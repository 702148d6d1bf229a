"""The step protocol on the shipped generator: cache, batches, cancel and resume, guidance, rollback, trees."""

import time

import pytest
import torch

import argen
from argen.models.layers import Linear, linear
from argen.registry import samplers
from samplers import auto
from samplers.jacobi import Jacobi
from samplers.logits import Gumbel, Sampling, guide, gumbel, inverse_transform, keep_top_k, keep_top_p, keys_of
from samplers.recycling import Table, TokenRecycling
from samplers.rules import KSeq
from samplers.sjd import SpeculativeJacobi
from samplers.speculative import Speculative
from samplers.steps import START, Origin, Sequential
from samplers.trees import DrawnTree, DynamicTree, IndependentTree, StaticTree
from samplers.zipar import ZipAR


@pytest.fixture(scope="module")
def exact():
    """The shipped generator in float64, where passes of different shapes round alike."""
    pipe = argen.load("argen/emoji-parti").to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_an_inverse_transform_follows_the_probabilities():
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    numbers = torch.linspace(0, 1, 10001, dtype=torch.float64)[:-1]
    drawn = inverse_transform(probs.expand(len(numbers), -1), numbers)
    share = torch.bincount(drawn, minlength=4) / len(numbers)
    torch.testing.assert_close(share, probs, atol=1e-3, rtol=0)
    assert drawn[0] == 0
    assert drawn[-1] == 3


def test_filters():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    assert keep_top_k(logits, 2).isfinite().tolist() == [[True, False, True, True, False]]  # ties stay
    assert torch.equal(keep_top_k(logits, 0), logits)
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert keep_top_p(probs.log(), 0.7).isfinite().tolist() == [[True, True, False, False]]
    assert keep_top_p(probs.log(), 0.01).isfinite().tolist() == [[True, False, False, False]]
    torch.testing.assert_close(guide(logits, torch.zeros_like(logits), 2.5), 2.5 * logits)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_settings_out_of_bounds(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


@torch.no_grad()
def test_cache_equals_no_cache(exact):
    """Token by token through the cache, and all at once by teacher forcing."""
    prompt = "a red apple"
    tokens = torch.randint(4096, (1, exact.length), generator=generators(0)[0])
    states, mask = exact.encode_text([prompt])
    whole = exact.transformer(states, mask, tokens)
    session = exact.start([prompt], guided=False)
    read, rows = torch.tensor([[START]]), []
    for cell in range(exact.length):
        logits, unguided = session.forward(read, torch.tensor([cell - 1]))
        assert unguided is None
        rows.append(logits)
        read = tokens[:, cell : cell + 1]
    torch.testing.assert_close(torch.cat(rows, dim=1), whole, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_a_wrong_guess_is_written_over(exact):
    """A chain that is written, taken up again in its middle and written on is the chain written straight."""
    session = exact.start(["a pizza", "a dog face"], guided=True)
    chain = torch.randint(4096, (2, 6), generator=generators(1)[0])
    wrong = torch.cat([chain[:, :3], (chain[:, 3:] + 1) % 4096], dim=1)
    session.forward(torch.cat([torch.full((2, 1), START), wrong], dim=1), torch.arange(-1, 6))
    again = session.forward(chain[:, 3:], torch.arange(3, 6))
    fresh = exact.start(["a pizza", "a dog face"], guided=True)
    straight = fresh.forward(torch.cat([torch.full((2, 1), START), chain], dim=1), torch.arange(-1, 6))
    for one, other in zip(again, straight, strict=True):
        torch.testing.assert_close(one, other[:, 4:], atol=1e-9, rtol=1e-9)
    positions = torch.stack([torch.arange(2, 5), torch.arange(3, 6)])  # each picture at cells of its own
    apart = session.forward(chain.gather(1, positions), positions)
    for one, other in zip(apart, straight, strict=True):
        wanted = torch.stack([row[place + 1] for row, place in zip(other, positions, strict=True)])
        torch.testing.assert_close(one, wanted, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_a_tree_is_its_branches(exact):
    """Two branches in one pass with a tree mask give the logits of each branch written alone; one can be kept."""
    start, branches = torch.tensor([[START]]), torch.tensor([[10, 20], [30, 40]])
    session = exact.start(["a rose"], guided=False)
    session.forward(start, torch.tensor([-1]))
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    logits, _ = session.forward(branches.reshape(1, 4), torch.tensor([0, 1, 0, 1]), mask)
    for index, branch in enumerate(branches):
        alone = exact.start(["a rose"], guided=False)
        wanted, _ = alone.forward(torch.cat([start, branch[None]], dim=1), torch.arange(-1, 2))
        torch.testing.assert_close(logits[:, 2 * index : 2 * index + 2], wanted[:, 1:], atol=1e-9, rtol=1e-9)
    session.keep(torch.tensor([2, 3]))  # the second branch
    after, _ = session.forward(torch.tensor([[50]]), torch.tensor([2]))
    wanted, _ = alone.forward(torch.tensor([[50]]), torch.tensor([2]))
    torch.testing.assert_close(after, wanted, atol=1e-9, rtol=1e-9)


def test_an_image_does_not_depend_on_its_batch(pipe):
    together = pipe(["a red apple", "a pizza", "a dog face"], generator=generators(5, 6, 7))
    for index, prompt in enumerate(["a red apple", "a pizza", "a dog face"]):
        alone = pipe(prompt, generator=generators(5 + index))
        assert torch.equal(alone.tokens[0], together.tokens[index])
        assert alone.images[0].tobytes() == together.images[index].tobytes()


def test_one_generator_gives_each_image_noise_of_its_own(pipe):
    four = pipe("a rocket", 4, temperature=1.2, generator=generators(0)[0]).tokens
    assert len(four.unique(dim=0)) == 4
    assert torch.equal(pipe("a rocket", 2, temperature=1.2, generator=generators(0)[0]).tokens, four[:2])


def test_cancel_keeps_and_resume_goes_on(exact):
    """A stream stopped half-way and given back its grid ends as the one that was not stopped."""
    prompts = ["a guitar", "a house"]
    *_, whole = exact.stream(prompts, generators(1, 2), sampler="sequential")
    for step in exact.stream(prompts, generators(1, 2), sampler="sequential"):
        if step.decided >= 30:
            break
    assert step.decided == 30
    assert (step.tokens >= 0).sum() == 2 * 30
    assert torch.equal(step.tokens[:, :30], whole.tokens[:, :30])
    *_, rest = exact.stream(prompts, generators(1, 2), tokens=step.tokens, sampler="sequential")
    assert torch.equal(rest.tokens, whole.tokens)
    assert rest.forward_passes == 64 - 30


def test_steps_are_reported_every_k_tokens(pipe):
    counts = [step.decided for step in pipe.stream(["a ghost"], generators(0), sampler="sequential", every=10)]
    assert counts == [1, 11, 21, 31, 41, 51, 61, 64]


def test_decided_cells_are_kept(pipe):
    grid = torch.full((1, 64), -1)
    grid[0, 10:20] = 7
    *_, step = pipe.stream(["a castle"], generators(0), tokens=grid)
    assert (step.tokens[0, 10:20] == 7).all()
    assert (step.tokens >= 0).all()


def test_guidance_matters_and_greedy_does_not_draw(pipe):
    greedy = pipe("a banana", temperature=0, generator=generators(0)).tokens
    assert torch.equal(greedy, pipe("a banana", temperature=0, generator=generators(9)).tokens)
    several = ["a banana", "a cat", "a blue house", "a train"]
    weak, strong = (pipe(several, temperature=0, guidance_scale=scale).tokens for scale in (1.0, 4.0))
    assert not torch.equal(weak, strong)
    assert torch.equal(greedy, pipe("a banana", top_k=1, generator=generators(3)).tokens)


def test_unknown_sampler():
    with pytest.raises(ValueError, match="unknown sampler 'magic': expected one of auto, sequential, jacobi"):
        samplers["magic"]


def test_keys_are_each_generators_own():
    both = keys_of(generators(0, 1), 8)
    assert torch.equal(both[1:], keys_of(generators(1), 8))


def test_gumbel_noise_is_gumbel_and_samples_the_distribution():
    noise = gumbel(keys_of(generators(0), 400), 1000)[0]
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.02)
    correlation = torch.corrcoef(noise.T[:50])  # of neighbouring tokens, over the cells
    assert (correlation - torch.eye(50)).abs().max() < 0.25
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    drawn = Gumbel(keys_of(generators(1), 20000)).draw(probs.log().expand(1, 20000, -1), torch.arange(20000))
    share = torch.bincount(drawn[0], minlength=4) / 20000
    torch.testing.assert_close(share, probs, atol=0.012, rtol=0)


@pytest.mark.parametrize("window", [1, 3, 16, 64])
def test_jacobi_matches_sequential_images(pipe, window):
    prompts, seeds = ["a red apple", "a pizza", "three yellow ducks"], (3, 4, 5)
    *_, sequential = pipe.stream(prompts, generators(*seeds), sampler="sequential")
    steps = list(pipe.stream(prompts, generators(*seeds), sampler=Jacobi(window)))
    assert torch.equal(steps[-1].tokens, sequential.tokens)
    assert steps[-1].forward_passes < (64 if window > 1 else 65)
    for step in steps:  # nothing that is shown is taken back
        assert torch.equal(torch.where(step.tokens >= 0, sequential.tokens, -1), step.tokens)
    *_, alone = pipe.stream(prompts[1:2], generators(4), sampler=Jacobi(window))
    assert torch.equal(alone.tokens[0], sequential.tokens[1])


def test_jacobi_keeps_decided_cells_and_goes_on(pipe):
    grid = torch.full((2, 64), -1)
    grid[0, :20], grid[1, 10:20], grid[:, 40] = 7, 9, 11
    *_, sequential = pipe.stream(["a castle", "a dog face"], generators(0, 1), tokens=grid, sampler="sequential")
    *_, step = pipe.stream(["a castle", "a dog face"], generators(0, 1), tokens=grid, sampler="jacobi")
    assert torch.equal(step.tokens, sequential.tokens)
    assert step.forward_passes < sequential.forward_passes
    greedy = {"prompt": "a banana", "temperature": 0, "guidance_scale": 1.0}
    assert torch.equal(pipe(**greedy, sampler="jacobi").tokens, pipe(**greedy, sampler="sequential").tokens)
    with pytest.raises(ValueError, match="window is 0"):
        Jacobi(0)


@pytest.mark.parametrize("slow", [Sequential, Jacobi])
def test_auto_matches_sequential_images_with_the_faster_sampler(pipe, monkeypatch, slow):
    prompts, calls = ["a red apple", "a pizza"], []
    *_, sequential = pipe.stream(prompts, generators(3, 4), sampler="sequential")
    *_, several = pipe.stream(prompts, generators(3, 4), sampler="auto")
    assert torch.equal(several.tokens, sequential.tokens)
    assert several.forward_passes == 64  # on a CPU, of several pictures at a time, nothing is tried
    monkeypatch.setattr(auto, "CPU_IMAGES", 2)

    def dragging(sampler, call=slow.__call__):
        def wrapped(self, *args):
            calls.append(slow)
            for step in call(self, *args):
                time.sleep(0.2)
                yield step

        return wrapped

    monkeypatch.setattr(slow, "__call__", dragging(slow))
    *steps, last = pipe.stream(prompts, generators(3, 4), sampler="auto")
    assert torch.equal(last.tokens, sequential.tokens)
    assert len(calls) == 1  # tried once
    assert (last.forward_passes < 50) is (slow is Sequential)
    assert (last.origins != Origin.GIVEN).all()
    grid = torch.where(torch.arange(64) < 62, sequential.tokens, -1)
    *_, end = pipe.stream(prompts, generators(3, 4), tokens=grid, sampler="auto")
    assert torch.equal(end.tokens, sequential.tokens)
    assert torch.equal(end.origins == Origin.GIVEN, grid >= 0)


@pytest.mark.parametrize("name", ["sjd", "recycling"])
def test_drafts_without_training(pipe, name):
    greedy = {"prompt": ["a banana", "a rocket"], "temperature": 0, "generator": generators(0, 1)}
    drafted, sequential = pipe(**greedy, sampler=name), pipe(**greedy, sampler="sequential")
    assert torch.equal(drafted.tokens, sequential.tokens)
    assert drafted.forward_passes < sequential.forward_passes
    assert Origin.ACCEPTED in drafted.origins
    drawn = pipe("a banana", generator=generators(0), sampler=name)
    assert torch.equal(drawn.tokens, pipe("a banana", generator=generators(0), sampler=name).tokens)
    grid = torch.full((1, 64), -1)
    grid[0, 5:9] = 7
    *_, step = pipe.stream(["a castle"], generators(0), tokens=grid, sampler=name)
    assert (step.tokens[0, 5:9] == 7).all()
    assert (step.origins[0, 5:9] == Origin.GIVEN).all()
    assert (step.tokens >= 0).all()


@pytest.mark.parametrize("shape", [DrawnTree(12, 4), DynamicTree(12, 3, 4), IndependentTree(((0,), (1,), (0, 0)))])
def test_every_shape_drafts_for_a_batch(pipe, shape):
    greedy = {"prompt": ["a banana", "a rocket"], "temperature": 0, "generator": generators(0, 1)}
    drafted, sequential = pipe(**greedy, sampler=TokenRecycling(tree=shape)), pipe(**greedy, sampler="sequential")
    assert torch.equal(drafted.tokens, sequential.tokens)
    assert drafted.forward_passes < sequential.forward_passes
    drawn = pipe(["a banana", "a rocket"], generator=generators(0, 1), sampler=TokenRecycling(tree=shape))
    assert drawn.forward_passes < 64
    assert (drawn.tokens >= 0).all()


def test_groups_need_fewer_forward_passes_than_tokens(pipe):
    prompts = ["a banana", "a rocket", "three yellow ducks", "a castle"]
    exact, grouped = (pipe(prompts, generator=generators(0, 1, 2, 3), sampler=name) for name in ("sjd", "gsd"))
    assert grouped.forward_passes < exact.forward_passes
    assert Origin.RELAXED in grouped.origins
    assert Origin.RELAXED not in exact.origins


class Toy:
    """A session of two cells and three tokens with fixed distributions: [1, 3] for the first cell, [3, 3] for the second."""

    columns, length = 2, 2

    def __init__(self, first, second):
        self.first, self.second = first.log(), second.log()

    def forward(self, tokens, positions, mask=None):
        rows = [self.first if token < 0 else self.second[token] for token in tokens[0].tolist()]
        return torch.stack(rows)[None], None

    def keep(self, nodes): ...


@pytest.mark.parametrize(
    "sampler",
    [
        SpeculativeJacobi(1),
        TokenRecycling(2, StaticTree(((0,), (1,)))),
        TokenRecycling(2, DrawnTree(3)),
        Speculative(IndependentTree(((0,), (1,))), KSeq(), drafter=Table(2)),
    ],
    ids=["sjd", "static", "drawn", "k-seq"],
)
def test_drafts_without_training_keep_the_distribution(sampler):
    first = torch.tensor([0.5, 0.2, 0.3])
    second = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]])
    counts = torch.zeros(3, 3)
    for seed in range(3000):
        noise = Gumbel(keys_of(generators(seed), 2))
        *_, last = sampler(Toy(first, second), torch.full((1, 2), -1), Sampling(), 1.0, noise)
        counts[tuple(last.tokens[0])] += 1
    wanted = first[:, None] * second
    assert ((counts - 3000 * wanted) ** 2 / (3000 * wanted)).sum() < 26.1  # chi-squared, 8 degrees, 1 in 1,000


def test_rows_side_by_side(pipe):
    """ZipAR in so many passes as the paper says; with the widest window it is the plain sampler."""
    prompts = ["a banana", "a rocket"]
    sequential = pipe(prompts, generator=generators(0, 1), sampler="sequential")
    assert torch.equal(pipe(prompts, generator=generators(0, 1), sampler=ZipAR(8)).tokens, sequential.tokens)
    for window in (2, 4):
        fast = pipe(prompts, generator=generators(0, 1), sampler=ZipAR(window))
        assert fast.forward_passes == 8 + 7 * window
        alone = pipe(prompts[1], generator=generators(1), sampler=ZipAR(window))
        assert torch.equal(alone.tokens[0], fast.tokens[1])
    grid = torch.full((1, 64), -1)
    grid[0, 5:12] = 7
    *_, step = pipe.stream(["a castle"], generators(0), tokens=grid, sampler="zipar")
    assert (step.tokens[0, 5:12] == 7).all()
    assert (step.tokens >= 0).all()
    with pytest.raises(ValueError, match="window is 0"):
        ZipAR(0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 5), (80,), (3,)])
def test_the_quick_linear_layer_is_the_same(shape):
    layer = Linear(16, 24)
    x = torch.randn(*shape, 16)
    wanted = torch.nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * wanted)  # nothing remembers the old weight
        layer.weight.div_(2)
        layer.bias.div_(2)
        torch.testing.assert_close(layer.double()(x.double()), wanted.double(), atol=1e-5, rtol=1e-5)
        half = layer.bfloat16()
        exact = torch.nn.functional.linear(x.bfloat16(), half.weight, half.bias)
        torch.testing.assert_close(half(x.bfloat16()), exact, atol=0.02, rtol=0.02)


def test_a_slice_of_a_weight_is_packed_once(monkeypatch):
    weight, x = torch.nn.Parameter(torch.randn(24, 16)), torch.randn(2, 16)
    calls, reorder = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *args: calls.append(1) or reorder(*args))
    with torch.no_grad():
        for _ in range(3):
            wanted = torch.nn.functional.linear(x, weight[:-1])
            torch.testing.assert_close(linear(x, weight[:-1]), wanted)
            torch.testing.assert_close(linear(x, weight[2:]), torch.nn.functional.linear(x, weight[2:]))
        assert len(calls) == 2
        weight.mul_(2)
        torch.testing.assert_close(linear(x, weight[:-1]), 2 * wanted)
    assert len(calls) == 3


def test_a_weight_is_not_packed_where_memory_is_short(monkeypatch):
    asked = []
    monkeypatch.setattr("argen.models.layers.free", lambda device: asked.append(device) or 1000)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *args: pytest.fail("packed"))
    layer, x = Linear(16, 24), torch.randn(2, 16)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert asked == ["cpu"]


def test_bf16_layers_run_without_units_for_them(monkeypatch):
    monkeypatch.setattr("argen.models.layers.fast_dtype", lambda device: torch.float32)
    seen, reorder = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, n: seen.append(weight.dtype) or reorder(weight, n)
    )
    layer, x = Linear(16, 24).bfloat16(), torch.randn(2, 16).bfloat16()
    with torch.no_grad():
        output = layer(x)
        torch.testing.assert_close(
            output, torch.nn.functional.linear(x, layer.weight, layer.bias), atol=0.02, rtol=0.02
        )
    assert output.dtype == torch.bfloat16
    assert seen == [torch.float32]  # packed as what the machine can compute
