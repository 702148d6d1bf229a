"""Trainings of image tokenizers on own images: the terms of the loss, exact resume, what is written."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import argen
from argen.cli.main import main
from argen.eval import reconstruction
from argen.registry import recipes
from argen.train.loop import Training
from argen.train.own import llamagen_vq, vit_vqgan
from argen.train.own.options import OwnOptions
from argen.train.own.run import run
from argen.train.own.tokenizers import Terms, crop
from argen.train.sources import open_source
from tokenizers_img.pixels import from_uint8

TINY = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 16, "mlp_dim": 64}
VIT = {"patch_size": 8, "encoder_size": TINY, "decoder_size": TINY, "embed_dim": 8, "n_embed": 32}
VQ = {"multipliers": (1, 1, 1), "width": 32, "latent_channels": 32, "codes": 32, "layers": 1}
RECIPES = {"vit-vqgan": vit_vqgan, "llamagen-vq": llamagen_vq}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("ARGEN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(vit_vqgan, "MINI", VIT)
    monkeypatch.setattr(llamagen_vq, "MINI", VQ)


def write_squares(folder: Path, count: int = 12) -> None:
    chance = np.random.default_rng(0)
    for number in range(count):
        image = np.full((40 + number % 3 * 8, 44, 3), chance.integers(255, size=3), np.uint8)
        image[8:28, number : number + 20] = chance.integers(255, size=3)
        Image.fromarray(image).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    write_squares(folder)
    return folder


def options(folder, **more):
    given = {"size": "mini", "image_size": 32, "batch_size": 4, "evaluate_every": 2, "learning_rate": 1e-3}
    return OwnOptions(images=str(folder), **given | {"warmup": 0} | more)


def task_of(recipe, folder, **more):
    source = open_source(folder, conditions=False)
    return RECIPES[recipe].prepare(options(folder, **more), source, source.subset(range(3)))


def train(recipe, folder, out, *more):
    few = ["--size", "mini", "--image-size", "32", "--steps", "2", "--batch-size", "4", "--evaluate-every", "2"]
    return main(["train", recipe, "--images", str(folder), "--out", str(out), *few, *more])


def test_adversarial_terms_are_the_official_ones():
    real, generated = torch.tensor([0.5, 2.0]), torch.tensor([-2.0, 0.5])
    hinge = Terms(0, 1, 1, "hinge", 0.5)
    assert hinge.judging(real, generated).item() == pytest.approx((0.5 / 2 + 1.5 / 2) / 2)
    assert hinge.fooling(generated).item() == pytest.approx(0.75)
    logistic = Terms(0, 1, 1, "logistic", 0.1)
    soft = lambda value: math.log1p(math.exp(value))  # noqa: E731
    expected = (soft(-0.5) + soft(-2.0)) / 4 + (soft(-2.0) + soft(0.5)) / 4
    assert logistic.judging(real, generated).item() == pytest.approx(expected)
    assert logistic.fooling(generated).item() == pytest.approx((soft(2.0) + soft(-0.5)) / 2)


@pytest.mark.parametrize(("recipe", "expected"), [("vit-vqgan", 0.01 + 0.1 * 0.5), ("llamagen-vq", 0.04 + 0.5)])
def test_images_are_compared_in_the_range_of_the_official_code(squares, recipe, expected):
    task = task_of(recipe, squares)
    task.features = nn.Identity()
    task.features.forward = lambda generated, real: torch.tensor(0.5)
    real, log = torch.full((2, 3, 8, 8), 0.4), {}
    assert task.distance(real + 0.1, real, log).item() == pytest.approx(expected, rel=1e-5)
    assert log["perceptual"] == 0.5


def test_the_penalty_is_the_squared_gradient_at_real_images(squares):
    task = task_of("vit-vqgan", squares)
    judge = task.networks["discriminator"] = nn.Conv2d(3, 1, 1)
    real, decoded = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    log: dict[str, float] = {}
    without = task.judged(real, decoded, 17, log)
    assert without.item() == pytest.approx(
        (F.softplus(-judge(real)).mean() + F.softplus(judge(decoded)).mean()).item() / 2, rel=1e-5
    )
    penalty = task.judged(real, decoded, 16, log) - without
    weight = (
        judge.weight.detach().flatten()
    )  # an image's logit is the mean of 16 places, so the gradient is weight / 16
    assert penalty.item() == pytest.approx(10 / 2 * 16 * (weight / 16).square().sum().item(), rel=1e-4)
    judge.zero_grad()
    penalty.backward()
    torch.testing.assert_close(judge.weight.grad.flatten(), 10 / 16 * weight)


def test_the_codebook_term_pulls_codes_and_vectors_together(squares):
    tokenizer = task_of("llamagen-vq", squares).networks["model"]
    tokenizer.vq.quantize.embedding.weight.data *= 3  # lengths do not count
    pixels = torch.rand(2, 3, 32, 32)
    decoded, loss, ids = tokenizer(pixels)
    z = F.normalize(tokenizer.encode_vectors(pixels), dim=-1)
    codes = F.normalize(tokenizer.codebook[ids], dim=-1)
    assert loss.item() == pytest.approx(1.25 * (z - codes).square().mean().item(), rel=1e-5)
    tokenizer.vq.quantize.embedding.weight.data /= 3
    assert torch.equal(tokenizer.encode(pixels), ids)
    torch.testing.assert_close(tokenizer.decode(ids), decoded, atol=1e-5, rtol=1e-5)


def test_the_discriminator_joins_at_its_step(squares):
    def networks(task, step):
        task.total = 100_000
        batch = task.read(task.batch(2, torch.Generator().manual_seed(0)))
        return [name for name, _ in task.losses(batch, step, {})]

    assert networks(task_of("vit-vqgan", squares), 0) == ["model", "discriminator"]
    task = task_of("llamagen-vq", squares)
    assert networks(task, 19_998) == ["model"]
    assert networks(task, 19_999) == ["model", "discriminator"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_of_the_adversarial_term_reach_the_tokenizer_alone(squares, recipe):
    task = task_of(recipe, squares)
    task.total, task.terms = 10, replace(task.terms, l2=0.0, perceptual=0.0, start=0)
    judge = task.networks["discriminator"]
    losses = task.losses(task.read(task.batch(2, torch.Generator().manual_seed(0))), 1, {})
    next(losses)[1].backward()
    assert all(part.grad is None for part in judge.parameters())
    assert any(part.grad is not None for part in task.networks["model"].parameters())
    task.networks["model"].zero_grad()
    next(losses)[1].backward()
    assert all(part.grad is not None for part in judge.parameters())
    assert all(part.grad is None for part in task.networks["model"].parameters())


def test_crops():
    image = Image.fromarray(np.random.default_rng(0).integers(255, size=(60, 90, 3), dtype=np.uint8))
    whole = np.asarray(crop(image, 60, "random", 0.0, 0.0, 0.0, 0.9))
    assert np.array_equal(whole, np.asarray(image)[:, :60])
    mirrored = np.asarray(crop(image, 60, "random", 0.0, 0.999, 0.0, 0.1))
    assert np.array_equal(mirrored, np.asarray(image)[:, 30:][:, ::-1])
    assert crop(image, 60, "random", 0.999, 0.999, 0.999, 0.0).size == (60, 60)  # of one 75 pixels high
    assert crop(Image.new("RGB", (3, 5)), 32, "random", 0.5, 0.5, 0.5, 0.5).size == (32, 32)
    plain = [np.asarray(crop(image, 30, how, 0.7, 0.7, 0.7, 0.1)) for how in ("center", "flip")]
    assert np.array_equal(plain[0], plain[1][:, ::-1])


def test_dead_codes_move_to_vectors_of_images(squares):
    task = task_of("vit-vqgan", squares)
    task.total = 1000
    before = task.codes.detach().clone()
    pixels = task.read(task.batch(4, torch.Generator().manual_seed(0)))["pixels"]
    task.usage.count[5] = 8 * 32
    task.note(torch.full((4, 16), 5), pixels, 50)
    task.revive(50)
    assert torch.equal(task.codes[5], before[5])
    assert (task.codes != before).any(dim=1).sum() == 31
    vectors = F.normalize(task._model().encode_vectors(pixels).flatten(0, 1), dim=-1)
    distances = torch.cdist(task.codes[6:].detach(), vectors.detach()).min(dim=1).values
    assert distances.max() < 1e-3
    assert task.usage.count.sum() == 0
    task.note(torch.full((4, 16), 5), pixels, 100)  # too few tokens since
    task.revive(100)
    assert task.usage.count.tolist() == [64 if code == 5 else 0 for code in range(32)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stopped_run_goes_on_exactly(squares, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr("argen.train.own.tokenizers.REVIVE_EVERY", 3)
    monkeypatch.setattr("argen.train.own.tokenizers.SEEN", 1)
    monkeypatch.setattr(llamagen_vq, "TERMS", replace(llamagen_vq.TERMS, start=1))
    given = options(squares)
    straight = run(recipes[recipe], given, tmp_path / "straight", steps=6)
    run(recipes[recipe], given, tmp_path / "stopped", steps=6, stop=2)
    assert run(recipes[recipe], given, tmp_path / "stopped", steps=6) == straight
    ends = [tmp_path / name / "final" / "diffusion_pytorch_model.safetensors" for name in ("straight", "stopped")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.parametrize(("recipe", "left"), [("vit-vqgan", 0.5), ("llamagen-vq", 0.8)])
def test_reconstructions_become_better(squares, tmp_path, monkeypatch, recipe, left):
    monkeypatch.setattr("argen.train.own.tokenizers.REVIVE_EVERY", 10)
    torch.manual_seed(0)
    task = task_of(recipe, squares)
    schedule = replace(RECIPES[recipe].SCHEDULE, steps=50, batch_size=4, learning_rate=1e-3, warmup=0)
    training = Training(task, schedule, tmp_path / "run", 0, "fp32")
    pixels = from_uint8(torch.stack([torch.tensor(np.asarray(square(task, index))) for index in range(12)]))

    @torch.no_grad()
    def error():
        return (task.networks["model"](pixels)[0] - pixels).square().mean().item()

    before = error()
    for _ in range(50):
        training.step()
    assert error() < left * before


def square(task, index):
    return crop(task.source.image(index), 32, "center", 0, 0, 0, 0)


def test_scores_and_samples_are_of_held_out_images(squares):
    task = task_of("vit-vqgan", squares)
    task.codes.data *= 5
    scores = task.evaluate()
    images = torch.stack([torch.tensor(np.asarray(square(task, index))) for index in range(3)])
    expected = reconstruction.evaluate(task.networks["model"], images)
    assert scores["PSNR (dB)"] == pytest.approx(expected["psnr"], rel=1e-5)
    assert scores["codes used"] == pytest.approx(expected["codes_used"])
    assert scores["rFID-emoji"] > 1
    torch.testing.assert_close(task.codes.norm(dim=-1), torch.ones(32))
    sheet = torch.tensor(np.asarray(task.sample()))
    assert sheet.shape == (64, 96, 3)
    assert torch.equal(sheet[:32, :32], images[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_folder_is_a_tokenizer(squares, tmp_path, capsys, recipe):
    assert train(recipe, squares, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "images: 11" in said
    assert "PSNR (dB)" in said
    final = tmp_path / "run" / "final"
    tokenizer = argen.load(final)
    assert tokenizer.config.image_size == 32
    torch.testing.assert_close(tokenizer.codebook.norm(dim=-1), torch.ones(32))
    image = str(squares / "0.png")
    assert main(["reconstruct", image, "--tokenizer", str(final), "-o", str(tmp_path / "again.png")]) == 0
    assert Image.open(tmp_path / "again.png").size == (32, 32)
    assert main(["train", recipe, "--images", str(squares), "--init", str(final), "--batch-size", "2", "--steps", "1",
                 "--out", str(tmp_path / "more")]) == 0  # fmt: skip
    assert argen.load(tmp_path / "more" / "final").config.image_size == 32


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_generator_learns_its_tokens(squares, tmp_path, recipe):
    assert train(recipe, squares, tmp_path / "vq") == 0
    for name in ("a", "b"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        write_squares(tmp_path / "classes" / name, 4)
    tokenizer = ["--tokenizer", str(tmp_path / "vq" / "final"), "--crops", "flip", "--size", "mini"]
    few = ["--steps", "1", "--batch-size", "2", "--out", str(tmp_path / "run")]
    assert main(["train", "llamagen", "--images", str(tmp_path / "classes"), *tokenizer, *few]) == 0
    pipe = argen.load(tmp_path / "run" / "final")
    assert pipe("class:a", generator=torch.Generator().manual_seed(0)).images[0].size == (32, 32)


def test_captions_of_some_images_alone_do_not_matter(squares, tmp_path):
    write_squares(tmp_path, 4)
    (tmp_path / "0.txt").write_text("a square")
    assert len(open_source(tmp_path, conditions=False)) == 4
    for number in range(4):  # a class has one image
        (tmp_path / "classes" / str(number)).mkdir(parents=True)
        (tmp_path / f"{number}.png").rename(tmp_path / "classes" / str(number) / "a.png")
    assert len(open_source(tmp_path / "classes", conditions=False)) == 4


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        ("vit-vqgan", ["--size", "Q"], "size is Q: expected small, base or mini"),
        ("llamagen-vq", ["--size", "Q"], "size is Q: expected VQ-16, VQ-8 or mini"),
        ("vit-vqgan", ["--image-size", "100"], "image_size is 100: expected a multiple of 8"),
        ("llamagen-vq", ["--image-size", "100", "--size", "VQ-8"], "image_size is 100: expected a multiple of 8"),
        ("vit-vqgan", ["--init", "argen/emoji-vae"], "argen/emoji-vae is no ViT-VQGAN: expected one to start from"),
        ("llamagen-vq", ["--init", "argen/emoji-vitvqgan"], "argen/emoji-vitvqgan is no VQ of LlamaGen"),
        ("vit-vqgan", ["--init", "argen/emoji-vitvqgan", "--image-size", "32"], "image_size is 32: expected "),
        ("vit-vqgan", ["--init", "argen/emoji-vitvqgan", "--size", "base"], "size is for a new network"),
        ("vit-vqgan", ["--size", "mini", "--tokenizer", "argen/emoji-vitvqgan"], "tokenizer is for generators"),
        ("vit-vqgan", ["--size", "mini", "--lora", "4"], "this recipe trains no LoRA"),
        ("llamagen-vq", ["--size", "mini", "--crops", "ten:1.1"], "crops is ten:1.1: expected center or flip"),
    ],
)
def test_what_cannot_be_trained_is_refused(squares, tmp_path, capsys, recipe, given, message):
    out = tmp_path / "run"
    assert main(["train", recipe, "--images", str(squares), "--out", str(out), "--steps", "1", *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.strip().count("\n") == 0
    assert not out.exists()


@pytest.mark.parametrize(("count", "message"), [(0, "no images in"), (1, "holds one image that can be used")])
def test_too_few_images_are_refused(tmp_path, capsys, count, message):
    (tmp_path / "images").mkdir()
    write_squares(tmp_path / "images", count)
    assert train("vit-vqgan", tmp_path / "images", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_small_images_are_enlarged_and_counted(squares, tmp_path, capsys):
    assert train("vit-vqgan", squares, tmp_path / "run", "--image-size", "64") == 0
    assert "smaller than 64 pixels: 11 images, enlarged" in capsys.readouterr().out


def after_steps(recipe: str, folder: Path, out: Path, micro: int | None) -> dict[str, torch.Tensor]:
    """Codes and reconstructions before and after a few steps in float32, in which dead codes are revived and the discriminator learns. Some
    weights before a group norm have no gradient but rounding errors, which Adam enlarges."""
    torch.manual_seed(0)
    task = task_of(recipe, folder)
    task.terms = replace(task.terms, start=0)
    schedule = replace(RECIPES[recipe].SCHEDULE, steps=20, batch_size=6, micro_batch=micro, warmup=0)
    training = Training(task, schedule, out, 0, "fp32")
    pixels, seen = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), {}
    for step in range(9):
        if step in (0, 8):
            decoded = training.model(pixels)[0].detach()
            seen |= {f"pixels {step}": decoded, f"codes {step}": task.codes.detach().clone()}
        training.step()
    return seen


def check_equal(one: dict[str, torch.Tensor], many: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, atol=1e-4, rtol=0)
    assert (one["pixels 8"] - one["pixels 0"]).abs().max() > 0.01
    assert (one["codes 8"] - one["codes 0"]).abs().max() > 0.1


@pytest.mark.parametrize("recipe", RECIPES)
def test_parts_of_a_batch_train_as_the_whole(squares, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr("argen.train.own.tokenizers.REVIVE_EVERY", 3)
    monkeypatch.setattr("argen.train.own.tokenizers.SEEN", 1)
    check_equal(*(after_steps(recipe, squares, tmp_path / str(micro), micro) for micro in (None, 4)))


SCRIPT = """
import sys
from pathlib import Path

import torch

from argen.train.own import llamagen_vq, tokenizers, vit_vqgan

sys.path.insert(0, sys.argv[1])
import test_own_tokenizers as tests

vit_vqgan.MINI, llamagen_vq.MINI = tests.VIT, tests.VQ
tokenizers.REVIVE_EVERY, tokenizers.SEEN = 3, 1
state = tests.after_steps(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), None)
if tokenizers.processes().is_main_process:
    torch.save(state, Path(sys.argv[4]) / "state.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_train_as_one(squares, tmp_path, recipe):
    (tmp_path / "train.py").write_text(SCRIPT)
    states = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if processes > 1 else []
        command = [sys.executable, *launch, str(tmp_path / "train.py"), str(Path(__file__).parent), recipe]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run([*command, str(squares), str(out)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        states.append(torch.load(out / "state.pt"))
    check_equal(*states)
