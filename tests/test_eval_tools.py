"""`argen eval bind|erase|count`, and `argen count`, as they are called; on a pipeline of random weights in the place of the shipped."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from argen.cli.main import main
from argen.cli.main import main as argen
from argen.diffusion.count_token import read_token
from argen.diffusion.model_settings import erasing
from argen.eval import tools
from argen.files import WEIGHTS
from argen.hub.loading import load_diffusion
from argen.models.counter import Counter
from argen.train.sd import UNET
from argen.ui.tabs import diffusion as page


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """The folder of shipped weights with an untrained emoji-sd and counter."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("emoji-clip", "emoji-vae", "emoji-judge"):
        (folder / name).symlink_to(WEIGHTS / name)
    torch.manual_seed(0)
    sizes = UNET | {"block_out_channels": (32,), "attention_head_dim": (1,)}
    unet = UNet2DConditionModel(sample_size=8, in_channels=16, out_channels=16, cross_attention_dim=192, **sizes)
    unet.save_pretrained(folder / "emoji-sd")
    Counter().save_pretrained(folder / "emoji-counter")
    monkeypatch.setattr("argen.hub.cards.WEIGHTS", folder)


def report(folder) -> dict[str, float]:
    return {name: entry["value"] for name, entry in json.loads((folder / "report.json").read_text())["scores"].items()}


def test_binding_is_measured_before_and_after(untrained, tmp_path):
    arguments = ["--num", "3", "--steps", "2", "--out", str(tmp_path / "b")]
    assert main(["eval", "bind", *arguments]) == 0
    scores = report(tmp_path / "b")
    for name in ("pair: binding", "pair: colour", "pair: identity"):
        assert scores[f"{name}, after: points"] == pytest.approx(
            100 * (scores[f"{name}, after"] - scores[f"{name}, before"])
        )
    images = [(tmp_path / "b" / when / "000000.png").read_bytes() for when in ("before", "after")]
    assert images[0] != images[1]


def test_erasing_is_measured_before_and_after(untrained, tmp_path):
    arguments = ["--num", "3", "--others", "4", "--steps", "2", "--out", str(tmp_path / "e")]
    assert main(["eval", "erase", "Pizzas, taxi", *arguments]) == 0
    scores = report(tmp_path / "e")
    assert {"erased: identity, before", "erased: identity, after", "erased: identity, derived embedding"} <= set(scores)
    assert {"others: identity, before", "others: identity, after"} <= set(scores)
    assert len(list((tmp_path / "e/after").glob("*/derived/*.png"))) == 6


def test_counting_is_measured_before_after_and_with_the_token_again(untrained, tmp_path):
    arguments = ["--num", "2", "--steps", "2", "--iterations", "2", "--noises", "2", "--out", str(tmp_path / "c")]
    assert main(["eval", "count", *arguments]) == 0
    scores = report(tmp_path / "c")
    ways = {
        f"{way}, count: count, {name}"
        for way in ("other things", "other noise", "both")
        for name in ("plain", "reused")
    }
    assert {"count: count, before", "count: count, after", *ways} <= set(scores)
    truths = tools.of_kind("count", 2)
    _, notes = read_token(tmp_path / "c/tokens/000000.safetensors")
    assert notes["count"] == str(len(truths[0].objects))


