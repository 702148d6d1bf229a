"""The judge of the emoji family: objects found, verdicts on pictures of known truth, the shipped network, the command."""

import json
from collections import Counter

import numpy as np
import pytest

from argen.cli.main import main
from argen.data import emoji, scenes
from argen.data.reading import plain, read
from argen.data.tables import pixels, read_split
from argen.eval import judge
from argen.eval.judge import Truth
from argen.hub.loading import load

SAMPLE = emoji.Path(emoji.__file__).parent / "sample"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
NAMES = {RED: ("apple", "red"), GREEN: ("pear", "green"), BLUE: ("plum", "blue")}


def painted(*squares: tuple[int, int, tuple[int, int, int]], side: int = 20) -> np.ndarray:
    """Squares (x, y of the left upper corner, colour) on white."""
    image = np.full((128, 128, 3), 255, np.uint8)
    for x, y, colour in squares:
        image[y : y + side, x : x + side] = colour
    return image


class Oracle:
    """Names a square by its colour."""

    class config:
        accuracy = {"pair: binding": 0.5}

    def answers(self, crops, among):
        labels = [NAMES[tuple((255 * crop[:, 32, 32]).round().int().tolist())] for crop in crops]
        return [[name, "cherry"] for name, _ in labels], [colour for _, colour in labels]


def verdict(image, kind, objects, relation=""):
    return judge.verdict(Oracle(), image, Truth("", kind, objects, relation))


def test_boxes_are_those_of_the_connected_parts():
    image = painted((5, 6, RED), (60, 6, GREEN), (80, 26, GREEN))  # the last two touch at a corner
    image[100:104, 100:104] = 0  # too small
    image[60:90, 0:4] = 250  # too light
    assert scenes.boxes(image) == [(60, 6, 100, 46), (5, 6, 25, 26)]
    assert scenes.boxes(painted()) == []


def test_an_image_of_the_truth_is_right_and_another_is_not():
    apple, pear = ("apple", "red"), ("pear", "green")
    one = painted((50, 50, RED))
    assert verdict(one, "single", (("apple", ""),)) == {"identity": 1, "name": 1}
    assert verdict(one, "single", (("cherry", ""),)) == {"identity": 1, "name": 0}  # among the most probable
    assert verdict(one, "single", (("pear", ""),)) == {"identity": 0, "name": 0}
    assert verdict(painted(), "colour", (apple,)) == {"identity": 0, "name": 0, "colour": 0}

    any_fruit = Truth("a fruit", "everyday", (("pear", "red"),), accepted=("plum", "apple"))
    assert judge.verdict(Oracle(), one, any_fruit) == {"identity": 1, "name": 1, "colour": 1}
    plum = painted((50, 50, BLUE))
    assert judge.verdict(Oracle(), plum, any_fruit) == {"identity": 1, "name": 1, "colour": 0}
    no_fruit = Truth("a dog", "everyday", (("dog", ""),), accepted=("dog face",))
    assert judge.verdict(Oracle(), one, no_fruit) == {"identity": 0, "name": 0}

    two = painted((10, 50, RED), (80, 52, GREEN))
    assert verdict(two, "pair", (apple, pear)) == {"identity": 1, "colour": 1, "binding": 1}
    swapped = (("apple", "green"), ("pear", "red"))
    assert verdict(two, "pair", swapped)["binding"] == 0
    assert verdict(one, "pair", (apple, pear)) == {"identity": 0, "colour": 0, "binding": 0}

    left = (("apple", ""), ("pear", ""))
    assert verdict(two, "relation", left, "to the left of") == {"identity": 1, "relation": 1}
    for wrong in ("to the right of", "above", "below"):
        assert verdict(two, "relation", left, wrong)["relation"] == 0
    assert verdict(two, "relation", left[::-1], "to the right of")["relation"] == 1

    three = painted((10, 10, RED), (80, 10, RED), (50, 80, GREEN))
    assert verdict(three, "count", (("apple", ""),) * 3) == {"count": 1, "identity": pytest.approx(2 / 3)}
    assert verdict(three, "count", (("apple", ""),) * 2)["count"] == 0


def test_scores_are_means_beside_what_the_judge_knows():
    images = [painted((10, 50, RED), (80, 52, GREEN)), painted((50, 50, RED))]
    truth = Truth("", "pair", (("apple", "red"), ("pear", "green")))
    scores = judge.evaluate(Oracle(), images, [truth])
    assert scores["pair: binding"] == {"value": 0.5, "n": 2, "judge_on_real": 0.5}
    assert scores["pair: identity"]["judge_on_real"] is None


