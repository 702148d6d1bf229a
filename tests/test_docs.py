"""The pages of docs/: their tables are those of the code, their examples files that run, their links lead somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from test_imports import LAYERS

import argen

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TOP = [ROOT / name for name in ("README.md", "weights.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, ROOT / "examples/README.md", *sorted(DOCS.glob("*.md"))]
OFFLINE = """
import socket
def refuse(*_):
    raise OSError("the documentation is built without network")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


GENERATED = [*sorted(DOCS.glob("*.md")), ROOT / "weights.md"]


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.name)
def test_tables_are_those_of_the_code(page, generate):
    text = page.read_text()
    assert text == generate.rendered(text), f"run python docs/generate.py: {page.name} is old"


def test_every_table_is_on_a_page(generate):
    named = [name for page in GENERATED for _, name, _ in generate.MARKS.findall(page.read_text())]
    assert sorted(named) == sorted(generate.TABLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links {path}"
        assert not anchor or anchor in slugs(target.read_text()), f"{page.name} links {path}#{anchor}"


def test_every_page_is_in_the_contents():
    def leaves(nav):
        for one in nav:
            if isinstance(one, str):
                yield one
            else:
                for inside in one.values():
                    yield from leaves(inside)

    named = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(named) == len(set(named))
    assert set(named) == {page.name for page in DOCS.glob("*.md")} | {page.name for page in TOP} - {"README.md"}


def test_the_reference_names_what_there_is():
    names = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert len(names) > 30
    for name in names:
        try:
            documented = import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            documented = getattr(import_module(module), attribute)
        assert documented.__doc__, name


def test_pages_show_the_files_that_the_tests_install(generate):
    names = [name for _, name in generate.FILES.findall((DOCS / "extending.md").read_text())]
    assert len(names) == len(set(names)) == 11  # `rendered` fills them in, see above


def test_architecture_has_the_levels_of_the_imports():
    drawn = re.search(r"from the top:\n\n(.*?)\n\n", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)[1]
    levels = [re.split(r"\s{2,}", line.strip())[0].split(", ") for line in drawn.splitlines()]
    assert [set(level) for level in levels[::-1]] == [set(level) for level in LAYERS]


def test_the_release_has_its_entry_and_its_citation():
    assert f"\n## {argen.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == argen.__version__


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as HTML, built without network; any warning is an error."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return folder


class Assets(HTMLParser):
    """What a page makes a browser fetch by itself."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        names = ("href",) if tag == "link" and given.get("rel") != "canonical" else ("src", "srcset", "data", "poster")
        self.found += [given[name] for name in names if tag != "a" and given.get(name)]


def test_pages_fetch_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assets = [asset for page in pages for asset in Assets(page.read_text()).found]
    assert any(asset.endswith(".js") for asset in assets)
    assert any(asset.endswith(".css") for asset in assets)
    styles = [path.read_text() for path in site.rglob("*.css")]
    assets += [url for text in styles for url in re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", text)]
    assert not [asset for asset in assets if re.match(r"(?:https?:)?//", asset)]


def test_the_reference_is_written_from_the_docstrings(site):
    page = (site / "api" / "index.html").read_text()
    anchors = set(re.findall(r'id="([\w.]+)"', page))
    loading = {"argen.load", "argen.list_models", "argen.register"}
    pipelines = {f"argen.pipelines.base.TokenPipeline.{name}" for name in ("__call__", "stream")}
    pipelines |= {"argen.pipelines.running.Running.run", "argen.pipelines.ranking.Ranking.rank"}
    tokenizers = {
        f"tokenizers_img.{name}.{method}"
        for name in (
            "vit_vqgan.ViTVQGAN",
            "llamagen_vq.LlamaGenVQ",
            "kl_vae.KLVAE",
            "flextok.tokenizer.FlexTokenizer",
            "seed.tokenizer.SeedTokenizer",
        )
        for method in ("encode", "decode")
    }
    samplers = {
        "samplers.steps.Sequential",
        "samplers.jacobi.Jacobi",
        "samplers.speculative.Speculative",
        "samplers.next_x.Heun",
    }
    pipelines |= {"argen.pipelines.editing.Editing.edit"}
    assert not (loading | pipelines | tokenizers | samplers) - anchors
    assert "backend of the attention layers" in page  # of the arguments of `load`
