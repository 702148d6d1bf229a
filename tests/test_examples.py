"""The scripts in examples/ run offline, in seconds, and do what they say."""

import runpy
import time
from pathlib import Path

import pytest
from PIL import Image

from argen.metadata import read_request
from argen.registry import cards, samplers

EXAMPLES = Path(__file__).parent.parent / "examples"
SECONDS = 10


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script in an empty folder -> its names; what it registers is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(samplers, "added", {})
    monkeypatch.setattr(cards, "added", {})

    def run(name: str) -> dict:
        started = time.process_time()
        names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert time.process_time() - started < SECONDS
        return names

    return run


def test_each_is_short_and_tested():
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 6
    for script in scripts:
        assert len(script.read_text().splitlines()) < 50, script.name
        assert f"({script.name})" in (EXAMPLES / "README.md").read_text()
        assert f'run("{script.name}")' in Path(__file__).read_text()


def test_first_image(run):
    names = run("first_image.py")
    assert names["same"]
    assert read_request(Path("apple.png")) == names["job"].requests[0]
    assert len(list(Path().glob("step-*.png"))) >= 4


def test_edit_tokens(run):
    names = run("edit_tokens.py")
    taxi = names["taxi"].tokens
    assert (names["half"].tokens[:, :32] == taxi[:, :32]).all()
    assert (names["right"].tokens.view(8, 8)[:, :4] == taxi.view(8, 8)[:, :4]).all()
    assert (names["others"].tokens[:, :24] == taxi[:, :24]).all()
    assert len(names["others"].tokens.unique(dim=0)) > 1
    assert Image.open("edits.png").size == (1536, 256)


def test_control(run):
    run("control.py")
    images = [Image.open("control.png").crop((256 * i, 0, 256 * i + 256, 256)).tobytes() for i in range(4)]
    assert len(set(images)) == 4
    assert Path("edges.png").is_file()


def test_own_sampler(run):
    names = run("own_sampler.py")
    assert "careful" in samplers
    assert read_request(Path("careful.png")).sampler_args == {"sure": 0.5}
    assert names["job"].decided == 64


def test_own_tokenizer(run, capsys):
    run("own_tokenizer.py")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["mine/shades", "argen/emoji-vitvqgan"]
    assert "256 tokens" in lines[0]


def test_evaluation(run):
    names = run("evaluation.py")
    assert names["scores"]["single: identity"]["value"] > 0.5
    assert Image.open("judged.png").size == (1536, 256)
