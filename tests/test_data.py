"""The picture sets: names, splits, rendering, composed truth."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from argen.cli.main import main
from argen.data import emoji, scenes
from argen.data.emoji import STYLES, split_of, split_tone, with_article
from argen.data.tables import read_split, write_splits

SAMPLE = emoji.__file__.replace("emoji.py", "sample")


@pytest.fixture(scope="module")
def icons(tmp_path_factory):
    """The icon packages and the names, as npm unpacks them, with a few shapes in each."""
    cache = tmp_path_factory.mktemp("icons")
    shapes = {
        "red-apple": {"body": '<circle cx="16" cy="16" r="12" fill="#d00"/>'},
        "pizza": {"body": '<path d="M2 2h28L16 30z" fill="#fa0"/>'},
        "wide-thing": {"body": '<rect width="64" height="16" fill="#00d"/>', "width": 64, "height": 16},
        "waving-hand-medium-dark": {"body": '<rect x="8" y="8" width="16" height="16" fill="#853"/>'},
        "secret": {"body": '<rect width="32" height="32"/>', "hidden": True},
    }
    for style in STYLES.values():
        folder = cache / f"{style.package.replace('/', '_')}-{style.version}"
        folder.mkdir()
        (folder / "icons.json").write_text(json.dumps({"width": 32, "height": 32, "icons": shapes}))
        (folder / "metadata.json").write_text(json.dumps({"categories": {"Objects": ["wide-thing"]}}))
    package, version = emoji.NAMES_PACKAGE
    folder = cache / f"{package}-{version}" / "en"
    folder.mkdir(parents=True)
    groups = [{"order": 0, "key": "food-drink"}]
    (folder / "messages.json").write_text(json.dumps({"groups": groups, "subgroups": groups}))
    named = [{"label": "Red Apple", "tags": ["fruit"]}, {"label": "Pizza"}, {"label": "Waving Hand"}]
    named = [{**name, "hexcode": str(number), "group": 0, "subgroup": 0} for number, name in enumerate(named)]
    (folder / "data.json").write_text(json.dumps(named))
    return cache


def test_names_and_captions():
    assert [with_article(name) for name in ("apple", "robot", "glasses", "2 keys")] == [
        "an apple", "a robot", "glasses", "2 keys",
    ]  # fmt: skip
    assert split_tone("waving-hand-medium-dark", {"waving-hand": {}}) == ("waving-hand", "medium dark")
    assert split_tone("man-dark-skin-tone-beard", {}) == ("man-beard", "dark")
    assert split_tone("new-moon-face", {}) == ("new-moon-face", "")
    row = {"name": "automobile", "concept": "automobile", "style": "noto", "keywords": ["driving"], "skin_tone": ""}
    texts = [emoji.caption(row, random.Random(i)) for i in range(400)]
    assert {"an automobile, noto style", "automobile", "a car, noto style", "a car", "a car, driving"} <= set(texts)
    named = sum("automobile" in text for text in texts) / len(texts)
    assert 0.4 < named < 0.6  # its everyday names are as frequent as its own
    assert [scenes.plural(name) for name in ("cat", "fox", "cherry", "brush")] == [
        "cats",
        "foxes",
        "cherries",
        "brushes",
    ]


def test_splits_are_fixed_and_hold_concepts_out():
    concepts = [f"thing {i}" for i in range(5000)]
    splits = {concept: {split_of(style, concept, 4) for style in STYLES} for concept in concepts}
    held_out = [concept for concept, of in splits.items() if "test" in of]
    assert all(splits[concept] == {"test"} for concept in held_out)
    assert 0.03 < len(held_out) / len(concepts) < 0.05
    assert split_of("noto", "coral", 4) == "test"  # fixed for ever
    assert split_of("noto", "duck", 4) != "test"  # its hash says so, but people ask for ducks
    assert all("validation" not in {split_of("noto", concept, 1)} for concept in concepts)


def test_render_pads_and_lies_on_white():
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 16" width="64" height="16"><rect width="64" height="16" fill="#00f"/></svg>'
    image = np.asarray(Image.open(io.BytesIO(emoji.render(svg, 128))))
    assert image.shape == (128, 128, 3)
    assert (image[:40] == 255).all()
    assert (image[60:68, 10:118] == (0, 0, 255)).all()


def test_build_writes_what_datasets_reads(icons, tmp_path, capsys):
    from datasets import load_dataset

    assert main(["data", "emoji", "--icons", str(icons), "--out", str(tmp_path / "emoji"), "--size", "64"]) == 0
    sets = load_dataset(str(tmp_path / "emoji"), cache_dir=str(tmp_path / "cache"))
    rows = [row for split in sets.values() for row in split]
    hands = [row for row in rows if row["concept"] == "waving hand"]
    assert len(rows) - len(hands) == 3 * len(STYLES)
    assert len(hands) < len(STYLES)
    apple = next(row for row in rows if row["name"] == "red apple" and row["style"] == "noto")
    assert apple["image"].size == (64, 64)
    assert (apple["caption"], apple["group"], apple["keywords"]) == ("a red apple, noto style", "food-drink", ["fruit"])
    assert apple["licence"] == "Apache-2.0"
    hand = next(row for row in rows if row["concept"] == "waving hand")
    assert (hand["name"], hand["skin_tone"]) == ("waving hand medium dark skin tone", "medium dark")

    capsys.readouterr()
    assert main(["data", "emoji", "--icons", str(icons), "--out", str(tmp_path / "emoji")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_shipped_sample():
    rows = [row for split in emoji.SPLITS for row in read_split(SAMPLE, split)]
    assert len(rows) == 64
    for style, source in STYLES.items():
        rows_of_style = [row for row in rows if row["style"] == style]
        assert len(rows_of_style) in (10, 12)
        assert {row["licence"] for row in rows_of_style} == {source.licence}
    for split in emoji.SPLITS:
        for row in read_split(SAMPLE, split):
            assert split_of(row["style"], row["concept"], 4) == split
            assert row["image"].size == (128, 128)


def test_scenes_tell_the_truth(tmp_path):
    """What a scene says of its objects is what is seen: the boxes hold all ink, in the named relation."""
    counts = scenes.build(SAMPLE, tmp_path / "scenes", num=60, seed=1)
    assert counts == {"train": 60, "validation": 6, "test": 6}
    kinds = set()
    for row in read_split(tmp_path / "scenes", "train"):
        things = json.loads(row["objects"])
        assert len(things) == row["count"]
        ink = (np.asarray(row["image"]) < 245).any(-1)
        for left, top, right, bottom in (thing["box"] for thing in things):
            assert ink[top:bottom, left:right].any()
            ink[top:bottom, left:right] = False
        assert not ink.any()
        kinds.add(row["kind"])
        assert all(
            thing["name"] in row["caption"] or scenes.plural(thing["name"]) in row["caption"] for thing in things
        )
        if row["kind"] == "relation":
            first, second = (thing["box"] for thing in things)
            axis, sign = {
                "to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1),
            }[row["relation"]]  # fmt: skip
            middle = [(box[axis] + box[axis + 2]) / 2 for box in (first, second)]
            assert sign * (middle[0] - middle[1]) > 0
    assert kinds == set(scenes.KINDS)


def test_scenes_are_the_same_for_the_same_seed(tmp_path):
    for name in ("one", "two"):
        scenes.build(SAMPLE, tmp_path / name, num=20, seed=7)
    one, two = (read_split(tmp_path / name, "train") for name in ("one", "two"))
    assert one["caption"] == two["caption"]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one["image"], two["image"], strict=True))


def test_a_set_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError):
        write_splits(tmp_path / "set", {"train": [{"image": b"", "a": 1}], "test": [{"b": 1}]})
    assert list(tmp_path.iterdir()) == []
