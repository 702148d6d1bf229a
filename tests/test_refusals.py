"""Bad input of the commands: one line, before anything is loaded or drawn, and nothing left behind."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from argen import device
from argen.cli.main import main
from argen.eval import run_dir
from argen.eval.images import FileList
from tokenizers_img.pixels import as_image

LONG = "9" * 5000


@pytest.fixture
def images(tmp_path):
    """A folder of four images of noise."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(4):
        values = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{seed}.png")
    return folder


def refused(capsys, *command: str) -> str:
    assert main(list(command)) == 2, command
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1, stderr
    assert len(stderr) < 400
    return stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["fid", "--crop", "square-99999999"],
            "unknown crop 'square-99999999': expected adm-SIZE or square-SIZE, 8 to 4096",
        ),
        (["fid", "--crop", "x"], "unknown crop 'x'"),
        (["fid", "--num", "-1"], "num is -1: expected 1 to 1,000,000"),
        (["fid", "--batch-size", "0"], "batch_size is 0: expected 1 to 4,096"),
        (["fid", "--metrics", "nope"], "unknown metric nope"),
        (["fid", "--protocol", "nope"], "unknown protocol 'nope'"),
        (["emoji", "--num", "999999999"], "num is 999999999"),
        (["emoji", "--tokens", "0"], "tokens is 0: expected 1 to"),
        (["emoji", "--tokens", "5", "--num", "2"], "num_tokens is 5: this model's images have 64 tokens"),
        (["emoji", "--model", "DIR", "--num", "2"], "is a folder: expected a checkpoint file"),
        (["emoji", "--seed", "99999999999"], "seed is 99999999999: expected 0 to 2,147,483,647"),
        (["bind", "--num", "-1"], "num is -1"),
        (["bind", "--settings", "nope"], "unknown settings 'nope'"),
        (["erase", "pizza", "--others", "-1"], "others is -1: expected 1 to 1,000"),
        (["erase", "pizza", "--preset", "nope"], "unknown preset 'nope'"),
        (["erase", "unicorn"], "argen/emoji-sd does not draw 'unicorn'"),
        (["count", "--noises", "65"], "noises is 65"),
        (["nudity", "--threshold", "nan"], "threshold is nan"),
        (["control", "--data", "PNG"], "0.png is no set of images: expected a folder, or a .zip, .npz or .parquet"),
        (["control", "--data", "BROKEN"], "cannot be read as a .parquet table"),
    ],
)
def test_a_refused_evaluation_leaves_no_folder(images, tmp_path, capsys, options, message):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1xx")
    files = {"DIR": str(tmp_path), "PNG": str(images / "0.png"), "BROKEN": str(tmp_path / "broken.parquet")}
    options = [files.get(option, option) for option in options]
    if options[0] == "fid":
        options += ["--samples", str(images), "--ref", str(images), "--features", "emoji"]
    if options[0] == "nudity":
        options += ["--samples", str(images)]
    out = tmp_path / "out"
    assert message in refused(capsys, "eval", *options, "--out", str(out), "--device", "cpu")
    assert not out.exists()


def test_an_evaluation_goes_on_when_a_broken_image_was_mended(images, tmp_path, capsys):
    arguments = [
        "eval",
        "fid",
        "--samples",
        str(images),
        "--ref",
        "emoji",
        "--features",
        "emoji",
        "--out",
        str(tmp_path / "out"),
    ]
    whole = (images / "2.png").read_bytes()
    (images / "2.png").write_bytes(whole[:60])
    assert "2.png could not be read" in refused(capsys, *arguments)
    (images / "2.png").write_bytes(whole)
    assert main(arguments) == 0
    capsys.readouterr()
    (images / "4.png").write_bytes(whole)  # the run is finished: what it says is kept
    assert "holds a run with another samples" in refused(capsys, *arguments)


def test_an_unfinished_run_of_changed_images_begins_again(tmp_path):
    run_dir.lock_run_dir(tmp_path / "a", {"samples": ["set", "1"], "crop": None})
    np.save(tmp_path / "a/features-000000000.npy", np.zeros(3))
    run_dir.lock_run_dir(tmp_path / "a", {"samples": ["set", "2"], "crop": None})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["settings.json"]
    assert json.loads((tmp_path / "a/settings.json").read_text())["samples"] == ["set", "2"]
    for other in ({"samples": ["another", "2"], "crop": None}, {"samples": ["set", "3"], "crop": "adm-256"}):
        with pytest.raises(ValueError, match="holds a run with another"):
            run_dir.lock_run_dir(tmp_path / "a", other)


@pytest.mark.parametrize(("files", "kept"), [((), False), (("samples/000000.png",), True)])
def test_a_mark_is_taken_away_where_nothing_was_made(tmp_path, files, kept):
    folder = tmp_path / "out"

    def stopped() -> None:
        with run_dir.released_if_empty(folder):
            run_dir.lock_run_dir(folder, {"num": 2})
            (folder / "samples").mkdir()
            for name in files:
                (folder / name).write_bytes(b"x")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        stopped()
    assert folder.exists() is kept


