"""An installed package adds a sampler, a tokenizer, a generator and a command by entry points, and each is found everywhere."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import gradio as gr
import pytest
import torch
from PIL import Image
from test_server import Served

import argen
from argen.cli.main import main
from argen.jobs.queue import Studio
from argen.jobs.tables import Axis, expand_axes
from argen.metadata import read_request
from argen.registry import REGISTRIES, Registry, samplers
from argen.request import Request
from argen.ui.build import build
from argen.ui.context import AppContext

PLUGIN = Path(__file__).parent / "data/plugin"
TYPED = "annealed:start=1.0,end=0.4"


def install(site: Path) -> None:
    """What `pip install tests/data/plugin` leaves in site-packages."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    shutil.copytree(PLUGIN / "argen_mosaic", site / "argen_mosaic", ignore=shutil.ignore_patterns("__pycache__"))
    info = site / f"argen_mosaic-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [[f"[{group}]", *(f"{name} = {target}" for name, target in points.items())] for group, points in groups]
    (info / "entry_points.txt").write_text("\n".join(sum(lines, [])) + "\n")


def forget() -> None:
    """Let every registry look for entry points again."""
    for registry in REGISTRIES.values():
        registry.__dict__.pop("installed", None)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder on `sys.path` in which the plugin is installed."""
    folder = tmp_path_factory.mktemp("site-packages")
    install(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        forget()
        yield folder
    forget()
    for name in [name for name in sys.modules if name.startswith("argen_mosaic")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def studio(site, tmp_path_factory):
    studio = Studio(tmp_path_factory.mktemp("studio"), argen.load)
    yield studio
    studio.close()


@pytest.fixture(scope="module")
def served(studio):
    served = Served(studio)
    yield served
    served.close()


def test_a_new_process_finds_what_is_installed(site):
    path = os.pathsep.join([str(site), *sys.path])
    command = [sys.executable, "-m", "argen", "models", "--json"]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert {"mosaic/tokenizer", "mosaic/bigram"} <= {row["id"] for row in json.loads(result.stdout)}


def test_the_command_line_lists_it(site, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "name the most frequent colours of an image" in capsys.readouterr().out
    assert main(["samplers"]) == 0
    assert "temperature of the last cell, in parts of the model's: a number, 0 to 10 (default: 0.6)" in (
        capsys.readouterr().out
    )
    assert main(["models"]) == 0
    assert "mosaic/bigram" in capsys.readouterr().out
    assert {"mosaic/tokenizer", "mosaic/bigram"} <= {card.id for card in argen.list_models()}


def test_the_command_line_runs_it(site, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a red apple", "--sampler", TYPED, "-o", "apple.png"]) == 0
    assert read_request(Path("apple.png")).sampler_text == TYPED
    assert main(["generate", "a red wall", "--model", "mosaic/bigram", "--sampler", TYPED, "-o", "wall.png"]) == 0
    red, _, blue = (sum(band.getdata()) for band in Image.open("wall.png").convert("RGB").split())
    assert red > 2 * blue
    assert main(["reconstruct", "wall.png", "--tokenizer", "mosaic/tokenizer", "-o", "again.png"]) == 0
    assert Image.open("again.png").convert("RGB").tobytes() == Image.open("wall.png").convert("RGB").tobytes()
    capsys.readouterr()
    assert main(["palette", "wall.png", "--num", "1"]) == 0
    assert capsys.readouterr().out.startswith("#ff")
    assert main(["grid", "a wall", "--model", "mosaic/bigram", "--x", "annealed.end=0.4,0.8", "-o", "grid.png"]) == 0
    assert Path("grid.png").is_file()


def test_its_recipe_trains(site, tmp_path, capsys):
    sample = str(Path(argen.__file__).parent / "data/sample")
    out = str(tmp_path / "run1")
    assert main(["train", "mosaic", "--out", out]) == 2
    assert "the recipe mosaic learns from images: give --data" in capsys.readouterr().err
    assert main(["train", "mosaic", "--data", str(tmp_path / "none"), "--out", out]) == 2
    assert "none is not a folder: expected one made by `argen data`" in capsys.readouterr().err
    assert not Path(out).exists()
    assert main(["train", "mosaic", "--data", sample, "--out", out, "--steps", "30"]) == 0
    wall = str(tmp_path / "wall.png")
    assert main(["train", "mosaic", "--data", sample, "--out", out]) == 0
    last = json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["held-out loss"] < 3) == (400, True)  # of 64 equally probable colours it is 4.2 nats
    assert main(["generate", "a red wall", "--model", f"{out}/final", "-o", wall]) == 0
    capsys.readouterr()
    (tmp_path / "walls").mkdir()
    Path(wall).rename(tmp_path / "walls/wall.png")
    assert main(["eval", "colours", str(tmp_path / "walls")]) == 0
    assert "of 64 colours in 1 images" in capsys.readouterr().out


def test_a_recipe_without_images_takes_none(site, tmp_path, capsys, monkeypatch):
    training = import_module("argen_mosaic.training")

    class Alone(training.BigramTask):
        def read_split(self, data, split):
            return torch.zeros(4, 64, dtype=torch.int64)

        def __init__(self):
            super().__init__(None)

    recipe = replace(training.RECIPE, task=Alone, needs_data=False)
    monkeypatch.setitem(REGISTRIES["recipe"].added, "alone", recipe)
    out = ["--out", str(tmp_path / "run1"), "--steps", "2"]
    assert main(["train", "alone", *out, "--data", str(tmp_path)]) == 2
    assert "learns from no images: leave --data out" in capsys.readouterr().err
    assert main(["train", "alone", *out]) == 0


def test_models_of_packages_have_a_heading_of_their_own(site, capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heading = lines.index("In installed packages:")
    row = next(line for line in lines if line.startswith("  mosaic/tokenizer "))
    assert heading < lines.index(row) < lines.index("Published, fetched from the hub when first used:")
    assert "0.0" not in row
    rows = [line for line in lines if not line.endswith(":")]
    kinds = {line.index(line.split()[1], len(line.split()[0]) + 2) for line in rows}
    assert len(kinds) == 1  # one column


def test_a_wrong_setting_of_it_is_one_line(site, capsys):
    assert main(["generate", "a", "-o", "a.png", "--sampler", "annealed:end=11"]) == 2
    assert capsys.readouterr().err == "argen generate: error: end is 11.0: expected a number, 0 to 10\n"


def test_its_settings_are_axes(site):
    requests = expand_axes(Request("a"), [Axis.parse("annealed.end=0.4,0.8"), Axis.parse("annealed.curve=1,2")])
    assert [request.sampler_args for request in requests][-1] == {"end": 0.8, "curve": 2}


def test_the_page_has_its_widgets(studio):
    blocks = build(AppContext(studio)).blocks.values()
    widgets = {block.elem_id: block for block in blocks if getattr(block, "elem_id", None)}
    for name, setting in (("annealed-start", 1.2), ("annealed-end", 0.6), ("edit-annealed-curve", 1.0)):
        assert isinstance(widgets[name], gr.Number)
        assert widgets[name].value == setting
    assert "Palette" in {block.label for block in blocks if isinstance(block, gr.Tab)}
    assert widgets["palette-image"].label == "Image"
    choices = [[value for _, value in block.choices] for block in blocks if isinstance(block, gr.Dropdown)]
    for known in ("annealed", "mosaic/bigram", "mosaic/tokenizer"):
        assert any(known in offered for offered in choices)


def test_both_apis_take_it(served, site):
    body = {"prompt": "a red wall", "model": "mosaic/bigram", "seed": 3}
    status, drawn = served.ask("/v1/images/generations", body | {"sampler": TYPED})
    assert status == 200
    status, other = served.ask("/v1/images/generations", body)
    assert (status, drawn["data"] == other["data"]) == (200, False)
    assert "mosaic/bigram" in {row["id"] for row in served.ask("/v1/models")[1]["data"]}

    body = {"prompt": "a red wall", "seed": 3, "sampler_name": TYPED}
    body |= {"override_settings": {"sd_model_checkpoint": "mosaic/bigram"}, "width": 64, "height": 64}
    status, answer = served.ask("/sdapi/v1/txt2img", body)
    assert status == 200
    assert json.loads(answer["info"])["sampler_name"] == TYPED
    assert "annealed" in {row["name"] for row in served.ask("/sdapi/v1/samplers")[1]}
    assert "mosaic/bigram" in {row["title"] for row in served.ask("/sdapi/v1/sd-models")[1]}
    wrong = {"prompt": "a red wall", "model": "mosaic/bigram", "sampler": "annealed:end=11"}
    assert served.ask("/v1/images/generations", wrong)[0] == 400


def test_its_sampler_without_cooling_is_the_sequential_one(site):
    pipe = argen.load("mosaic/bigram")
    drawn = [
        pipe("a blue wall", generator=torch.Generator().manual_seed(0), sampler=sampler).tokens
        for sampler in (samplers["annealed"](start=1.0, end=1.0), "sequential", "jacobi", "auto")
    ]
    assert all(torch.equal(tokens, drawn[0]) for tokens in drawn)


def test_its_pipeline_is_saved_and_loaded(site, tmp_path):
    pipe = argen.load("mosaic/bigram")
    pipe.save_pretrained(tmp_path / "saved")
    again = argen.load(tmp_path / "saved")
    assert type(again) is REGISTRIES["pipeline"]["MosaicPipeline"]
    assert again.defaults == pipe.defaults
    assert again.defaults.temperature == 0.9
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = [one("a wall", generator=each).tokens for one, each in zip((pipe, again), generators, strict=True)]
    assert torch.equal(*drawn)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A package on `sys.path` that names what cannot be imported, once under the name of a built-in component."""
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[argen.things]\nlost = no_such_module:Thing\ntensor = no_such_module:Thing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_built_in_name_cannot_be_taken(broken):
    registry = Registry("thing", {"tensor": "torch:Tensor"})
    assert list(registry) == ["tensor"]  # the other is known, and cannot be imported
    assert "lost" in registry
    assert registry["tensor"] is torch.Tensor


def test_a_package_that_cannot_be_imported_is_one_line(broken):
    with pytest.raises(
        ValueError, match="the thing lost of the package broken cannot be used .*no_such_module.*uninstall"
    ):
        Registry("thing", {})["lost"]
