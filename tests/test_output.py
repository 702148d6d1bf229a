"""What commands print: help, lists, and what a closed pipe does."""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from argen.cli.main import main
from argen.command import EXTRAS, guarded
from argen.registry import commands, measures
from argen.words import number_of


def help_of(capsys, *names) -> str:
    with pytest.raises(SystemExit):
        main([*names, "--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "names", [(name,) for name in commands.built_in] + [("eval", name) for name in measures.built_in]
)
def test_help_says_a_default_once(capsys, names):
    text = help_of(capsys, *names)
    assert not re.search(r"\(default: (None|False|\[\])\)", text)
    assert not re.search(r"\(default[^()]*\) \(default", text)


def test_help_of_numbers(capsys):
    assert "of the page and the APIs; 0 for any that is free (default: 7860)" in help_of(capsys, "ui")
    assert "of the weights and of the batches (default: 0)" in help_of(capsys, "train")


@pytest.mark.parametrize("arguments", [("samplers", "--json"), ("models",), ("--help",), ("eval", "--help")])
def test_a_reader_may_leave(arguments):
    """As `head` does: nothing is said."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "argen", *arguments]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}  # every line is written at once
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, env=env)
    os.close(write)
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("arguments", [("samplers",), ("--help",), ("models", "--json")])
def test_output_that_is_closed_or_full(arguments):
    command = shlex.join([sys.executable, "-m", "argen", *arguments])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for closed in (">&-", "<&- >&- 2>&-"):
        result = subprocess.run(["bash", "-c", f"{command} {closed}"], capture_output=True, text=True, env=environment)
        assert (result.returncode, result.stderr) == (0, "")
    result = subprocess.run(["bash", "-c", f"{command} >/dev/full"], capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert result.stderr.endswith("no space left on device: free some space, or write elsewhere\n")
    assert result.stderr.count("\n") == 1


def test_a_sampler_says_what_it_keeps_writes_and_needs(capsys):
    assert main(["samplers"]) == 0
    text = capsys.readouterr().out
    assert "relaxed; for models of tokens; resumes in distribution; needs a model with a drafter" in text
    assert "lossless; for models of continuous latents" in text
    assert "`Sequential`" not in text
    assert "(default: None)" not in text


def test_several_samplers_of_an_axis(capsys, tmp_path):
    out = str(tmp_path / "grid.png")
    assert main(["grid", "a pizza", "--x", "sampler=jacobi,zipar:window=2", "-o", out]) == 2
    assert "several samplers have | between, e.g. sampler=jacobi|zipar:window=2" in capsys.readouterr().err
    assert "prompts and samplers with | between" in help_of(capsys, "grid")


def test_one_image_is_not_images():
    assert [number_of(count, "image") for count in (0, 1, 2, 1200)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,200 images",
    ]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("datasets", "datasets is not installed: pip install 'argen[train]'"),
        ("openvino.frontend", "openvino.frontend is not installed: pip install 'argen[openvino]'"),
        ("mosaics", "mosaics is not installed"),
    ],
)
def test_of_a_missing_module_the_extra_is_named_that_brings_it(capsys, module, line):
    def imports(_: argparse.Namespace) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert guarded("argen x", imports, argparse.Namespace()) == 2
    assert capsys.readouterr().err == f"argen x: error: {line}\n"


def test_every_extra_that_is_named_brings_its_module():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    packages = {"google": "protobuf", "resvg_py": "resvg-py"}
    for module, extra in EXTRAS.items():
        names = [re.match(r"[\w-]+", one)[0] for one in project["optional-dependencies"][extra]]
        assert packages.get(module, module) in names


WRITERS = {
    "numpy": "np.save(open('x', 'wb'), np.zeros(100000))",
    "safetensors": "save_file({'x': torch.zeros(100000)}, 'x')",
    "torch": "torch.save(torch.zeros(100000), 'x')",
    "parquet": "Dataset.from_dict({'x': np.random.rand(100000)}).to_parquet('x')",
}


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are of POSIX")
@pytest.mark.parametrize("writer", WRITERS)
def test_whoever_writes_into_a_full_disk_it_is_one_line(tmp_path, writer):
    program = f"""
import argparse, resource, sys
from pathlib import Path
import numpy as np, torch
from datasets import Dataset
from safetensors.torch import save_file
from argen.command import guarded
from argen.files import naming

def write(_):
    with naming(Path("out")):
        {WRITERS[writer]}

resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
sys.exit(guarded("argen x", write, argparse.Namespace()))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]  # after the progress bar of datasets
    assert re.fullmatch(r"argen x: error: out: (file too large|no space left on device): .*", line)
