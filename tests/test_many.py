"""Tables of requests, and grids of one under several settings: by the commands."""

import csv
import json
import re

import pytest
import torch
from PIL import Image

import argen
from argen.cli.main import main
from argen.jobs.tables import Axis, expand_axes, grid_image, read_table
from argen.request import Request


def test_a_table_is_drawn_and_gone_on_with(tmp_path, capsys):
    table, out = tmp_path / "requests.csv", tmp_path / "out"
    table.write_text('prompt,seed,num_images,temperature\n"a red apple, noto style",3,2,\na cat,,,0.5\n')
    assert main(["batch", str(table), "-o", str(out), "--device", "cpu", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [file.rpartition("/")[2] for file in files] == ["00001-1.png", "00001-2.png", "00002-1.png"]
    rows = list(csv.DictReader((out / "pictures.csv").open()))
    assert [(row["prompt"], row["seed"], row["num_images"]) for row in rows] == [
        ("a red apple, noto style", "3", "1"),
        ("a red apple, noto style", "4", "1"),
        ("a cat", "0", "1"),
    ]
    kept, gone = (out / "00001-1.png").stat().st_mtime_ns, (out / "00002-1.png").read_bytes()
    (out / "00002-1.png").unlink()
    assert main(["batch", str(table), "-o", str(out), "--device", "cpu"]) == 0
    assert (out / "00001-1.png").stat().st_mtime_ns == kept
    assert (out / "00002-1.png").read_bytes() == gone
    table.write_text(table.read_text().replace(",3,", ",5,"))
    capsys.readouterr()
    assert main(["batch", str(table), "-o", str(out), "--device", "cpu"]) != 0
    assert "00001-1.png was made with other settings than row 1 has" in capsys.readouterr().err


def test_json_lines_are_read(tmp_path):
    table = tmp_path / "requests.jsonl"
    table.write_text('{"prompt": "a cat", "guidance_scale": 2.5}\n\n{"prompt": "a dog", "model": "argen/emoji-xar"}\n')
    first, second = read_table(table, model="argen/emoji-llamagen")
    assert first == Request("a cat", model="argen/emoji-llamagen", guidance_scale=2.5)
    assert second.model == "argen/emoji-xar"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,seed\na cat,x\n", "line 2 of a.csv: seed is 'x': expected a whole number"),
        ("a.csv", "prompt,colour\na cat,red\n", "line 2 of a.csv: unknown setting 'colour'"),
        ("a.csv", "prompt\na cat,red\n", "line 2 of a.csv: it has more values than the first line has names"),
        ("a.csv", "seed\n3\n", "the first line of the table names no column prompt"),
        ("a.csv", "prompt\n", "a.csv has no rows"),
        ("a.csv", "prompt,temperature\na cat,inf\n", "line 2 of a.csv: temperature is inf"),
        (
            "a.csv",
            'prompt,seed\n"a cat,3\na dog,4\na fox,5\n',
            "line 2 of a.csv is no row of a table (a quote that it opens is never",
        ),
        ("a.csv", 'prompt,seed\n"a cat,3\n"a dog",4\n', "line 2 of a.csv is no row of a table"),
        (
            "a.csv",
            f"prompt,seed\na cat,{'9' * 5000}\n",
            f"line 2 of a.csv: seed is '{'9' * 57}...': expected a whole number",
        ),
        ("a.csv", "prompt,seed\nNone,3\n", "line 2 of a.csv: no prompt: say what to draw"),
        ("a.jsonl", "{}", "line 1 of a.jsonl: no prompt"),
        ("a.jsonl", '{"prompt": "a", "model": ""}', "line 1 of a.jsonl: model is '': expected a name"),
        ("a.jsonl", '{"prompt": "a", "seed": "x"}', "line 1 of a.jsonl: seed is 'x': expected a whole number"),
        ("a.jsonl", '{"prompt": "a", "seed": %s}' % ("9" * 5000), "line 1 of a.jsonl: a number has 5,000 digits"),
        ("a.jsonl", '{"prompt": "a", "temperature": Infinity}', "line 1 of a.jsonl: temperature is inf"),
        ("a.jsonl", '{"prompt": "a cat"}\n[1]\n', "line 2 of a.jsonl: expected an object"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1 of a.jsonl: prompt is 3: expected text"),
        ("a.jsonl", "{\n", "line 1 of a.jsonl: "),
        ("a.txt", "a cat\n", "a.txt is no table"),
        ("a.csv", "prompt\n" + "a cat\n" * 1001, "a.csv has more than 1,000 rows"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_table(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"model": "argen/none"}, "unknown model 'argen/none'"),
        ({"model": "argen/emoji-clip"}, "argen/emoji-clip is an encoder"),
        ({"num_tokens": 3}, "this model's images have"),
        ({"num_beams": 2}, "only images of ordered tokens"),
        ({"sampler": "euler"}, "this model writes tokens"),
        ({"prompt": "class:zebra", "model": "argen/emoji-llamagen"}, "no class is named 'zebra'"),
    ],
)
def test_every_row_is_checked_before_the_first_is_drawn(tmp_path, capsys, row, message):
    table, out = tmp_path / "t.jsonl", tmp_path / "out"
    table.write_text("\n".join(json.dumps({"prompt": "a cat"} | more) for more in ({}, row)))
    assert main(["batch", str(table), "-o", str(out), "--device", "cpu"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("argen batch: error: row 2: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not out.exists()


def test_what_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("prompt\na cat\n")
    (tmp_path / "good.png").write_bytes(b"x")
    for name in ("k-1.png", "g2.csv"):
        (tmp_path / name).mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    out = str(tmp_path) + "/"
    for command in (
        *(["batch", f"{out}t.csv", "-o", f"{out}{name}"] for name in ("good.png", "good.png/x", "x" * 256, "a\0b")),
        ["batch", f"{out}t.csv", "-o", "/proc/x"],
        ["generate", "a cat", "-o", f"{out}k.png", "-n", "2"],
        ["grid", "a cat", "--x", "seed=1,2", "-o", f"{out}g2.png"],
        ["erase", "pizza", "-o", f"{out}good.png/x"],
        ["erase", "pizza", "-o", "/proc/x"],
        ["erase", "pizza", "-o", f"{out}{'x' * 256}"],
    ):
        assert main(command) == 2, command
        stderr = capsys.readouterr().err
        assert "cannot write" in stderr or "zero byte" in stderr, stderr
        assert "%" not in stderr
        assert stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_grid_is_drawn(tmp_path, capsys):
    out = tmp_path / "grid.png"
    axes = ["--x", "guidance_scale=1,4,7", "--y", "prompt=a cat|a red apple, noto style"]
    assert main(["grid", "a cat", *axes, "--seed", "7", "-o", str(out), "--device", "cpu"]) == 0
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [(row["guidance_scale"], row["prompt"], row["seed"]) for row in rows] == [
        (guidance, prompt, "7") for prompt in ("a cat", "a red apple, noto style") for guidance in ("1.0", "4.0", "7.0")
    ]
    with Image.open(out) as image:
        assert image.width > 3 * 128
        assert image.height > 2 * 128


def test_every_image_of_a_grid_stands_under_its_values():
    axes = [Axis.parse("seed=1,2,3"), Axis.parse("temperature=0,1"), Axis.parse("top_k=5,50")]
    requests = expand_axes(Request("a cat", num_images=4), axes)
    assert [request.num_images for request in requests] == [1] * 12
    colours = [(255, 0, 20 * number) for number in range(12)]
    page = grid_image([Image.new("RGB", (60, 50), colour) for colour in colours], axes)
    seen = [page.getpixel((x, y)) for y in range(page.height) for x in range(page.width)]
    assert [colour for colour in dict.fromkeys(seen) if colour in colours] == colours
    assert all(seen.count(colour) == 60 * 50 for colour in colours)
    assert [(r.seed, r.temperature, r.top_k) for r in requests[:4]] == [(1, 0, 5), (2, 0, 5), (3, 0, 5), (1, 1, 5)]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["colour=red"], "unknown setting 'colour'"),
        (["seed"], "the axis 'seed' has no values"),
        (["seed=1,,2"], "the axis 'seed=1,,2' has no values"),
        (["seed=1,b"], "seed is 'b': expected a whole number"),
        (["seed=1", "seed=2"], "the axes are seed, seed"),
        (["num_images=1,2"], "num_images cannot be an axis"),
        (["seed=" + ",".join(map(str, range(101)))], "the grid has 101 images"),
        (["guidance_scale=1,-2"], "guidance_scale is -2.0"),
    ],
)
def test_a_bad_grid_is_refused(axes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        expand_axes(Request("a cat"), [Axis.parse(text) for text in axes])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--dtype", "bf16"],
            "was made by dtype fp32, not bf16: choose another --out, or load the model as then",
        ),
        (["--quantize", "int8"], "was made by quantize none, not int8: choose another --out, or load"),
        (["--model", "copy"], "was made with other settings than row 1 has"),
    ],
)
def test_a_folder_that_other_settings_of_loading_drew_is_not_taken_for_ones_own(tmp_path, capsys, options, message):
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("prompt,seed\na cat,1\na dog,2\n")
    assert main(["batch", str(table), "-o", str(out), "--json"]) == 0
    (out / "00002-1.png").unlink()
    if "copy" in options:
        argen.load("argen/emoji-parti").save_pretrained(tmp_path / "copy")
        options = ["--model", str(tmp_path / "copy")]
    capsys.readouterr()
    assert main(["batch", str(table), "-o", str(out), *options]) == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors)
    assert not (out / "00002-1.png").exists()  # nothing is drawn before
    assert main(["batch", str(table), "-o", str(out), "--json"]) == 0
    assert (out / "00002-1.png").exists()


def test_a_saved_pipeline_that_was_trained_again_is_noticed(tmp_path, capsys):
    table, out, folder = tmp_path / "t.csv", tmp_path / "out", tmp_path / "mine"
    table.write_text("prompt\na cat\n")
    pipe = argen.load("argen/emoji-parti")
    pipe.save_pretrained(folder)
    command = ["batch", str(table), "-o", str(out), "--model", str(folder), "--json"]
    assert main(command) == 0
    with torch.no_grad():
        pipe.transformer.embed_tokens.weight.mul_(2)
    pipe.save_pretrained(folder)
    capsys.readouterr()
    assert main(command) == 2
    assert "was made by other weights of the model" in capsys.readouterr().err


def test_a_table_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["batch", str(tmp_path / "no.csv"), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"argen batch: error: {tmp_path / 'no.csv'}: no such file or directory\n"
    assert not (tmp_path / "out").exists()
