"""For mkdocs: the pages that lie at the top of the repository are pages here, too."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
SHOWN = ("weights.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
REPOSITORY = ("README.md", "CITATION.cff", "LICENSE", "examples/")  # what links may name that is no page


def on_files(files, config):
    for name in SHOWN:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as GitHub has them -> as the pages lie here."""
    markdown = re.sub(r"\]\((?:docs/|\.\./)(?!examples|README|CITATION|LICENSE)", "](", markdown)
    outside = "|".join(map(re.escape, REPOSITORY))
    return re.sub(rf"\[([^\]]*)\]\((?:\.\./)?(?:{outside})[^)]*\)", r"\1", markdown)
