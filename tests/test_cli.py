"""The command line, as a user types it: what it writes, and one clear line for what it cannot do."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import argen
from argen.cli.main import main
from argen.data import emoji
from argen.files import WEIGHTS, replacing
from argen.hub.cards import all_cards
from argen.metadata import TOKENS, read_request, save_tokens


@pytest.fixture(scope="module")
def apple(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "apple.png"
    assert main(["generate", "a red apple", "-o", str(path), "--seed", "3", "--temperature", "0.9"]) == 0
    return path


def refused(capsys, *argv: str) -> str:
    """Run a command that must fail; its one line on stderr."""
    try:
        code = main([str(part) for part in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_generate_writes_an_image_that_knows_its_settings(apple):
    assert Image.open(apple).size == (256, 256)
    request = read_request(apple)
    assert (request.prompt, request.seed, request.temperature) == ("a red apple", 3, 0.9)
    assert list(apple.parent.iterdir()) == [apple]


def test_an_image_is_made_again_from_itself(apple, tmp_path):
    assert main(["generate", "--from", str(apple), "-o", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == apple.read_bytes()
    assert main(["generate", "--from", str(apple), "--seed", "4", "-o", str(tmp_path / "other.png")]) == 0
    assert (tmp_path / "other.png").read_bytes() != apple.read_bytes()


def test_many_images_and_json(capsys, tmp_path):
    command = ["generate", "a pizza", "-n", "2", "--num-candidates", "4", "-o", str(tmp_path / "p.png"), "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p-1.png", "p-2.png"]
    assert [len(image["tokens"]) for image in report["images"]] == [64, 64]
    assert report["images"][0]["score"] >= report["images"][1]["score"]
    second = report["images"][1]
    assert main(["generate", "--from", second["file"], "-o", str(tmp_path / "alone.png")]) == 0
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "p-2.png").read_bytes()


def test_reconstruct(capsys, apple, tmp_path):
    assert main(["reconstruct", str(apple), "-o", str(tmp_path / "r.png"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["tokens"]) == 64
    assert report["psnr"] > 18
    assert Image.open(tmp_path / "r.png").size == (256, 256)


def test_tokens_in_a_file_give_the_image_back(capsys, apple, tmp_path):
    tokens = tmp_path / "apple.npz"
    assert main(["tokenize", str(apple), "-o", str(tokens), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["tokens"]) == 64
    assert main(["detokenize", str(tokens)]) == 0
    assert "apple.png (64 tokens of argen/emoji-vitvqgan)" in capsys.readouterr().out
    assert main(["reconstruct", str(apple), "-o", str(tmp_path / "r.png")]) == 0
    assert Image.open(tmp_path / "apple.png").tobytes() == Image.open(tmp_path / "r.png").tobytes()
    capsys.readouterr()
    other = refused(capsys, "detokenize", str(tokens), "--tokenizer", "dalle")
    assert "was made by argen/emoji-vitvqgan, not by dalle" in other
    assert "this tokenizer needs all of them" in refused(capsys, "detokenize", str(tokens), "--tokens", "8")
    wrong = {"few": report["tokens"][:9], "outside": [*report["tokens"][:63], 4096], "none": []}
    for name, ids in wrong.items():
        save_tokens(tmp_path / f"{name}.npz", "argen/emoji-vitvqgan", np.array(ids, dtype=np.int64))
    assert "got 9 tokens for an image: expected 64" in refused(capsys, "detokenize", str(tmp_path / "few.npz"))
    assert "token 4096 does not exist" in refused(capsys, "detokenize", str(tmp_path / "outside.npz"))
    assert "got 0 tokens" in refused(capsys, "detokenize", str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("no")
    assert "holds no tokens" in refused(capsys, "detokenize", str(tmp_path / "text.npz"))
    np.savez(tmp_path / "else.npz", other=np.zeros(3))
    assert "holds no tokens" in refused(capsys, "detokenize", str(tmp_path / "else.npz"))
    assert "ends in .npz" in refused(capsys, "tokenize", str(apple), "-o", str(tmp_path / "x.png"))
    assert not list(tmp_path.glob(".*"))


def test_reconstruct_takes_any_image(tmp_path):
    Image.new("LA", (300, 50), (0, 128)).save(tmp_path / "wide.png")
    assert main(["reconstruct", str(tmp_path / "wide.png")]) == 0
    assert (tmp_path / "wide-reconstructed.png").exists()


def test_models(capsys):
    assert main(["models", "--json"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == list(all_cards())
    assert main(["models"]) == 0
    listing = capsys.readouterr().out
    assert all(name in listing for name in all_cards())


def test_bad_input_is_one_line(capsys, apple, tmp_path):
    out = str(tmp_path / "x.png")
    assert "the prompt is empty" in refused(capsys, "generate", "", "-o", out)
    assert "10,000 characters" in refused(capsys, "generate", "a" * 10_000, "-o", out)
    assert "unknown model 'argen/nothing'" in refused(capsys, "generate", "a", "-o", out, "--model", "argen/nothing")
    assert "expected a generator" in refused(capsys, "generate", "a", "-o", out, "--model", "argen/emoji-clip")
    assert "expected a tokenizer" in refused(capsys, "reconstruct", str(apple), "--tokenizer", "argen/emoji-parti")
    assert "expected a whole number, 1 to 64" in refused(capsys, "generate", "a", "-o", out, "-n", "0")
    assert "num_images is 'two': expected a whole number" in refused(capsys, "generate", "a", "-o", out, "-n", "two")
    assert "seed is -1" in refused(capsys, "generate", "a", "-o", out, "--seed", "-1")
    assert "top_p is 2.0" in refused(capsys, "generate", "a", "-o", out, "--top-p", "2")
    assert "unknown sampler" in refused(capsys, "generate", "a", "-o", out, "--sampler", "magic")
    assert "device 'moon'" in refused(capsys, "generate", "a", "-o", out, "--device", "moon")
    assert "no prompt" in refused(capsys, "generate", "-o", out)
    assert "--out" in refused(capsys, "generate", "a")
    assert "a folder that exists" in refused(capsys, "generate", "a", "-o", str(tmp_path / "no" / "x.png"))
    assert "ends in .png" in refused(capsys, "generate", "a", "-o", str(tmp_path / "x.gif"))
    assert "no image at" in refused(capsys, "reconstruct", str(tmp_path / "no.png"))
    assert "no image at" in refused(capsys, "generate", "--from", str(tmp_path / "no.png"), "-o", out)
    assert "unknown recipe" in refused(capsys, "train", "emoji-x", "--data", "a", "--out", str(tmp_path / "t"))
    assert "no is not a folder: expected one made by" in refused(
        capsys, "train", "emoji-vitvqgan", "--data", "no", "--out", str(tmp_path / "t")
    )
    sample, steps = str(Path(emoji.__file__).parent / "sample"), ("--steps", "0")
    assert "steps is 0" in refused(capsys, "train", "emoji-vitvqgan", "--data", sample, "--out", out, *steps)
    assert "needs scenes" in refused(capsys, "train", "emoji-parti", "--data", sample, "--out", out)
    nowhere = "--vae", str(tmp_path / "no"), "--scenes", sample
    line = refused(capsys, "train", "emoji-xar", "--data", sample, "--out", out, *nowhere)
    assert f"no trained emoji-vae in {tmp_path / 'no'}: give --vae the folder" in line
    assert "num is 0" in refused(capsys, "data", "scenes", "--emoji", sample, "--out", out, "--num", "0")
    assert "is not empty" in refused(capsys, "data", "scenes", "--emoji", sample, "--out", sample)
    assert "size is 0" in refused(capsys, "data", "emoji", "--out", out, "--size", "0")
    assert "no split" in refused(capsys, "data", "scenes", "--emoji", "no", "--out", str(tmp_path / "s"))
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_none_of_ours(capsys, tmp_path):
    plain, text, cut = tmp_path / "plain.png", tmp_path / "text.png", tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(plain)
    text.write_text("no picture")
    cut.write_bytes(plain.read_bytes()[:500])
    out = str(tmp_path / "x.png")
    assert "holds no settings of argen" in refused(capsys, "generate", "--from", str(plain), "-o", out)
    for path in (text, cut):
        assert "could not be read as an image" in refused(capsys, "generate", "--from", str(path), "-o", out)
        assert "could not be read as an image" in refused(capsys, "reconstruct", str(path))


@pytest.mark.parametrize("part", ["transformer", "image_tokenizer", "clip"])
def test_corrupt_weights(capsys, pipe, tmp_path, part):
    pipe.save_pretrained(tmp_path / "saved")
    weights = next((tmp_path / "saved" / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100_000])
    capsys.readouterr()
    line = refused(capsys, "generate", "a", "-o", str(tmp_path / "x.png"), "--model", str(tmp_path / "saved"))
    assert "cannot be used" in line
    assert not (tmp_path / "x.png").exists()


def test_a_missing_part_of_the_weights_is_noticed(monkeypatch, tmp_path):
    """No layer is left at random numbers."""
    from safetensors.torch import load_file, save_file

    import argen

    folder = tmp_path / "emoji-vitvqgan"
    folder.mkdir()
    name = "diffusion_pytorch_model.safetensors"
    state = load_file(WEIGHTS / "emoji-vitvqgan" / name)
    state = {key: value for key, value in state.items() if not key.startswith("post_quant.")}
    save_file(state, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_bytes((WEIGHTS / "emoji-vitvqgan" / "config.json").read_bytes())
    monkeypatch.setattr("argen.hub.cards.WEIGHTS", tmp_path)
    with pytest.raises(ValueError, match="post_quant.weight"):
        argen.load("argen/emoji-vitvqgan")


def test_nothing_half_written_stays(monkeypatch, tmp_path):
    from argen.metadata import save_images

    image = Image.new("RGB", (8, 8))
    with pytest.raises(AttributeError):
        save_images([(image, None), (None, None)], [tmp_path / "a.png", tmp_path / "b.png"])
    assert list(tmp_path.iterdir()) == []


def test_published_weights_that_are_not_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    line = refused(capsys, "generate", "a", "-o", str(tmp_path / "x.png"), "--model", "dalle-mini")
    assert "could not be fetched from the hub" in line


def test_a_port_that_is_taken(capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = refused(capsys, "ui", "--port", port, "--data-dir", str(tmp_path / "pictures"))
    assert f"cannot serve on 127.0.0.1:{port}" in line


def test_import_is_light_and_the_command_is_there():
    result = subprocess.run(
        [sys.executable, "-c", "import sys, argen; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert result.stdout.strip() == "False"
    result = subprocess.run([sys.executable, "-m", "argen", "--help"], capture_output=True, text=True)
    assert "generate" in result.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bind", "a dog", "--steps", "-5"], "steps is -5: expected 1 to 1,000"),
        (["count", "five apples", "--iterations", "-1"], "iterations is -1: expected 1 to 1,000"),
        (["count", "five apples", "--noises", "1000000"], "noises is 1000000: expected 1 to 64"),
        (["count", "five apples", "--learning-rate", "nan"], "learning_rate is nan: expected a number"),
        (["generate", "a", "--steps", "1000000000", "--model", "argen/emoji-xar"], "steps is 1000000000"),
        (["generate", "a", "--steps", "10,1000000000", "--model", "argen/emoji-xar"], "steps is 1000000000"),
        (["generate", "a", "--sampler", "lantern:k=1000000000000"], "k is 1000000000000"),
        (["generate", "a", "--top-k", "1000000000000"], "top_k is 1000000000000"),
        (["generate", "a", "--temperature", "inf"], "temperature is inf: expected a number"),
        (["generate", "a", "--size", "99999x99999"], "size is 99999x99999: expected 1 to 4096 pixels"),
        (["erase", "pizza", "--verify", "0"], "verify is 0: expected 1 to 1,000"),
        (["erase", "pizza", "--epochs", "-1"], "epochs is -1: expected 0 to 1,000"),
    ],
)
def test_numbers_have_bounds(capsys, tmp_path, command, message):
    out = tmp_path / ("out" if command[0] == "erase" else "a.png")
    assert message in refused(capsys, *command, "-o", out)
    assert not list(tmp_path.iterdir())


def test_describe_ends_with_an_error(capsys, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for temperature in ("nan", "-1", "inf"):
        assert "temperature is" in refused(capsys, "describe", tmp_path / "a.png", "--temperature", temperature)


def test_an_error_while_a_model_writes_words_reaches_who_reads(monkeypatch):
    pipe = argen.load("argen/emoji-seed-lm")
    monkeypatch.setattr(pipe.transformer, "generate", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe.describe(Image.new("RGB", (64, 64)))


@pytest.mark.parametrize("length", [241, 251, 255, 300])
def test_long_names_are_refused_before_the_work(capsys, tmp_path, monkeypatch, length):
    monkeypatch.setattr("argen.cli.generate.load_model", None)  # which would fail
    out = tmp_path / f"{'x' * (length - 4)}.png"
    if length > 250:
        assert "its name is longer than 250 bytes" in refused(capsys, "generate", "a", "-o", out)
    else:
        with replacing(out) as file:
            file.write(b"x")
        assert out.read_bytes() == b"x"


def test_where_a_pipeline_goes_is_checked_before_the_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("argen.hub.loading.load_diffusion", None)
    (tmp_path / "file").write_text("x")
    assert "there already" in refused(capsys, "erase", "pizza", "-o", tmp_path)
    assert "expected the name of a new folder" in refused(capsys, "erase", "pizza", "-o", tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "message"),
    [
        ("argen/emoji-vitvqgan", np.full(64, 0.5), "expected a row of whole numbers"),
        ("argen/emoji-vitvqgan", np.zeros((8, 8), int), "expected a row of whole numbers"),
        ("argen/emoji-vitvqgan", np.zeros((16, 8, 8)), "expected a row of whole numbers"),
        ("argen/emoji-vitvqgan", np.array(3), "holds no tokens"),
        ("argen/emoji-vitvqgan", np.full(64, 99999), "token 99999 does not exist"),
        ("argen/emoji-vae", np.zeros((3, 8, 8)), "expected finite latents of 16 channels"),
        ("argen/emoji-vae", np.arange(64), "expected finite latents of 16 channels"),
        ("argen/emoji-vae", np.full((16, 8, 8), np.nan), "expected finite latents of 16 channels"),
        ("argen/emoji-vae", np.zeros((16, 0, 8)), "expected finite latents of 16 channels"),
        ("argen/emoji-vae", np.zeros((16, 2000, 2000), np.float16), "expected finite latents of 16 channels"),
    ],
)
def test_tokens_of_another_kind_are_refused(capsys, tmp_path, tokenizer, tokens, message):
    save_tokens(tmp_path / "a.npz", tokenizer, tokens)
    assert message in refused(capsys, "detokenize", tmp_path / "a.npz", "-o", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_an_image_is_made_in_another_size_on_request(tmp_path):
    whole, small = (str(tmp_path / name) for name in ("whole.png", "small.png"))
    assert main(["generate", "a red heart", "--seed", "1", "-o", whole]) == 0
    assert main(["generate", "a red heart", "--seed", "1", "--size", "128x96", "-o", small]) == 0
    wanted = ImageOps.pad(Image.open(whole), (128, 96), Image.Resampling.LANCZOS, color="white")
    assert (np.asarray(Image.open(small)) == np.asarray(wanted)).all()
    assert read_request(small) == read_request(whole)
    assert Image.open(small).info[TOKENS] == Image.open(whole).info[TOKENS]
