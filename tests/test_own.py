"""Trainings on own images, by the command: a folder in, a model out that `argen.load` reads."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

import argen
from argen.cli.main import main
from argen.jobs.trainings import read_log
from argen.registry import recipes
from argen.train import checkpoints
from argen.train.own import drafter, xar
from argen.train.own.latents import bits_of, moments_of
from argen.train.own.options import OwnOptions
from argen.train.own.run import opened, run
from tokenizers_img.kl_vae import KLVAE
from tokenizers_img.pixels import from_pil

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
    assert (pipe.card.takes, pipe.card.grid) == (("class",), True)
    assert pipe("class:blue", generator=torch.Generator().manual_seed(0)).images[0].size == (pipe.image_size,) * 2
    with pytest.raises(ValueError, match="no class is named 'yellow'"):
        pipe("class:yellow")
    assert main(["generate", "class:red", "--model", str(tmp_path / "run/final"), "-o", str(tmp_path / "a.png")]) == 0


MODELS = {"llamagen": "llamagen", "parti": "parti", "xar": "xar", "flexar": "flextok-ar"}


@pytest.mark.parametrize(("recipe", "model"), [(recipe, f"argen/emoji-{name}") for recipe, name in MODELS.items()])
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


@pytest.mark.parametrize(("recipe", "tokenizer"), [("xar", "argen/emoji-vae"), ("flexar", "argen/emoji-flextok")])
def test_classes_become_a_model_that_another_training_starts_from(classes, tmp_path, recipe, tokenizer):
    assert train(recipe, classes, tmp_path / "run", "--size", "mini", "--tokenizer", tokenizer) == 0
    pipe = argen.load(tmp_path / "run" / "final")
    assert pipe.class_of("class:green") == 1
    drawn = [pipe("class:green", generator=torch.Generator().manual_seed(0), output_type="pt").images for _ in range(2)]
    assert torch.equal(*drawn)
    (tmp_path / "others" / "yellow").mkdir(parents=True)
    for number in range(3):
        square("red", number).save(tmp_path / "others" / "yellow" / f"{number}.png")
    again = ["--init", str(tmp_path / "run" / "final"), "--crops", "center"]
    assert train(recipe, tmp_path / "others", tmp_path / "again", *again) == 0
    assert argen.load(tmp_path / "again" / "final").class_of("class:yellow") == 0


def test_xar_keeps_what_its_tokenizer_says(classes, tmp_path):
    """The cache holds the bits of float16 numbers."""
    numbers = torch.randn(3, 2, 4, 5, 5)
    bits = bits_of(numbers)
    assert bits.shape == (3, 200)
    assert torch.equal(moments_of(bits.long(), (4, 5, 5)), numbers.half().float())
    options = OwnOptions(images=str(classes), size="mini", tokenizer="argen/emoji-vae", batch_size=4)
    source = opened(options)
    task = xar.prepare(options, source, source)
    batch = task.batch(4, torch.Generator().manual_seed(0))
    batch["drawn"].zero_()
    latents = task.read(batch)["tokens"]
    pixels = torch.stack([from_pil(source.image(int(index)), 128) for index in batch["image"]])
    pixels = torch.where(batch["crop"].view(-1, 1, 1, 1) == 1, pixels.flip(-1), pixels)
    assert torch.allclose(latents, KLVAE(task.pipe.vae).encode(pixels), atol=5e-3)
    assert task.loss(task.networks["model"], task.read(batch)).item() > 0


def test_xar_falls_in_the_last_quarter():
    schedule = replace(xar.SCHEDULE, steps=800, warmup=100)
    rates = [schedule.rate(step) for step in (0, 99, 599, 600, 800)]
    assert rates == pytest.approx([4e-6, 4e-4, 4e-4, 4e-4, 1e-5], rel=1e-3)


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


def test_a_tracker_shows_losses_scores_and_samples(classes, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    new = ["--size", "mini", "--tokenizer", "argen/emoji-vitvqgan", "--crops", "center"]
    assert train("llamagen", classes, tmp_path / "run", *new, "--tracker", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    entry = read_log(tmp_path / "run" / "log.jsonl")[-1]
    assert {"loss", "rate", "gradient norm", "held-out loss", "seconds"} <= set(events.Tags()["scalars"])
    (shown,) = events.Scalars("held-out loss")
    assert (shown.step, shown.value) == (2, pytest.approx(entry["held-out loss"], rel=1e-5))
    sheet = Image.open(tmp_path / "run" / "sample-000002.png")
    (image,) = (
        events.Images("samples/image/0") if "samples/image/0" in events.Tags()["images"] else events.Images("samples")
    )
    assert (image.width, image.height) == sheet.size


def test_a_tracker_that_is_not_installed_is_named(classes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("argen.train.tracking.get_available_trackers", list)
    assert train("llamagen", classes, tmp_path / "run", "--tracker", "wandb") == 2
    assert capsys.readouterr().err.endswith("tracker is wandb, which is not installed: pip install wandb\n")
    assert not (tmp_path / "run").exists()


def test_options_come_from_a_file(classes, tmp_path, capsys):
    config = tmp_path / "mini.toml"
    config.write_text(
        'size = "mini"\ntokenizer = "argen/emoji-vitvqgan"\ncrops = "center"\nbatch-size = 7\nsteps = 99\n'
    )
    assert train("llamagen", classes, tmp_path / "run", "--config", str(config)) == 0
    schedule = checkpoints.recipe_of(tmp_path / "run" / "checkpoint")["schedule"]
    assert (schedule["steps"], schedule["batch_size"]) == (2, 4)  # of the command line
    capsys.readouterr()
    for text, message in (
        ("size = ", "is no TOML"),
        ("speed = 3", "has 'speed': expected options of own images"),
        ("batch-size = 0", "batch_size is 0: expected"),
        ("steps = 1.5", "steps is 1.5: expected a whole number"),
    ):
        config.write_text(text)
        arguments = [
            "train",
            "llamagen",
            "--images",
            str(classes),
            "--out",
            str(tmp_path / "no"),
            "--config",
            str(config),
        ]
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert main(["train", "emoji-parti", "--out", str(tmp_path / "no"), "--config", str(config)]) == 2
    assert "--config is for own images" in capsys.readouterr().err


def test_shards_need_gpus(classes, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    new = ["--size", "mini", "--tokenizer", "argen/emoji-vitvqgan", "--crops", "center"]
    for version, message in (("1", "fsdp_version is 1: expected 2"), ("2", "FSDP needs GPUs, and this runs on cpu")):
        monkeypatch.setenv("FSDP_VERSION", version)
        assert train("llamagen", classes, tmp_path / "run", *new) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.strip().count("\n") == 0


def test_the_last_checkpoints_are_kept(classes, tmp_path, monkeypatch):
    options = OwnOptions(
        images=str(classes),
        size="mini",
        tokenizer="argen/emoji-vitvqgan",
        crops="center",
        batch_size=2,
        evaluate_every=1,
        keep_checkpoints=3,
    )
    monkeypatch.setattr("argen.train.own.tokens.OwnTokensTask.sample", lambda task: Image.new("RGB", (8, 8)))
    out = tmp_path / "run"
    run(recipes["llamagen"], options, out, steps=5, stop=4)
    kept = {path.name: checkpoints.step_of(out) for path in out.glob("checkpoint*")}
    assert kept.keys() == {"checkpoint", "checkpoint-000003", "checkpoint-000002"}
    assert {checkpoints.damage(out / name) for name in kept} == {None}
    straight = run(recipes["llamagen"], options, out, steps=5)
    shutil.rmtree(out / "checkpoint")
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoint-000004")
    (out / "checkpoint-000003").rename(out / "checkpoint")
    assert checkpoints.step_of(out) == 3
    assert run(recipes["llamagen"], options, out, steps=5) == straight
    (out / "checkpoint" / "recipe.json").write_text("cut")
    (out / "checkpoint-000004" / "recipe.json").write_text("cut")
    assert checkpoints.find(PartialState(), out) == out / "checkpoint"  # what was kept before those that are damaged
    assert checkpoints.step_of(out) == 3


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
        ("xar", ["--tokenizer", "argen/emoji-vitvqgan"], "argen/emoji-vitvqgan is no tokenizer that xAR reads"),
        (
            "xar",
            ["--tokenizer", "argen/emoji-vae", "--image-size", "40"],
            "image_size is 40: expected a multiple of 32",
        ),
        ("xar", [], "a new network needs an image tokenizer"),
        ("xar", ["--init", "argen/emoji-xar"], "draws captions, and the images have classes"),
        ("flexar", ["--tokenizer", "argen/emoji-vae"], "argen/emoji-vae is no tokenizer that FlexAR reads"),
        ("flexar", ["--init", "argen/emoji-parti"], "argen/emoji-parti is no FlexAR"),
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


def test_a_drafter_of_a_controlar_sees_what_it_follows(captioned, tmp_path):
    options = OwnOptions(images=str(captioned), init="argen/emoji-control", dropped=0.0)
    source = opened(options)
    task = drafter.prepare(options, source, source)
    batch, target = task.read(task.batch(2, torch.Generator().manual_seed(0))), task.target
    hidden, count = task.hidden(batch), batch["tokens"].shape[1]
    predicted = target.output(hidden[:, -count - 1 : -1])
    expected = target(batch["condition"], batch["mask"], batch["tokens"], batch["control"])
    torch.testing.assert_close(predicted, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(predicted, target(batch["condition"], batch["mask"], batch["tokens"]), atol=0.1)
    assert train("drafter", captioned, tmp_path / "run", "--init", "argen/emoji-control") == 0
    pipe = argen.load(tmp_path / "run" / "final")
    control = {
        "control_image": square("red", 0),
        "control_type": "canny",
        "generator": torch.Generator().manual_seed(0),
    }
    output = pipe("a red square", sampler="speculative", **control)
    assert output.forward_passes < pipe.length + 2
    crops = ["--init", "argen/emoji-control", "--crops", "flip"]
    assert train("drafter", captioned, tmp_path / "other", *crops) == 2


@pytest.mark.parametrize("init", ["argen/emoji-control", "argen/emoji-llamagen"])
def test_a_controlar_follows_edges(captioned, tmp_path, init):
    assert train("controlar", captioned, tmp_path / "run", "--init", init, "--control", "canny") == 0
    pipe = argen.load(tmp_path / "run" / "final")
    image = pipe("a red square", control_image=square("red", 0), generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (pipe.image_size,) * 2
