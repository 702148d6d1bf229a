"""Write the tables of the pages that come from cards, samplers, settings and commands: ``python docs/generate.py``."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from argen.hub.cards import FOLDER, Card, read_card
from argen.registry import about_of, commands, recipes, samplers
from argen.request import Request
from argen.train.own.run import OwnRecipe
from samplers.settings import Setting, settings_of
from tokenizers_img.attention import BACKENDS

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PLUGIN = ROOT / "tests/data/plugin"  # the package that docs/extending.md shows, and the tests install
FILES = re.compile(r'(```\w+ title="([^"]+)"\n).*?```', re.DOTALL)
MARKS = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def sampler_rows() -> str:
    rows = []
    for name in samplers.built_in:
        sampler = samplers[name]()
        lossless = "yes" if sampler.lossless else "relaxed"
        resumes = getattr(sampler, "resumes", "exactly")
        draws, needs = getattr(sampler, "draws", "tokens"), getattr(sampler, "needs", "")
        rows.append((f"`{name}`", about_of(name), draws, lossless, resumes, needs))
    return table(("sampler", "what it does", "draws", "lossless", "resumes", "needs"), rows)


def setting_row(setting: Setting) -> tuple[str, ...]:
    default = "" if setting.default in (None, {}) else f"`{setting.default}`"
    return f"`{setting.name}`", setting.help, setting.expected if setting.kind else "", default


def setting_rows() -> str:
    settings = [
        (name, setting)
        for name in samplers.built_in
        for setting in settings_of(samplers[name]).values()
        if setting.kind
    ]
    rows = [(f"`{name}`", *setting_row(setting)) for name, setting in settings]
    return table(("sampler", "setting", "what it is", "expected", "default"), rows)


def request_rows() -> str:
    return table(("setting", "what it is", "expected", "default"), map(setting_row, settings_of(Request).values()))


def command_rows() -> str:
    return table(("command", "what it does"), ((f"`argen {name}`", commands[name].HELP) for name in commands.built_in))


def attention_rows() -> str:
    rows = []
    for name, needs in BACKENDS.items():
        precision = "bfloat16, float16" if needs.half else "any"
        devices, masks = ", ".join(needs.devices) or "any", "yes" if needs.masks else "no"
        rows.append((f"`{name}`", devices, masks, precision, f"`{needs.install}`" if needs.install else ""))
    return table(("attention", "devices", "takes masks", "precision", "installed by"), rows)


def sorted_cards() -> list[Card]:
    cards = [read_card(path) for path in FOLDER.glob("*.toml")]
    return sorted(cards, key=lambda card: (card.order, card.kind, card.id.lower()))


def card_rows(ships: bool) -> str:
    rows = [
        (
            f"`{card.id}`",
            card.kind,
            card.about,
            f"{card.parameters:,.{0 if card.parameters > 100 else 1}f}M",
            card.licence,
        )
        for card in sorted_cards()
        if card.ships == ships
    ]
    return table(("id", "kind", "what it is", "parameters", "licence"), rows)


def recipe_rows() -> str:
    rows = []
    for name, recipe in recipes.items():
        if isinstance(recipe, OwnRecipe):
            continue
        folders = ", ".join(f"`--{part}`" for part in recipe.takes if part not in ("total", "x"))
        lengths = [f"{schedule.steps:,} x {schedule.batch_size}" for schedule in recipe.schedules.values()]
        rows.append((f"`{name}`", folders, *lengths))
    return table(("recipe", "takes beside `--data` and `--out`", "cpu: steps x batch", "gpu: steps x batch"), rows)


def own_rows() -> str:
    rows = []
    for name, recipe in recipes.items():
        if isinstance(recipe, OwnRecipe):
            schedule = recipe.schedule
            decline = "constant" if schedule.decline == "constant" else f"{schedule.decline} decline"
            rate = f"{schedule.learning_rate:g}, {decline}"
            needs = "yes" if recipe.conditions else "no"
            lengths = f"{schedule.steps:,} x {schedule.batch_size}"
            rows.append(
                (f"`{name}`", needs, lengths, rate, schedule.ema_decay or "", "yes" if recipe.lora is not None else "")
            )
    return table(
        ("recipe", "needs classes or captions", "steps x batch", "learning rate", "averaged weights", "`--lora`"), rows
    )


def trained_rows() -> str:
    rows = []
    for card in sorted_cards():
        if card.ships:
            files, training = sorted(card.path.rglob("*.safetensors")), card.training
            size = (
                f"{sum(map(parameters, files)) / 1e6:.1f}M, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
            )
            how = (training[name] for name in ("recipe", "length", "device", "scores"))
            rows.append((f"`{card.id}`", training["network"], size, *how))
    return table(("id", "what", "parameters, files", "recipe", "steps x batch", "device", "held-out scores"), rows)


def parameters(file: Path) -> int:
    """Numbers in a safetensors file, by its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def fetched_rows() -> str:
    rows = []
    for card in sorted_cards():
        if not card.ships:
            files = "; ".join([", ".join(f"`{name}`" for name in card.files), *card.fetches])
            unproven = "unproven, since no list of its keys is public: " if card.unproven else ""
            rows.append((f"`{card.id}`", f"`{card.repo}`", unproven + files, f"{card.parameters:,.1f}M", card.licence))
    return table(("id in argen", "repository", "files", "parameters", "licence"), rows)


TABLES = {
    "attention": attention_rows,
    "samplers": sampler_rows,
    "settings": setting_rows,
    "request": request_rows,
    "commands": command_rows,
    "recipes": recipe_rows,
    "own": own_rows,
    "shipped": lambda: card_rows(True),
    "trained": trained_rows,
    "fetched": fetched_rows,
    "published": lambda: card_rows(False),
}


def source(name: str) -> str:
    """The text of a file of the example package, or of argen."""
    return next(folder / name for folder in (PLUGIN, ROOT) if (folder / name).is_file()).read_text(encoding="utf-8")


def rendered(text: str) -> str:
    """Return a page with its tables regenerated, and with the files as they are where a block of code names one."""
    text = FILES.sub(lambda match: match[1] + source(match[2]) + "```", text)
    return MARKS.sub(lambda match: match[1] + "\n" + TABLES[match[2]]() + "\n" + match[3], text)


if __name__ == "__main__":
    for path in (*sorted(DOCS.glob("*.md")), ROOT / "weights.md"):
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
