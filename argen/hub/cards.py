"""Cards: what argen knows of each checkpoint, one TOML file for each.

Those of argen lie in ``argen/cards``; an installed package adds its own by an entry point of the group ``argen.cards`` that names a package
with TOML files. A folder that argen saved has a card called ``argen.toml`` in it.
"""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from argen.files import WEIGHTS, replacing
from argen.registry import MAX_SHOWN, cards, nearest, pipelines
from argen.words import cut, visible

FOLDER = Path(__file__).parents[1] / "cards"
CARD_FILE = "argen.toml"
KINDS = ("generator", "tokenizer", "encoder", "drafter", "diffusion", "counter", "judge")


@dataclass(frozen=True)
class Card:
    """A checkpoint, and how it is loaded.

    Attributes:
        kind: "generator" (`argen.load` gives a pipeline), "tokenizer" (image <-> tokens), "encoder" (text and image), "drafter" (of a
            generator, which brings it), "diffusion" (a pipeline of diffusers), "counter" (of the things in an image) or "judge" (what an
            image shows).
        about: one line.
        target: "module:function" that reads the folder of the files, called with it and with `arguments`.
        licence: of the weights.
        parameters: in millions, of everything that the id loads by itself.
        repo: hub repository of published weights; None for those that ship or lie in a folder.
        files: glob patterns of the files in `repo` that are read.
        fetches: further weights that loading needs, with their licences, where they come from elsewhere.
        revision: commit of `repo` that is fetched; None for the one at the first fetch.
        folder: where the files of a package's card lie, relative to the card.
        dtypes: precisions in which it gives what it should, of "fp32", "bf16" and "fp16".
        takes: what a generator is asked with: "text", "class", "control" (an image to follow).
        grid: whether its images are grids of tokens, each with its position, which can be read from images, too.
        unproven: whether no key list is public that would prove that its files fit.
        order: place in lists; those without come last.
        defaults: sampling settings that differ from those of the pipeline's class.
        training: how weights that ship were made: their `network`, `recipe`, `length`, `device` and held-out `scores`.
        tools: settings of `argen bind`, `erase` and `count` on this pipeline.
    """

    id: str
    kind: str
    about: str
    target: str
    licence: str = "unknown"
    parameters: float = 0.0
    repo: str | None = None
    files: tuple[str, ...] = ()
    fetches: tuple[str, ...] = ()
    revision: str | None = None
    folder: str | None = None
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    takes: tuple[str, ...] = ("text",)
    grid: bool = False
    unproven: bool = False
    order: int = 1000
    arguments: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {str(self.kind)[:MAX_SHOWN]!r}: expected one of {', '.join(KINDS)}")

    @property
    def ships(self) -> bool:
        """Whether the weights are a part of argen, or of the package that brings the card."""
        return self.repo is None

    @property
    def path(self) -> Path:
        """The folder of weights that ship."""
        return Path(self.folder) if self.folder else WEIGHTS / self.id.removeprefix("argen/")

    def tool(self, name: str) -> dict[str, Any]:
        """The card's settings of a tool, none where it has none."""
        return dict(self.tools.get(name, {}))


def read_card(path: Path) -> Card:
    """A card out of a TOML file.

    Raises:
        ValueError: it is none; says the file and what is wrong.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
        folder = {"folder": str((path.parent / content["folder"]).resolve())} if "folder" in content else {}
        return Card(**content | lists | folder)
    except (TypeError, ValueError, OSError) as error:
        names = ", ".join(item.name for item in fields(Card))
        raise ValueError(f"{path} is no card ({error}): expected TOML with some of {names}") from error


def write_card(card: Card, folder: Path) -> None:
    """Write a card into a saved folder, which then loads with its defaults and tools; how the shipped weights were trained stays out."""
    plain = {item.name: getattr(card, item.name) for item in fields(card) if item.name != "training"}
    tables = {name: value for name, value in plain.items() if isinstance(value, Mapping) and value}
    tools = tables.pop("tools", {})
    lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items() if _is_set(card, name, value)]
    for name, table in (tables | {f"tools.{tool}": settings for tool, settings in tools.items()}).items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    with replacing(folder / CARD_FILE) as file:
        file.write(("\n".join(lines) + "\n").encode())


def _is_set(card: Card, name: str, value: Any) -> bool:
    return not isinstance(value, Mapping) and value is not None and value != getattr(type(card), name, None)


def is_own(id: str) -> bool:
    """Whether a card is one of argen's, not of an installed package or a running program."""
    return id in _own_cards()


