"""The commands on diffusers' pipelines, as a user calls them."""

import json

import pytest
from conftest import tiny_pipeline
from PIL import Image

from argen.cli.main import main


@pytest.fixture
def folder(golden, tmp_path):
    """A small SDXL pipeline of random weights."""
    tiny_pipeline(golden("tome/sdxl_attribute_binding")).save_pretrained(tmp_path / "sdxl")
    return tmp_path / "sdxl"


def test_bind_writes_both_images_and_says_what_it_understood(folder, tmp_path, capsys):
    arguments = "--model", str(folder), "--steps", "2", "--seed", "3"
    out, plain = tmp_path / "bound.png", tmp_path / "plain.png"
    assert (
        main(["bind", "a white dog and a black bird", "-o", str(out), "--plain", str(plain), *arguments, "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert [group["anchor"] for group in report["binding"]["groups"]] == ["a white dog", "a black bird"]
    assert len(report["steps"]) == 2
    assert Image.open(out).tobytes() != Image.open(plain).tobytes()
    assert main(["bind", "dog and bird, white", "-o", str(out), "--bind", "dog=white", *arguments]) == 0
    assert "dog <- white; merged: dog and bird" in capsys.readouterr().out


def test_erase_writes_a_pipeline(folder, tmp_path, capsys):
    clean = tmp_path / "clean"
    assert main(["erase", "teapot", "--model", str(folder), "-o", str(clean), "--retain", "a dog"]) == 0
    assert "without teapot" in capsys.readouterr().out
    assert json.loads((clean / "erased.json").read_text())["retained"] == ["a dog"]
    assert main(["bind", "a white dog", "--model", str(clean), "-o", str(tmp_path / "a.png"), "--steps", "1"]) == 0


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    out = "-o", str(tmp_path / "x.png")
    here = "--model", str(folder)
    for args, message in (
        (("bind", "a dog", *out, *here), "nothing to bind"),
        (("bind", "a white dog", *out, *here, "--bind", "dog"), "expected OBJECT=WORDS"),
        (("bind", "a white dog", *out, *here, "--bind", "cat=white"), "'cat' is not in the prompt"),
        (("bind", "a white dog", *out, *here, "--settings", "strong"), "unknown settings 'strong'"),
        (("bind", "a white dog", *out, "--model", str(tmp_path)), "expected a folder with a model_index.json"),
        (("bind", "a white dog", *out, "--model", "nobody/nothing"), "could not be fetched from the hub"),
        (("erase", " ", "-o", str(tmp_path / "e"), *here), "no concept to erase"),
        (("erase", "dog", "-o", str(folder), *here), "is there already"),
        (("erase", "dog", "-o", str(tmp_path / "e"), *here, "--target", "a", "--target", "b"), "2 targets for 1"),
    ):
        assert main(list(args)) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sdxl"]
