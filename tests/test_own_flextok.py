"""FlexTok on own images: what is learned, exact resume, what is written, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import argen
from argen.cli.main import main
from argen.registry import recipes
from argen.train.loop import Training
from argen.train.own import flextok
from argen.train.own.options import OwnOptions
from argen.train.own.run import run
from argen.train.sources import open_source
from tokenizers_img.kl_vae import KLVAE
from tokenizers_img.pixels import from_pil

TINY = {
    "levels": (5, 5, 5),
    "registers": 6,
    "encoder_dim": 64,
    "encoder_depth": 1,
    "decoder_dim": 64,
    "decoder_depth": 2,
    "patch": 1,
    "rank": 8,
}
SIDE = 64


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("ARGEN_CACHE", str(tmp_path_factory.getbasetemp() / "flextok-cache"))
    monkeypatch.setattr(flextok, "MINI", TINY)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder, chance = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for number in range(12):
        image = np.full((80, 70, 3), chance.integers(255, size=3), np.uint8)
        image[8:48, number : number + 40] = chance.integers(255, size=3)
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def options(folder: Path, **more) -> OwnOptions:
    given = {"size": "mini", "image_size": SIDE, "batch_size": 4, "evaluate_every": 2, "learning_rate": 2e-3}
    return OwnOptions(images=str(folder), **given | {"warmup": 0} | more)


def task_of(folder: Path, **more) -> flextok.OwnFlexTokTask:
    source = open_source(folder, conditions=False)
    return flextok.prepare(options(folder, **more), source, source.subset(range(3)))


def train(folder, out, *more):
    few = ["--steps", "2", "--batch-size", "4", "--evaluate-every", "2"]
    return main(["train", "flextok", "--images", str(folder), "--out", str(out), *few, *more])


def test_latents_and_patches_are_those_of_the_crops(squares):
    torch.manual_seed(0)
    task = task_of(squares)
    batch = task.batch(4, torch.Generator().manual_seed(0))
    batch["drawn"].zero_()
    read = task.read(batch)
    pixels = torch.stack([from_pil(crop(squares, int(index)), SIDE) for index in batch["image"]])
    pixels = torch.where(batch["crop"].view(-1, 1, 1, 1) == 1, pixels.flip(-1), pixels)
    assert torch.allclose(read["latents"], KLVAE(task.vae.vae).encode(pixels), atol=5e-3)
    assert read["patches"].shape == (4, 16, task.width)
    assert batch["keep"].tolist() == read["keep"].tolist()
    velocity, patches = task.networks["model"](
        *(read[name] for name in ("latents", "noise", "times", "keep", "dropped"))
    )
    assert not velocity.any()  # what a new network gives
    assert patches.shape == read["patches"].shape
    assert task.flow_error(task.networks["model"], read)[0].item() == pytest.approx(
        (read["noise"] - read["latents"]).square().mean().item()
    )


def crop(folder: Path, index: int) -> Image.Image:
    return flextok.crop_adm(open_source(folder, conditions=False).image(index), SIDE)


def test_few_tokens_are_seen_in_training(squares):
    torch.manual_seed(0)
    task = task_of(squares, dropped=0.5)
    drawn = task.batch(2000, torch.Generator().manual_seed(0))
    keep = drawn["keep"]
    assert keep.min() == 1
    assert keep.max() == 6
    assert set(keep[1::2].tolist()) == {1, 2, 4}  # powers of two
    assert set(keep[::2].tolist()) == {1, 2, 3, 4, 5, 6}
    assert drawn["dropped"].float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert task_of(squares).null_share == 0.2


def test_the_flow_is_learned(squares, tmp_path):
    torch.manual_seed(0)
    task = task_of(squares, dropped=0.0)
    schedule = recipes["flextok"].scheduled(options(squares, batch_size=12), 60)
    training = Training(task, schedule, tmp_path / "run", 0, "fp32")
    vae, before = task.vae.vae.state_dict()["decoder.conv_out.weight"].clone(), task.evaluate()["held-out loss"]
    for _ in range(60):
        training.step()
    assert task.evaluate()["held-out loss"] < 0.8 * before
    assert training.log["apart"] < 0.8
    assert torch.equal(task.vae.vae.state_dict()["decoder.conv_out.weight"], vae)


def test_parts_of_a_batch_train_as_the_whole(squares, tmp_path):
    states = []
    for micro in (None, 4):
        torch.manual_seed(0)
        task = task_of(squares)
        schedule = recipes["flextok"].scheduled(options(squares, batch_size=10, micro_batch=micro), 5)
        training = Training(task, schedule, tmp_path / str(micro), 0, "fp32")
        for _ in range(3):
            training.step()
        states.append(training.model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=2e-4, rtol=0)


def test_a_stopped_run_goes_on_exactly(squares, tmp_path):
    straight = run(recipes["flextok"], options(squares), tmp_path / "straight", steps=4)
    run(recipes["flextok"], options(squares), tmp_path / "stopped", steps=4, stop=2)
    assert run(recipes["flextok"], options(squares), tmp_path / "stopped", steps=4) == straight
    ends = [tmp_path / name / "final" / "diffusion_pytorch_model.safetensors" for name in ("straight", "stopped")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_the_folder_is_a_tokenizer_that_trainings_start_from(squares, tmp_path, capsys):
    assert train(squares, tmp_path / "run", "--size", "mini", "--image-size", str(SIDE)) == 0
    said = capsys.readouterr().out
    assert "images: 11" in said
    assert "held-out loss" in said
    assert "psnr, 6 tokens" in said
    final = tmp_path / "run" / "final"
    tokenizer = argen.load(final)
    assert (tokenizer.config.image_size, tokenizer.config.tokens, tokenizer.config.n_embed) == (SIDE, 6, 125)
    assert (tokenizer.steps, tokenizer.guidance_scale) == (12, 3.0)
    image, again, tokens = str(squares / "0.png"), tmp_path / "again.png", tmp_path / "tokens.npz"
    assert main(["reconstruct", image, "--tokenizer", str(final), "-o", str(again)]) == 0
    assert Image.open(again).size == (SIDE, SIDE)
    assert main(["tokenize", image, "--tokenizer", str(final), "-o", str(tokens)]) == 0
    assert train(squares, tmp_path / "more", "--init", str(final), "--image-size", str(SIDE)) == 0
    weights = [argen.load(tmp_path / name / "final").network.state_dict() for name in ("run", "more")]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert "head" not in " ".join(weights[1])
    for name in ("a", "b"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(4):
            crop(squares, number).save(tmp_path / "classes" / name / f"{number}.png")
    few = ["--steps", "1", "--batch-size", "2", "--out", str(tmp_path / "ar"), "--size", "mini"]
    assert main(["train", "flexar", "--images", str(tmp_path / "classes"), "--tokenizer", str(final), *few]) == 0
    pipe = argen.load(tmp_path / "ar" / "final")
    assert pipe("class:a", generator=torch.Generator().manual_seed(0)).images[0].size == (SIDE, SIDE)


def test_the_shipped_one_goes_on(squares, tmp_path):
    task = task_of(squares, size=None, image_size=None, init="argen/emoji-flextok")
    batch = task.read(task.batch(2, torch.Generator().manual_seed(0)))
    assert "patches" not in batch
    name, loss = next(task.losses(batch, 0, log := {}))
    assert name == "model"
    assert 0 < loss.item() == log["flow"] < 1  # a new one begins at about 2


def test_sizes_are_the_published_ones():
    sizes = flextok.sizes()
    assert list(sizes) == ["d12-d12", "d18-d18", "d18-d28", "mini"]
    assert sizes["d18-d28"] == {
        "encoder_dim": 1152,
        "encoder_depth": 18,
        "decoder_dim": 1792,
        "decoder_depth": 28,
        "patch": 2,
    }
    with torch.device("meta"):
        count = sum(part.numel() for part in flextok.FlexTok(**sizes["d12-d12"]).parameters())
    assert count / 1e6 == pytest.approx(85.4 + 172.4, abs=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--size", "Q"], "size is Q: expected d12-d12, d18-d18, d18-d28 or mini"),
        ([], "a new network needs a VAE: give --tokenizer"),
        (
            ["--size", "mini", "--tokenizer", "argen/emoji-vitvqgan"],
            "argen/emoji-vitvqgan is no tokenizer that FlexTok",
        ),
        (["--size", "mini", "--image-size", "100"], "image_size is 100: expected a multiple of 16"),
        (["--init", "argen/emoji-vae"], "argen/emoji-vae is no FlexTok: expected one to start from"),
        (["--init", "argen/emoji-flextok", "--size", "mini"], "size is for a new network"),
        (["--init", "argen/emoji-flextok", "--tokenizer", "argen/emoji-vae"], "tokenizer is for a new network"),
        (["--init", "argen/emoji-flextok", "--image-size", "64"], "image_size is 64: expected 128"),
        (["--size", "mini", "--lora", "4"], "this recipe trains no LoRA"),
        (["--size", "mini", "--text-encoder", "argen/emoji-clip"], "text_encoder is for generators"),
        (["--size", "mini", "--crops", "five"], "unknown crops 'five'"),
    ],
)
def test_what_cannot_be_trained_is_refused(squares, tmp_path, capsys, given, message):
    assert train(squares, tmp_path / "run", *given) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_a_damaged_card_is_refused(squares, tmp_path):
    run(recipes["flextok"], options(squares), tmp_path / "run", steps=1)
    card = tmp_path / "run" / "final" / "argen.toml"
    card.write_text(card.read_text().replace("steps = 12", "steps = 0"))
    with pytest.raises(ValueError, match="steps is 0: expected 1 to 1,000"):
        argen.load(tmp_path / "run" / "final")
