"""Every image that a command writes says what made it."""

import json

import numpy as np
import pytest
from PIL import Image

from argen import __version__
from argen.cli.main import main


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)).save(path)
    main(["tokenize", str(path)])
    return path


BIND = ["bind", "a blue robot and a green pizza", "--steps", "2", "--seed", "3"]
COMMANDS = {
    "bind": (BIND, {"prompt": BIND[1], "seed": 3, "num_inference_steps": 2, "model": "argen/emoji-sd"}),
    "count": (["count", "five apples", "--iterations", "1", "--seed", "2"], {"prompt": "five apples", "seed": 2}),
    "grid": (["grid", "a pizza", "--x", "seed=0,1"], {"prompt": "a pizza", "x": "seed=0,1"}),
    "reconstruct": (["reconstruct", "PHOTO"], {"tokenizer": "argen/emoji-vitvqgan"}),
    "detokenize": (["detokenize", "TOKENS"], {"tokenizer": "argen/emoji-vitvqgan"}),
    "control": (["control", "PHOTO", "--type", "canny"], {"type": "canny", "size": [128, 128]}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_image_says_which_command_made_it(command, photo, tmp_path, capsys):
    arguments, settings = COMMANDS[command]
    files = {"PHOTO": str(photo), "TOKENS": str(photo.with_suffix(".npz"))}
    out = tmp_path / "out.png"
    assert main([*(files.get(text, text) for text in arguments), "-o", str(out)]) == 0
    info = Image.open(out).info
    assert settings.items() <= json.loads(info["argen command"]).items()
    assert json.loads(info["argen command"])["command"] == command
    made_by = json.loads(info["argen version"])
    assert made_by["argen"] == __version__
    assert command == "control" or len(made_by["weights"]) == 16

    capsys.readouterr()
    assert main(["generate", "--from", str(out), "-o", str(tmp_path / "again.png")]) == 2
    error = capsys.readouterr().err
    assert f"was made by `argen {command}`, which generate cannot repeat" in error
    assert error.count("\n") == 1


def test_a_question_to_a_model_that_only_writes_captions_is_refused(photo, capsys):
    assert main(["describe", str(photo), "what colour is it?"]) == 2
    error = capsys.readouterr().err
    assert "argen/emoji-seed-lm only writes captions: leave the question out" in error
    assert "AILab-CVC/seed-llama-8b-sft" in error
    assert main(["describe", str(photo), "--model", "argen/emoji-parti"]) == 2
    assert "e.g. argen/emoji-seed-lm" in capsys.readouterr().err
