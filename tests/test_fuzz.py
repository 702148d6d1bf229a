"""Readers of files on thousands of broken ones: each is read, or refused in one line by an error that names the file."""

import io
import json
import random
import string
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from argen.hub.loading import load
from argen.images import open_image
from argen.jobs.tables import read_table
from argen.metadata import KEY, MADE_BY, TOKENS, differences, read_grid, read_request, read_tokens, save_tokens
from argen.request import Request

TRIES = 2000
NO_PIPELINE = SimpleNamespace(components={})
pytestmark = pytest.mark.slow
ODD = [
    None,
    True,
    False,
    0,
    -1,
    4.0,
    1e308,
    10**30,
    float("nan"),
    "",
    "a",
    "\ud83c",
    "a\0b",
    [],
    {},
    [[]],
    [1, [2]],
    "(1, 2)",
]


def value(rng: random.Random, depth: int = 0):
    """Anything that JSON can hold."""
    kind = rng.random()
    if depth > 2 or kind < 0.6:
        return rng.choice(ODD)
    if kind < 0.8:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice(["prompt", "seed", "control", "tokens", "_class_name", "x"]): value(rng, depth + 1) for _ in range(3)
    }


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Bytes of which some are changed, cut out, repeated or added."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[at % len(out)] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + rng.randrange(1, 40)]
        elif kind == 2:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(8)))
        elif kind == 3:
            out[at:at] = out[at : at + rng.randrange(1, 40)]
        else:
            out = out[: at + 1]
    return bytes(out)


def accepted_or_refused(read, *args) -> bool:
    """Whether it was read; an error must be one that is told in a line."""
    message = None
    try:
        read(*args)
    except (ValueError, OSError) as error:
        message = str(error)
    assert message is None or "\n" not in message.strip(), message
    assert message is None or 10 < len(message) < 1500, message
    return message is None


def test_settings_of_any_shape(tmp_path):
    rng, path = random.Random(0), tmp_path / "a.png"
    whole = Request("a cat", seed=3, steps=None).to_dict()
    for number in range(TRIES):
        saved = dict(whole)
        for _ in range(rng.randrange(1, 3)):
            saved[rng.choice([*whole, "steps", "control", "tokens", "num_beams", "colour", "sampler"])] = value(rng)
        text = json.dumps(saved if number % 4 else value(rng))
        if number % 5 == 0:
            text = mutated(rng, text.encode()).decode("latin-1")
        info = PngInfo()
        for key in (KEY, TOKENS, MADE_BY):
            info.add_text(key, text)
        Image.new("L", (1, 1)).save(path, pnginfo=info)
        accepted_or_refused(read_request, path)
        read_grid(open_image(path))
        differences(path, NO_PIPELINE)


def test_token_files_of_any_shape(tmp_path):
    rng, path = random.Random(0), tmp_path / "a.npz"
    save_tokens(path, "argen/emoji-vitvqgan", np.arange(64))
    whole, read = path.read_bytes(), 0
    arrays = [
        np.zeros(()),
        np.zeros((2, 0)),
        np.array(["a"]),
        np.array([1 + 2j]),
        np.zeros((3, 3), bool),
        np.full(64, np.nan),
    ]
    for number in range(TRIES):
        if number % 2:
            path.write_bytes(mutated(rng, whole))
        else:
            content = {
                rng.choice(["tokens", "tokenizer", "x"]): rng.choice([*arrays, "argen/emoji-vae"]) for _ in range(3)
            }
            np.savez(path, **content)
        read += accepted_or_refused(read_tokens, path)
    assert read < TRIES


def test_pipelines_of_any_shape(tmp_path):
    rng, path = random.Random(0), tmp_path / "model_index.json"
    pipe = {"_class_name": "PartiPipeline", "transformer": ["argen.models.parti", "Parti"], "tokenizer": [None, None]}
    for number in range(TRIES):
        saved = dict(pipe)
        saved[rng.choice([*pipe, "text_encoder", "_diffusers_version"])] = value(rng)
        text = json.dumps(saved if number % 4 else value(rng)).encode("utf-8", "surrogatepass")
        path.write_bytes(mutated(rng, text) if number % 5 == 0 else text)
        assert not accepted_or_refused(load, tmp_path)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_tables_of_any_shape(tmp_path, name):
    rng, path, read = random.Random(0), tmp_path / name, 0
    for number in range(TRIES // 2):
        if name == "a.jsonl":
            rows = [
                json.dumps({"prompt": "a cat", rng.choice(["seed", "steps", "top_k", "x", "prompt"]): value(rng)})
                for _ in range(2)
            ]
            text = "\n".join(rows)
        else:
            cells = ["", "4.0", "nan", "1e9", '"', "(1, 2)", "a", "-", "\t", "１", "99999999999999999999"]
            names = rng.sample(["prompt", "seed", "steps", "top_k", "temperature", "file", "x", ""], 3)
            text = "\n".join([",".join(names), *(",".join(rng.choices(cells, k=rng.randrange(5))) for _ in range(3))])
        data = text.encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"]), "surrogatepass")
        path.write_bytes(mutated(rng, data) if number % 3 == 0 else data)
        read += accepted_or_refused(read_table, path)
    assert read


@pytest.mark.parametrize(
    "form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "DDS", "QOI", "TGA", "ICO", "PPM"]
)
def test_images_of_any_shape(tmp_path, form):
    rng, path, buffer = random.Random(0), tmp_path / "a.png", io.BytesIO()
    letters = string.ascii_letters.encode()
    try:
        Image.frombytes("RGB", (16, 16), (letters * 20)[:768]).save(buffer, form)
    except (OSError, ValueError, KeyError) as error:
        pytest.skip(f"this Pillow writes no {form} ({error})")
    for _ in range(TRIES // 10):
        path.write_bytes(mutated(rng, buffer.getvalue()))
        accepted_or_refused(open_image, path)
