"""Imports point down only: a module may import what stands below its layer, never above or beside."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    ["samplers"],
    ["tokenizers_img"],
    ["argen.words", "argen.files", "argen.registry", "argen.garbage", "argen"],
    ["argen.bounds", "argen.images", "argen.device"],
    ["argen.request", "argen.processes"],
    ["argen.metadata"],
    ["argen.data"],
    ["argen.models"],
    ["argen.hub"],
    ["argen.pipelines"],
    ["argen.diffusion"],
    ["argen.eval"],
    ["argen.train"],
    ["argen.command"],
    ["argen.jobs"],
    ["argen.ui", "argen.server"],
    ["argen.cli"],
    ["argen.__main__", "argen.train.__main__", "app", "benchmarks"],
]
NAMES = {name: (level, name) for level, names in enumerate(LAYERS) for name in names}
FILES = [
    path for top in ("samplers", "tokenizers_img", "argen", "benchmarks") for path in sorted((ROOT / top).rglob("*.py"))
]


def home(module: str) -> tuple[int, str] | None:
    """(layer, package) of a module of ours, by its longest known prefix."""
    while module and module not in NAMES:
        module = module.rpartition(".")[0]
    return NAMES.get(module)


def imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    level, package = home(module)
    for name in imported(ast.parse(path.read_text())):
        target = home(name)
        if target is None or target[1] == package or name == "argen.__version__" or module == "argen":  # late, by name
            continue
        assert target[0] < level, f"{module} imports {name}, which is not below it"
