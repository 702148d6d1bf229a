"""What the README and docs/ say, runs: their Python blocks, and the commands they name."""

import re
import shlex
from pathlib import Path

import pytest

from argen.cli.main import parser
from argen.hub.cards import all_cards
from argen.registry import REGISTRIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run.*?-->\n+)?```python\n(.*?)```", re.DOTALL)
RUNNING = [page for page in PAGES if any(not skipped for skipped, _ in BLOCK.findall(page.read_text()))]


def run_page(page: Path) -> dict:
    """The names that the Python blocks of a page make, one after the other."""
    names = {"__name__": page.stem}
    for skipped, block in BLOCK.findall(page.read_text()):
        if not skipped:
            exec(compile(block, page.name, "exec"), names)
    return names


def commands(text: str) -> list[list[str]]:
    """The words of every `argen ...` line of indented blocks and of ``sh`` fences, without comments."""
    fenced = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    lines = [*re.findall(r"^    (.*)$", text, re.MULTILINE), *fenced.splitlines()]
    parts = [part.strip() for line in lines for part in line.partition("  #")[0].split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("argen ")]


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tests/data/plugin"))  # what docs/extending.md shows
    for registry in REGISTRIES.values():  # what a page registers is forgotten
        monkeypatch.setattr(registry, "added", {})
    names = run_page(page)
    if page.name in ("README.md", "python.md"):
        assert (tmp_path / "apple.png").exists()
        assert names["out"].tokens.shape == (4, 64)
        assert (names["finished"].tokens >= 0).all()


def test_commands_are_understood():
    named = {page.name: commands(page.read_text()) for page in PAGES}
    assert len(named["README.md"]) >= 7
    assert sum(map(len, named.values())) > 80
    for words in sum(named.values(), []):
        parser(words).parse_args(words)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_model_has_its_line_in_weights_md():
    text = (ROOT / "weights.md").read_text()
    assert all(f"`{name}`" in text for name in all_cards())
