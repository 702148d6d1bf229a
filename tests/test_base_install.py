"""The commands of docs/command-line.md with nothing installed but what `pip install .` brings."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from PIL import Image

PAGE = (Path(__file__).parent.parent / "docs/command-line.md").read_text()
HUB = ("AILab-CVC/", "stabilityai/", "CompVis/")  # what a hub is needed for
MODULES = {  # of the extras, where a package and its module have different names
    "opencv-python-headless": "cv2",
    "protobuf": "google.protobuf",
    "resvg-py": "resvg_py",
    "pytest-xdist": "xdist",
}
CHILD = """
import importlib.abc, importlib.util, io, json, sys
from contextlib import redirect_stderr, redirect_stdout

def blocked(name):
    return any(name == one or name.startswith(one + ".") for one in BLOCKED)

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if blocked(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = json.loads(sys.argv[1])
sys.meta_path.insert(0, Blocked())
find_spec = importlib.util.find_spec  # by which libraries ask what is installed
importlib.util.find_spec = lambda name, package=None: None if blocked(name) else find_spec(name, package)
from argen.cli.main import main

for line in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(line[1:])
    said = [text for text in err.getvalue().replace("\\r", "\\n").splitlines() if text.strip() and "%|" not in text]
    print(json.dumps({"line": line, "code": code, "out": out.getvalue(), "err": said}), flush=True)
"""


def test_an_installation_has_every_file_of_the_packages():
    root = Path(__file__).parent.parent
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package, globs in patterns.items():
        there = {path for path in (root / package).rglob("*") if path.is_file() and path.parent.name != "__pycache__"}
        installed = {path for pattern in globs for path in (root / package).glob(pattern)}
        assert there, package
        assert not [str(path) for path in there - installed if path.suffix != ".py"], package


def lines() -> list[list[str]]:
    """The commands of the page's first block that need no hub, no training of one's own, and have an end."""
    block = PAGE.partition(":\n\n")[2].partition("\n\nEvery command")[0]
    commands = [
        part.strip() for line in block.splitlines() for part in line.partition("  #")[0].split("&&") if part.strip()
    ]
    return [
        shlex.split(one) for one in commands if not any(name in one for name in (*HUB, "runs/")) and one != "argen ui"
    ]


def blocked() -> list[str]:
    """The modules that only extras bring."""
    named = [re.match(r"[\w-]+", one)[0] for one in requires("argen") if "extra ==" in one]
    return sorted(
        {MODULES.get(name, name.replace("-", "_")) for name in named} - {"argen", "numpy"} - {"google.protobuf"}
    )


@pytest.mark.slow
def test_the_commands_run_with_the_base_dependencies_alone(tmp_path):
    assert {"cv2", "scipy", "datasets", "torchmetrics"} <= set(blocked())
    image = Image.new("RGB", (160, 120), "white")
    image.paste("red", (40, 30, 120, 90))
    image.save(tmp_path / "photo.jpg")
    (tmp_path / "requests.csv").write_text("prompt,seed\na taxi,4\n")
    commands = lines()
    assert len(commands) > 18
    command = [sys.executable, "-W", "default", "-c", CHILD, json.dumps(blocked()), json.dumps(commands)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=580)
    assert result.returncode == 0, result.stderr[-2000:]
    assert not result.stderr.strip(), result.stderr[:2000]  # nothing is said while modules are imported
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len(commands)
    for answer in answers:
        assert answer["code"] == 0, answer
        assert not [text for text in answer["err"] if "warn" in text.lower() or "requires" in text], answer
        assert answer["out"].strip(), answer
    for name in ("apple.png", "again.png", "edges.png", "bound.png", "five.png", "grid.png", "follows.png"):
        assert (tmp_path / name).is_file()