def all_cards() -> dict[str, Card]:
    """Every card by its id: argen's own, those of installed packages, those that the program registered."""
    by_id = dict(_own_cards())
    for name in cards:
        component = cards[name]
        for card in _package_cards(component) if isinstance(component, ModuleType) else [component]:
            by_id.setdefault(card.id, card)
    return by_id


@cache
def _own_cards() -> dict[str, Card]:
    return _in_folder(FOLDER)


@cache
def _package_cards(package: ModuleType) -> list[Card]:
    return [card for folder in package.__path__ for card in _in_folder(Path(folder)).values()]


def _in_folder(folder: Path) -> dict[str, Card]:
    folder_cards = [read_card(path) for path in folder.glob("*.toml")]
    return {card.id: card for card in sorted(folder_cards, key=lambda card: (card.order, card.kind, card.id.lower()))}


def find_card(id: str) -> Card:
    """The card of an id, or of the card's own folder.

    Raises:
        ValueError: there is none; says which ids are near.
    """
    if id in all_cards():
        return all_cards()[id]
    check_known(id)
    return read_card(Path(id) / CARD_FILE)


def check_known(model: str | Path) -> None:
    """Raises:
    ValueError: there is neither a card of this id nor anything at this path; says which ids are near.
    """
    available = all_cards()
    if str(model) not in available and not (visible(str(model)) and os.path.exists(model)):
        raise ValueError(
            f"unknown model {cut(model)!r}: expected an id that `argen models` lists, the folder of a saved pipeline or a "
            f"checkpoint file{nearest(str(model), available)}"
        )


def kind_of(model: str | Path) -> str | None:
    """The kind of an id or of a saved folder, see `Card`; None of a checkpoint file, or where the folder does not say it."""
    if str(model) in all_cards():
        return all_cards()[str(model)].kind
    folder = Path(model)
    if (folder / CARD_FILE).is_file():
        return read_card(folder / CARD_FILE).kind
    try:
        name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return "generator" if name in pipelines else "diffusion"


def check_kind(model: str | Path, kind: str) -> None:
    """Raises:
    ValueError: the model is of another kind; says what it is for.
    """
    found = kind_of(model)
    if found == "diffusion" and kind == "generator":
        raise ValueError(
            f"{model} is a diffusion pipeline, expected a generator: draw with it by `argen bind PROMPT --model {model}` or `argen count`, "
            f"in Python by argen.load({str(model)!r})(PROMPT)"
        )
    if found not in (None, kind):
        article = "an" if str(found)[0] in "aeiou" else "a"
        raise ValueError(f"{model} is {article} {found}, expected a {kind}: `argen models` lists them")


def list_models(kind: str | None = None) -> list[Card]:
    """The cards of everything that `argen.load` takes by its id, or of one kind of them, a name in `KINDS`.

    Raises:
        ValueError: no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind {cut(kind)!r}: expected one of {', '.join(KINDS)}{nearest(str(kind), KINDS)}")
    return [card for card in all_cards().values() if kind in (None, card.kind)]


def ids(kind: str) -> list[str]:
    """Those of a kind, see `Card`."""
    return [card.id for card in list_models(kind)]


def generators(control: bool = False) -> list[str]:
    """The generators that take a control image, or those that take none."""
    return [card.id for card in list_models("generator") if ("control" in card.takes) == control]
