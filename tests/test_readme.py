"""What the README says, runs: its Python blocks, and the commands it names."""

import re
from pathlib import Path

import pytest

from argen.cli.main import parser
from argen.hub.cards import all_cards

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "apple.png").exists()
    assert names["out"].tokens.shape == (4, 64)
    assert (names["finished"].tokens >= 0).all()


def test_commands_are_understood():
    lines = [line.strip().split("#")[0] for line in README.splitlines() if line.startswith("    ")]
    commands = [part for line in lines for part in line.split("&&") if part.strip().startswith("argen ")]
    assert len(commands) >= 10
    for line in commands:
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
        parser(words[1:]).parse_args(words[1:])


def test_every_model_has_its_line_in_weights_md():
    text = (ROOT / "weights.md").read_text()
    assert all(f"`{name}`" in text for name in all_cards())
