"""LlamaGen that completes images: known tokens that come later are seen by those before them, in training and in editing."""

import importlib.util

import pytest
import torch
from PIL import Image

import argen
from argen.cli.main import main
from argen.models.compiled import CompiledStep
from argen.models.graphed import GraphedStep
from argen.models.llamagen import LlamaGen
from argen.models.session import LlamaGenSession
from argen.train.own.llamagen import known_cells

N = 16


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = LlamaGen(64, 4, classes=3, dim=32, depth=2, heads=2, multiple_of=8, dropout=0.0, looks_ahead=True)
    torch.nn.init.normal_(network.output.weight, std=0.3)
    return network.eval()


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    known = torch.zeros(2, N, dtype=torch.bool)
    known[:, 10:], known[1, 3] = True, True
    return (
        torch.tensor([0, 1]),
        torch.ones(2, 1, dtype=torch.bool),
        torch.randint(64, (2, N), generator=generator),
        known,
    )


@torch.no_grad()
def test_training_and_session_see_the_same(network, rows):
    condition, mask, tokens, known = rows
    trained = network(condition, mask, tokens, known=known)
    grid = tokens.masked_fill(~known, -1)
    both = torch.cat([condition, condition])
    session = LlamaGenSession(network, network.cls_embedding(both), torch.cat([mask, mask]), guided=True, grid=grid)
    read = torch.cat([torch.zeros(2, 1, dtype=torch.long), tokens[:, :-1]], dim=1)
    first, _ = session.forward(read[:, :6], torch.arange(-1, 5))
    conditional, other = session.forward(read[:, 6:], torch.arange(5, N - 1))
    assert torch.allclose(torch.cat([first, conditional], dim=1), trained, atol=1e-5)
    assert torch.equal(conditional, other)


@torch.no_grad()
def test_only_known_cells_behind_a_token_count(network, rows):
    condition, mask, tokens, known = rows
    plain = network(condition, mask, tokens)
    assert torch.equal(network(condition, mask, tokens, known=torch.zeros_like(known)), plain)
    seen = network(condition, mask, tokens, known=known)
    differs = (seen - plain).abs().amax(dim=-1) > 1e-4
    assert differs[:, 1:10].all()
    assert not differs[:, 0].any()
    other = tokens.clone()
    other[0, 12] = (other[0, 12] + 1) % 64
    changed = (network(condition, mask, other, known=known) - seen).abs().amax(dim=-1) > 1e-6
    assert changed[0, 1:10].all()
    assert not changed[1].any()
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % 64  # not known: those before it do not see it
    changed = (network(condition, mask, other, known=known) - seen).abs().amax(dim=-1) > 1e-6
    assert not changed[:, :10].any()
    assert changed[:, 10].all()


def test_known_cells_are_rectangles_or_random_shares():
    known = known_cells(4000, 8, torch.Generator().manual_seed(0))
    assert known.shape == (4000, 64)
    assert not known.all(dim=1).any()
    share = known.float().mean(dim=1)
    assert share.min() == 0
    assert share.max() > 0.9
    assert 0.35 < share.mean() < 0.75
    holes = ~known.view(-1, 8, 8)
    sides = holes.any(dim=2).sum(dim=1) * holes.any(dim=1).sum(dim=1)
    assert 0.4 < (sides == holes.sum(dim=(1, 2))).float().mean() < 0.65  # whole rectangles


@pytest.fixture
def pipe():
    pipe = argen.load("argen/emoji-llamagen")
    pipe.transformer.register_to_config(looks_ahead=True)
    return pipe


def test_every_sampler_completes_an_image_alike(pipe):
    image = pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0]
    hole = Image.new("L", image.size)
    hole.paste(255, (64, 64, 192, 192))
    grid = pipe.without(image, hole).flatten(1)
    settings = {"tokens": grid, "temperature": 0.0, "output_type": "latent"}
    drawn = {
        name: pipe("a red apple", sampler=name, **settings).tokens for name in ("sequential", "jacobi", "speculative")
    }
    assert torch.equal(drawn["sequential"][grid >= 0], grid[grid >= 0])
    assert torch.equal(drawn["sequential"], drawn["jacobi"])
    assert torch.equal(drawn["sequential"], drawn["speculative"])
    plain = pipe.transformer
    for compiled in (
        CompiledStep(plain, plain.step) if importlib.util.find_spec("openvino") else None,
        GraphedStep(plain, plain.step, backend=lambda module, _: module.forward),
    ):
        plain.compiled = compiled
        assert torch.equal(pipe("a red apple", sampler="jacobi:window=3", **settings).tokens, drawn["sequential"])
    plain.compiled = None
    pipe.transformer.register_to_config(looks_ahead=False)
    assert not torch.equal(pipe("a red apple", sampler="sequential", **settings).tokens, drawn["sequential"])


def test_the_objective_is_trained_and_edits(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(20):
        Image.new("RGB", (32, 32), (number * 12, 80, 200)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("a blue square")
    command = [
        "train",
        "llamagen",
        "--images",
        str(images),
        "--init",
        "argen/emoji-llamagen",
        "--out",
        str(tmp_path / "run"),
    ]
    few = ["--steps", "2", "--batch-size", "4", "--evaluate-every", "2"]
    assert main([*command, *few, "--objective", "mixed"]) == 0
    assert "held-out loss of the middle" in capsys.readouterr().out
    pipe = argen.load(tmp_path / "run" / "final")
    assert pipe.looks_ahead
    assert not argen.load("argen/emoji-llamagen").looks_ahead
    hole = Image.new("L", (256, 256))
    hole.paste(255, (64, 64, 128, 128))
    assert pipe.edit("a blue square", Image.new("RGB", (256, 256), "blue"), hole).images[0].size == (256, 256)
    assert main([*command, *few]) == 2  # another objective
    assert "objective" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "b"), "--objective", "mixed", "--lora", "4"]) == 2
    assert "leave lora out" in capsys.readouterr().err
    other = ["train", "parti", *command[2:4], "--init", "argen/emoji-parti", "--out", str(tmp_path / "c")]
    assert main([*other, "--objective", "mixed"]) == 2
    assert "only the recipe llamagen" in capsys.readouterr().err