def test_litter_beside_images_is_skipped_and_said(images, caplog):
    for name in ("@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", ".ipynb_checkpoints/0-checkpoint.png", "sub/.hidden/a.png"):
        (images / name).parent.mkdir(parents=True)
        (images / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert FileList(images).names == ["0.png", "1.png", "2.png", "3.png"]
    assert "3 files that macOS left beside the images, or in hidden folders, are skipped" in caplog.text
    for name in ("@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "sub/.hidden/a.png"):
        (images / name).unlink()
    caplog.clear()
    assert len(FileList(images)) == 4
    assert "1 file that macOS left beside the images, or in hidden folders, is skipped" in caplog.text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bind", "a red cat and a dog", "-o", "OUT", "--device", "meta"], "device 'meta' cannot be used here"),
        (["bind", "a red cat and a dog", "-o", "OUT", "--plain", "OUT"], "is given for two files"),
        (["bind", "a red cat and a dog", "-o", "OUT", "--settings", "nope"], "unknown settings 'nope'"),
        (["count", "five cats", "-o", "OUT", "--plain", "OUT"], "is given for two files"),
        (["count", "five cats", "-o", "OUT", "--clip-count", "nope"], "has a counter of its own"),
        (["count", "five cats", "-o", "OUT", "--detector", "nope"], "has a counter of its own"),
        (["erase", "pizza", "-o", "DIR/new/a", "--preset", "nope"], "unknown preset 'nope'"),
        (["erase", "noto style", "-o", "DIR/new"], "no concept to erase"),
        (["generate", "a", "-o", "OUT", "--model", "argen/emoji-sd"], "is a diffusion pipeline, expected a generator"),
        (["generate", "a", "-o", "OUT", "--model", ""], "model is '': expected a name"),
        (["generate", "a", "-o", "OUT", "--model", "m" * 5000], "unknown model 'mmm"),
        (["generate", "a", "-o", "OUT", "--control", "a\0b"], "control is 'a\\x00b', with a zero byte"),
        (["grid", "a", "-o", "OUT", "--x", f"seed={LONG}"], "expected a whole number"),
        (["models", "--verify", ""], "unknown model ''"),
        (["models", "--delete", ""], "unknown model ''"),
    ],
)
def test_what_cannot_be_done_is_one_short_line(tmp_path, capsys, command, message):
    names = {"OUT": str(tmp_path / "x.png"), "DIR": str(tmp_path)}
    for short, path in names.items():
        command = [option.replace(short, path) for option in command]
    assert message in refused(capsys, *command)
    assert not list(tmp_path.iterdir())


def test_long_numbers_are_cut_in_errors(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "a", "-o", "x.png", "--seed", LONG])
    stderr = capsys.readouterr().err
    assert "seed is '9999" in stderr
    assert len(stderr) < 300


def test_a_device_must_hold_numbers(monkeypatch):
    with pytest.raises(ValueError, match="device 'meta' cannot be used here .*: expected cpu, cuda or mps"):
        device.pick("meta")
    with pytest.raises(ValueError, match="device 'nnn") as error:
        device.pick("n" * 5000)
    assert len(str(error.value)) < 300
    assert device.pick("cpu").type == "cpu"


def test_python_without_docstrings_is_one_line():
    done = subprocess.run([sys.executable, "-OO", "-m", "argen", "models"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "argen models: error: python -OO takes away texts that diffusers needs: use python -O\n"


def test_images_are_taken_as_diffusers_takes_them():
    values = np.random.default_rng(0).integers(0, 255, (8, 6, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    tensor = torch.from_numpy(values).permute(2, 0, 1)
    for one in (
        image,
        values,
        values[None],
        values / 255,
        tensor,
        tensor[None],
        tensor / 255,
        (tensor / 255).bfloat16().float(),
    ):
        pixels = np.asarray(as_image(one)).astype(int)
        assert np.abs(pixels - values).max() <= 1
    chosen = values[..., 0] > 99
    for one in (
        chosen,
        chosen[None],
        chosen[..., None],
        torch.from_numpy(chosen),
        torch.from_numpy(chosen)[None, None].float(),
    ):
        assert np.array_equal(np.asarray(as_image(one)), 255 * chosen)
    for wrong, message in (
        ([1, 2], "the mask is a list: expected an image of Pillow"),
        (np.zeros((2, 8, 8, 3)), "the mask has the shape"),
        (np.full((8, 8), 300), "the mask holds int64 out of range"),
        (np.full((8, 8), -1.0), "the mask holds float64 out of range"),
        (torch.zeros(5, 8, 8), "the mask has the shape"),
        (np.zeros((0, 8)), "the mask has the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            as_image(wrong, "the mask")


def test_an_edit_takes_arrays_and_tensors(pipe):
    values = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    mask = np.zeros((128, 128), bool)
    mask[64:] = True
    first = pipe.without(Image.fromarray(values), Image.fromarray(mask))
    for one, other in (
        (values, mask),
        (torch.from_numpy(values).permute(2, 0, 1)[None] / 255, torch.from_numpy(mask).float()),
    ):
        assert torch.equal(pipe.without(one, other), first)


def test_a_run_of_other_weights_is_told_in_words(tmp_path, capsys):
    arguments = ["eval", "emoji", "--num", "2", "--model", "argen/emoji-parti", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    capsys.readouterr()
    for options, words in (
        (("--quantize", "int8"), "other weights of the model (or quantized in another way)"),
        (("--dtype", "bf16"), "dtype float32, not bfloat16"),
    ):
        line = refused(capsys, *arguments, *options)
        assert f"holds a run with {words}: choose another --out, or load the model as then" in line