def test_the_prompts_are_fixed_and_of_training_things():
    truths = judge.read_prompts()
    assert len(truths) == len({truth.prompt for truth in truths}) == 500
    assert Counter(truth.kind for truth in truths) == judge.SHARES
    network = load("argen/emoji-judge")
    assert {name for truth in truths for name, _ in truth.objects} <= set(network.config.names)
    assert {colour for truth in truths for _, colour in truth.objects} <= {"", *network.config.colours}
    assert {len(truth.objects) for truth in truths if truth.kind == "count"} == set(range(1, 7))


def test_the_everyday_prompts_are_read_as_what_counts_as_right():
    truths = judge.read_prompts(judge.EVERYDAY_PROMPTS)
    assert len(truths) == len({truth.prompt for truth in truths}) == 60
    for truth in truths:
        ((name, colour),) = truth.objects
        text = plain(read(truth.prompt).text)
        assert any(text.endswith(accepted) for accepted in (name, *truth.accepted)), truth.prompt
        assert colour in truth.prompt
    assert sum(bool(truth.objects[0][1]) for truth in truths) == 12


def test_drawn_prompts_are_kept_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "SHARES", {"single": 3, "colour": 2, "pair": 2, "count": 2, "relation": 2})
    truths = judge.draw_prompts(read_split(SAMPLE, "train"))
    assert Counter(truth.kind for truth in truths) == judge.SHARES
    assert truths == judge.draw_prompts(read_split(SAMPLE, "train"))
    judge.write_prompts(truths, tmp_path / "prompts.jsonl")
    assert judge.read_prompts(tmp_path / "prompts.jsonl") == truths


def test_the_shipped_judge_knows_real_images_and_not_noise(tmp_path):
    scenes.build(SAMPLE, tmp_path / "scenes", num=60)
    table = read_split(tmp_path / "scenes", "train")
    truths = list(judge.truths_of(table))
    network = load("argen/emoji-judge")
    real = {name: entry["value"] for name, entry in judge.evaluate(network, pixels(table), truths).items()}
    assert min(real[name] for name in ("count: count", "relation: relation", "pair: identity", "pair: colour")) > 0.5
    noise = np.random.default_rng(0).integers(0, 256, (60, 128, 128, 3), dtype=np.uint8)
    nothing = {name: entry["value"] for name, entry in judge.evaluate(network, noise, truths).items()}
    assert max(nothing[name] for name in ("pair: binding", "relation: relation", "pair: identity")) < 0.2
    assert all(0.4 < network.config.accuracy[name] <= 1 for name in real)


def test_the_groups_of_real_images_are_told_and_those_of_noise_are_not():
    icons, network = read_split(SAMPLE, "train"), load("argen/emoji-judge")
    real = pixels(icons)
    noise = np.random.default_rng(0).integers(0, 256, real.shape, dtype=np.uint8)
    scores = judge.recognised(network, real, noise, icons)
    assert scores["judge: group"]["value"] > 0.7
    assert scores["judge: group"]["n"] == len(icons)
    assert scores["judge: identity"]["value"] > 0.8
    assert scores["judge: identity"]["n"] == sum(name in network.config.names for name in icons["concept"])
    most = Counter(icons["group"]).most_common(1)[0][1] / len(icons)
    assert scores["judge: group"]["judge_on_real"] <= most  # which here is the noise: one answer for all at best
    assert scores["judge: identity"]["judge_on_real"] < 0.2


def test_the_command_judges_a_generator(tmp_path, capsys):
    assert main(["eval", "emoji", "--model", "argen/emoji-parti", "--num", "4", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    entry = report["scores"]["single: identity"]
    assert entry["n"] == 4
    assert entry["judge_on_real"] == load("argen/emoji-judge").config.accuracy["single: identity"]
    assert "on real held-out images" in capsys.readouterr().out
    assert (tmp_path / "out" / "grid.png").exists()


def test_the_command_judges_everyday_prompts(tmp_path, capsys):
    assert main(["eval", "everyday", "--num", "2", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["scores"]["everyday: name"] == {"value": 1, "n": 2, "judge_on_real": 0.6154}  # "car", "a car"
    assert "everyday: identity" in capsys.readouterr().out


def test_a_tokenizer_cannot_be_judged(tmp_path, capsys):
    assert main(["eval", "emoji", "--model", "argen/emoji-vitvqgan", "--out", str(tmp_path / "out")]) == 2
    assert "argen/emoji-vitvqgan is a tokenizer, expected a generator" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.json").exists()