def test_a_token_is_made_and_used_again(untrained, tmp_path, capsys):
    files = {name: str(tmp_path / name) for name in ("five.png", "plain.png", "five.safetensors", "pears.png")}
    arguments = ["--model", "argen/emoji-sd", "--steps", "2"]
    outputs = ["-o", files["five.png"], "--plain", files["plain.png"], "--token", files["five.safetensors"]]
    assert argen(["count", "five apples", *arguments, *outputs, "--iterations", "2", "--noises", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "five apples"
    assert argen(["count", "five pears", *arguments, "-o", files["pears.png"], "--use", files["five.safetensors"]]) == 0
    assert "five pears" in capsys.readouterr().out
    for words, message in (
        (("six pears", "--use", files["five.safetensors"]), "is the token of 5 things"),
        (("pears",), "does not say how many of what"),
        (("0 pears",), "expected a whole number from 1 to 25"),
        (("5 pears", "--noises", "0"), "noises is 0: expected 1 to 64"),
        (("5 pears", "--use", str(tmp_path / "none.safetensors")), "no token at"),
    ):
        assert argen(["count", *words, *arguments, "-o", str(tmp_path / "x.png")]) == 2
        stderr = capsys.readouterr().err
        assert message in stderr
        assert stderr.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_an_erasure_is_verified(untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tools, "SHOWN", 0)  # networks without training show nothing
    arguments = ["erase", "pizza", "--model", "argen/emoji-sd", "--steps", "2", "-o", str(tmp_path / "clean")]
    assert argen([*arguments, "--verify", "3"]) == 0
    stdout = capsys.readouterr().out
    assert "without pizza" in stdout
    assert "pizza: before 0." in stdout
    assert "derived embedding 0." in stdout
    assert argen([*arguments[:-1], str(tmp_path / "again"), "--verify", "0"]) == 2
    assert "verify is 0: expected 1 to 1,000" in capsys.readouterr().err


def test_what_is_not_drawn_cannot_be_verified():
    """The judge knows a unicorn, which argen/emoji-sd does not draw: no score is given that cannot fail."""
    sums = {"unicorn": 0.0, "pizza": 0.75}
    scores = tools.verified(
        lambda **kwargs: kwargs,
        lambda: None,
        lambda concept: {},
        ["unicorn", "pizza", "nothing"],
        2,
        lambda _, name: sums[name],
        sums,
    )
    assert scores == {
        "unicorn": {"before": 0.0},
        "pizza": {"before": 0.75, "after": 0.75, "derived embedding": 0.75},
        "nothing": {},
    }
    assert [tools.in_words(scores[name]) for name in scores] == [
        "not verified, the model does not draw it (before 0.00)",
        "before 0.75, after 0.75, derived embedding 0.75",
        "not verified, the judge does not know it",
    ]
    names = ["unicorn", "red apple"]
    assert tools.drawn_name("argen/emoji-sd", names, "red apples") == "red apple"
    assert tools.drawn_name("somewhere", names, "Unicorns") == "unicorn"
    with pytest.raises(ValueError, match="argen/emoji-sd does not draw 'unicorn': expected one of apple"):
        tools.drawn_name("argen/emoji-sd", names, "unicorn")


def test_the_page_shows_how_a_token_gets_better(untrained):
    pipe = load_diffusion("argen/emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    updates = list(page.count(pipe, "argen/emoji-sd", "five apples", 2, 0.01, 0))
    stages = [state.partition(";")[0] for *_, state in updates]
    assert stages == ["after 0 of 2 steps", "after 1 of 2 steps"][: len(stages)]
    shown = [(before.tobytes() == after.tobytes(), state) for before, after, state in updates]
    assert all("counted" in state and same == ("after 0 steps" in state.partition("shown")[2]) for same, state in shown)
    assert updates[0][0].size == updates[-1][0].size == (256, 256)


def test_the_prompts_say_what_they_should():
    assert "a pizza, noto style" in tools.phrases("pizza")
    assert "an apple" in tools.phrases("apple")
    assert len(tools.of_concepts(["pizza", "robot"], 24)) == 48
    assert all(truth.objects[0][0] != "factory" for truth in tools.others_than(["factory"], 30))
    truths = tools.of_kind("count", 125)
    for truth in truths[:10]:
        number, things = tools.counted(truth)
        assert number == len(truth.objects)
        assert tools.elsewhere(truth, truths) != things


def test_all_other_things_are_retained():
    """By whole words: "sun" is none of "sunflower", while "a red cat" names "cat"."""
    retained = erasing("argen/emoji-sd", ["sunflower", "a red cat"], retained=["a spoon"])["retained"]
    assert {"sun", "a star, noto style", "a spoon"} <= set(retained)
    assert not {"sunflower", "cat"} & set(retained)
    plain = {"concepts": ["sunflower"], "targets": None, "preset": "object", "retained": []}
    assert erasing("somewhere", ["sunflower"]) == plain


def test_a_concept_is_erased_as_captions_have_it():
    kwargs = erasing("argen/emoji-sd", ["cat", "an apple"], targets=["dog", "pear"])
    assert kwargs["concepts"] == ["cat", "a cat", "apple", "an apple"]
    assert kwargs["targets"] == ["dog", "dog", "pear", "pear"]
    with pytest.raises(ValueError, match="1 targets for 2 concepts"):
        erasing("argen/emoji-sd", ["cat", "apple"], targets=["dog"])
