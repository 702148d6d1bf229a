"""Trainings on own images, by the command: a folder in, a model out that `argen.load` reads."""

import numpy as np
import pytest
import torch
from PIL import Image

import argen
from argen.cli.main import main
from argen.registry import recipes
from argen.train.own.options import OwnOptions
from argen.train.own.run import run

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 60, 220)}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARGEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def square(colour: str, number: int) -> Image.Image:
    image = np.full((128, 128, 3), 255, np.uint8)
    image[20 + number : 90 + number, 30:100] = COLOURS[colour]
    return Image.fromarray(image)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    for colour in COLOURS:
        (folder / colour).mkdir()
        for number in range(6):
            square(colour, number).save(folder / colour / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    for colour in COLOURS:
        for number in range(4):
            square(colour, number).save(folder / f"{colour}{number}.png")
            (folder / f"{colour}{number}.txt").write_text(f"a {colour} square")
    return folder


def train(recipe, folder, out, *more):
    few = ["--steps", "2", "--batch-size", "4", "--evaluate-every", "2"]
    return main(["train", recipe, "--images", str(folder), "--out", str(out), *few, *more])


def test_llamagen_learns_classes_of_a_folder(classes, tmp_path, capsys):
    new = ["--size", "mini", "--tokenizer", "argen/emoji-vitvqgan", "--crops", "flip"]
    assert train("llamagen", classes, tmp_path / "run", *new) == 0
    said = capsys.readouterr().out
    assert "classes: 3" in said
    assert "held-out loss 8.3" in said  # ln 4096: the head begins at zero
    pipe = argen.load(tmp_path / "run" / "final")
    assert pipe.class_of("class:green") == 1
    assert pipe("class:blue", generator=torch.Generator().manual_seed(0)).images[0].size == (pipe.image_size,) * 2
    with pytest.raises(ValueError, match="no class is named 'yellow'"):
        pipe("class:yellow")
    assert main(["generate", "class:red", "--model", str(tmp_path / "run/final"), "-o", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize(("recipe", "model"), [("llamagen", "argen/emoji-llamagen"), ("parti", "argen/emoji-parti")])
def test_a_lora_learns_captions(captioned, tmp_path, recipe, model, capsys):
    rate = ["--learning-rate", "0.01", "--warmup", "0"]
    assert train(recipe, captioned, tmp_path / "run", "--init", model, "--lora", "4", *rate) == 0
    assert "captions: 11, for 11 of 11 images" in capsys.readouterr().out
    final = tmp_path / "run" / "final"
    assert {path.name for path in final.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "argen.toml"}
    pipe, plain = argen.load(final), argen.load(model)
    assert pipe.card.arguments["base"] == model
    changed = [
        name
        for name, value in pipe.transformer.state_dict().items()
        if not torch.equal(value, plain.transformer.state_dict()[name])
    ]
    assert changed
    assert all(name.endswith(".weight") and "norm" not in name for name in changed)
    again = argen.load(model, lora=f"{final}:1")
    assert all(
        torch.equal(value, again.transformer.state_dict()[name])
        for name, value in pipe.transformer.state_dict().items()
    )
    assert main(["generate", "a red square", "--model", str(final), "-o", str(tmp_path / "a.png")]) == 0


def test_a_new_network_learns_captions(captioned, tmp_path):
    assert train("parti", captioned, tmp_path / "run") == 0
    pipe = argen.load(tmp_path / "run" / "final")
    assert type(pipe).__name__ == "PartiPipeline"
    new = ["--size", "mini", "--tokenizer", "argen/emoji-vitvqgan", "--text-encoder", "argen/emoji-clip"]
    assert train("llamagen", captioned, tmp_path / "other", *new) == 0
    assert argen.load(tmp_path / "other" / "final").transformer.config.caption_attention


def test_the_second_start_goes_on_and_encodes_nothing(classes, tmp_path, monkeypatch):
    options = OwnOptions(
        images=str(classes),
        size="mini",
        tokenizer="argen/emoji-vitvqgan",
        crops="center",
        batch_size=4,
        evaluate_every=2,
    )
    straight = run(recipes["llamagen"], options, tmp_path / "straight", steps=4)
    run(recipes["llamagen"], options, tmp_path / "stopped", steps=4, stop=2)
    fail = lambda *_: pytest.fail("it was encoded before")  # noqa: E731
    monkeypatch.setattr("argen.train.token_cache.TokenCache._encode_shard", fail)
    again = run(recipes["llamagen"], options, tmp_path / "stopped", steps=4)
    assert again == straight
    weights = [argen.load(tmp_path / name / "final").transformer.state_dict() for name in ("straight", "stopped")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("llamagen", [], "a new network needs an image tokenizer"),
        (
            "llamagen",
            ["--tokenizer", "argen/emoji-vitvqgan", "--size", "Q"],
            "size is Q: expected B, L, XL, XXL, 3B or mini",
        ),
        ("llamagen", ["--tokenizer", "argen/emoji-vae"], "argen/emoji-vae is no tokenizer that LlamaGen reads"),
        ("llamagen", ["--init", "argen/emoji-parti"], "argen/emoji-parti is no LlamaGen"),
        ("llamagen", ["--init", "argen/emoji-llamagen"], "draws captions, and the images have classes"),
        ("llamagen", ["--init", "argen/emoji-llamagen", "--size", "B"], "size is for a new network"),
        ("llamagen", ["--tokenizer", "argen/emoji-vitvqgan", "--size", "mini", "--lora", "4"], "lora"),
        (
            "llamagen",
            ["--tokenizer", "argen/emoji-vitvqgan", "--size", "mini", "--image-size", "96"],
            "image_size is 96",
        ),
        ("parti", [], "have classes, and Parti reads captions"),
        ("llamagen", ["--data", "x"], "--data is of the shipped family: leave it out"),
        (
            "llamagen",
            ["--crops", "five", "--tokenizer", "argen/emoji-vitvqgan", "--size", "mini"],
            "unknown crops 'five'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(classes, tmp_path, capsys, recipe, options, message):
    assert train(recipe, classes, tmp_path / "run", *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_options_of_the_other_kind_are_refused(tmp_path, capsys):
    assert main(["train", "llamagen", "--out", str(tmp_path / "run")]) == 2
    assert "the recipe llamagen learns from your own images: give --images a folder" in capsys.readouterr().err
    assert main(["train", "emoji-parti", "--images", "x", "--out", str(tmp_path / "run")]) == 2
    assert "--images is for own images, and emoji-parti is of the shipped family" in capsys.readouterr().err


def test_a_drafter_of_a_generator(captioned, tmp_path):
    assert train("drafter", captioned, tmp_path / "run", "--init", "argen/emoji-llamagen") == 0
    pipe = argen.load(tmp_path / "run" / "final")
    assert pipe.drafter.length == pipe.transformer.length
    output = pipe("a red square", sampler="speculative", generator=torch.Generator().manual_seed(0))
    assert output.forward_passes < pipe.length + 2


@pytest.mark.parametrize("init", ["argen/emoji-control", "argen/emoji-llamagen"])
def test_a_controlar_follows_edges(captioned, tmp_path, init):
    assert train("controlar", captioned, tmp_path / "run", "--init", init, "--control", "canny") == 0
    pipe = argen.load(tmp_path / "run" / "final")
    image = pipe("a red square", control_image=square("red", 0), generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (pipe.image_size,) * 2
