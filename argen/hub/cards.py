"""Cards: what argen knows of each checkpoint, one TOML file for each.

Those of argen lie in ``argen/cards``; an installed package adds its own by an entry point of the group ``argen.cards`` that names a package
with TOML files. A folder that argen saved has a card called ``argen.toml`` in it; since such a folder may come from anywhere, its card names
only what one of argen or of an installed package names, too.
"""

import json
import logging
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from argen.files import WEIGHTS, replacing
from argen.registry import CARD_NAMES, MAX_SHOWN, cards, nearest, pipelines, readers
from argen.words import cut, visible

if TYPE_CHECKING:
    from argen.data.reading import Reading

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parents[1] / "cards"
CARD_FILE = "argen.toml"
KINDS = ("generator", "tokenizer", "encoder", "drafter", "diffusion", "counter", "judge")
SAVED = ("argen.hub.loading:load", "")  # targets of saved pipelines, whose model_index.json says what they are
ADAPTED = "argen.hub.loading:read_adapted"  # target of a LoRA that was trained
TRAINED_VQ = "argen.models.tokenizers:read_saved_vq"  # target of a VQ of LlamaGen that was trained
TRAINED_FLEXTOK = "argen.models.tokenizers:read_saved_flextok"  # target of a FlexTok that was trained
DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
DEFAULTS = ("guidance_scale", "temperature", "top_k", "top_p", "steps")
MAX_BYTES = 1_000_000  # of a card


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
        tokenizer_parameters: in millions, those among them of the image tokenizer, which stays in float32.
        kept_parameters: in millions, those among them that quantizing leaves as they are, beside those of the image tokenizer.
        text_parameters: in millions, of a text encoder that is fetched beside.
        repo: hub repository of published weights; None for those that ship or lie in a folder.
        files: glob patterns of the files in `repo` that are read.
        fetches: further weights that loading needs, with their licences, where they come from elsewhere.
        revision: commit of `repo` that is fetched; None for the one at the first fetch.
        folder: where the files of a package's card lie, relative to the card.
        dtypes: precisions in which it gives what it should, of "fp32", "bf16" and "fp16".
        takes: what a generator is asked with: "text", "class", "control" (an image to follow).
        grid: whether its images are grids of tokens, each with its position, which can be read from images, too.
        names: "emoji" where a prompt is read in the names that the emoji family learned, see `argen.data.reading`; "" where it is taken as it is.
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
    tokenizer_parameters: float = 0.0
    kept_parameters: float = 0.0
    text_parameters: float = 0.0
    repo: str | None = None
    files: tuple[str, ...] = ()
    fetches: tuple[str, ...] = ()
    revision: str | None = None
    folder: str | None = None
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    takes: tuple[str, ...] = ("text",)
    grid: bool = False
    names: str = ""
    unproven: bool = False
    order: int = 1000
    arguments: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        for item in fields(self):
            _check_type(item, getattr(self, item.name))
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind[:MAX_SHOWN]!r}: expected one of {', '.join(KINDS)}")
        if self.names not in ("", "emoji"):
            raise ValueError(f"names is {cut(repr(self.names))}: expected 'emoji', or none")
        if unknown := [name for name in self.defaults if name not in DEFAULTS]:
            raise ValueError(f"defaults has {cut(unknown[0])!r}: expected some of {', '.join(DEFAULTS)}")
        if wrong := [tool for tool, settings in self.tools.items() if not isinstance(settings, Mapping)]:
            raise ValueError(f"tools.{cut(wrong[0])} is no table")

    @property
    def references(self) -> set[str]:
        """What loading and the tools import: "module:attribute" of readers, networks and vocabularies."""
        named = self.target, self.arguments.get("network"), self.tool("erase").get("vocabulary")
        return {str(name) for name in named if name is not None}

    @property
    def ships(self) -> bool:
        """Whether the weights are a part of argen, or of the package that brings the card."""
        return self.repo is None

    @property
    def path(self) -> Path:
        """The folder of weights that ship."""
        return Path(self.folder) if self.folder else WEIGHTS / self.id.removeprefix("argen/")

    def read(self, prompt: str, literal: bool | None = None) -> "Reading":
        """How the model reads a prompt; word for word where it has no names of its own, or is asked to."""
        from argen.data.reading import Reading, read

        return read(prompt) if self.names and not literal else Reading(prompt, prompt)

    def tool(self, name: str) -> dict[str, Any]:
        """The card's settings of a tool, none where it has none."""
        return dict(self.tools.get(name, {}))


def _check_type(item: Field, value: Any) -> None:
    """Raises:
    ValueError: a value is not of its field's type, which that of the default says.
    """
    default = item.default if item.default is not MISSING else "" if item.default_factory is MISSING else {}
    if isinstance(default, bool):
        fits, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, int | float):
        kinds = int if isinstance(default, int) else int | float
        fits, expected = isinstance(value, kinds) and not isinstance(value, bool), "a number"
    elif isinstance(default, tuple):
        fits, expected = isinstance(value, tuple) and all(isinstance(part, str) for part in value), "a list of texts"
    elif isinstance(default, dict):
        fits, expected = isinstance(value, Mapping), "a table"
    else:
        fits = isinstance(value, str) and value.isprintable() or value is default is None
        expected = "text in one line"
    if not fits:
        raise ValueError(f"{item.name} is {cut(repr(value))}: expected {expected}")


def read_card(path: Path) -> Card:
    """A card out of a TOML file.

    Raises:
        ValueError: it is none; says the file and what is wrong.
    """
    names = [item.name for item in fields(Card)]
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > MAX_BYTES):
            raise ValueError(f"it is no file, or one of more than {MAX_BYTES:,} bytes")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        if unknown := [name for name in content if name not in names]:
            raise ValueError(f"it has {cut(unknown[0])!r}")
        required = [item.name for item in fields(Card) if item.default is item.default_factory is MISSING]
        if missing := [name for name in required if name not in content]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
        folder = content.get("folder")
        resolved = {"folder": str((path.parent / folder).resolve())} if isinstance(folder, str) else {}
        return Card(**content | lists | resolved)
    except (ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is no card ({reason}): expected TOML with some of {', '.join(names)}") from error


def read_folder_card(path: Path) -> Card:
    """`read_card` of a folder that may come from anywhere: what it names to import must be known.

    Raises:
        ValueError: it is none; it names what no card of argen or of an installed package names, or lies in a folder of itself.
    """
    card = read_card(path)
    trusted = {ADAPTED, TRAINED_VQ, TRAINED_FLEXTOK, *SAVED}.union(
        *(known.references for known in all_cards().values())
    )
    trusted |= {reader.point.value for reader in readers.installed.values()}
    trusted |= {f"{reader.__module__}:{reader.__qualname__}" for reader in readers.added.values()}
    if unknown := sorted(card.references - trusted):
        raise ValueError(
            f"{path} names {cut(unknown[0])!r}, which no card of argen or of an installed package names: nothing of it was "
            "run, save or train the model again"
        )
    if card.target in SAVED and not (path.parent / "model_index.json").is_file():
        raise ValueError(
            f"{path} is that of a saved pipeline, but there is no model_index.json beside it: save it again"
        )
    return card


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
    for component in cards.values():
        for card in _package_cards(component) if isinstance(component, ModuleType) else [component]:
            by_id.setdefault(card.id, card)
    return by_id


@cache
def _own_cards() -> dict[str, Card]:
    return _in_order(read_card(path) for path in FOLDER.glob("*.toml"))


@cache
def _package_cards(package: ModuleType) -> list[Card]:
    """The cards of a package; those that cannot be read, or take the id of argen's, are left out with a warning."""
    package_cards = []
    for path in (path for folder in package.__path__ for path in Path(folder).glob("*.toml")):
        try:
            card = read_card(path)
            if not re.fullmatch(CARD_NAMES, card.id) or card.id in _own_cards():
                raise ValueError(f"the id {cut(card.id)!r} of {path} is argen's, or not of the form OWNER/NAME")
            package_cards.append(card)
        except ValueError as error:
            logger.warning("a card of the package %s is left out: %s", package.__name__, error)
    return list(_in_order(package_cards).values())


def _in_order(unordered: Iterable[Card]) -> dict[str, Card]:
    return {card.id: card for card in sorted(unordered, key=lambda card: (card.order, card.kind, card.id.lower()))}


def find_card(id: str) -> Card:
    """The card of an id, or of the card's own folder.

    Raises:
        ValueError: there is none; says which ids are near; see `read_folder_card`.
    """
    if id in all_cards():
        return all_cards()[id]
    check_known(id)
    return read_folder_card(Path(id) / CARD_FILE)


def released_card(path: Path) -> Card | None:
    """The card of a released file by its name, of those that need more than their tensors; of the others the tensors say all."""
    by_name = {card.arguments["name"]: card for card in all_cards().values() if card.arguments.keys() > {"name"}}
    return by_name.get(path.stem)


def reading_of(model: str, prompt: str, literal: bool | None = None) -> "Reading":
    """How a model reads a prompt, see `Card.read`; word for word where it has no card."""
    from argen.data.reading import Reading

    if model in all_cards() or (Path(model) / CARD_FILE).is_file():
        return find_card(model).read(prompt, literal)
    return Reading(prompt, prompt)


def kind_of(model: str | Path) -> str | None:
    """The kind of a model, see `Card`, by its id or by the files in its folder; None where only loading tells it.

    Raises:
        ValueError: a card that is none, or one of another kind than the pipeline beside it.
    """
    if str(model) in all_cards():
        return all_cards()[str(model)].kind
    folder, saved = Path(model), None
    if (folder / "model_index.json").is_file():
        try:
            name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
            saved = "generator" if name in pipelines else "diffusion" if name in DIFFUSION else None
        except (ValueError, TypeError, LookupError, RecursionError):  # which loading explains
            saved = None
    if not os.path.lexists(folder / CARD_FILE):
        return saved
    card = read_folder_card(folder / CARD_FILE)
    if saved not in (None, card.kind):
        raise ValueError(
            f"{folder / CARD_FILE} says {card.kind}, but model_index.json is that of a {saved}: save it again"
        )
    return card.kind


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


def check_kind(model: str | Path, kind: str) -> None:
    """Raises:
    ValueError: the model is of another kind; says what it is for.
    """
    actual = kind_of(model)
    if actual == "diffusion" and kind == "generator":
        raise ValueError(
            f"{model} is a diffusion pipeline, expected a generator: draw with it by `argen bind PROMPT --model {model}` or `argen count`, "
            f"in Python by argen.load({str(model)!r})(PROMPT)"
        )
    if actual not in (None, kind):
        kind = "diffusion pipeline" if kind == "diffusion" else kind
        article = "an" if str(actual)[0] in "aeiou" else "a"
        raise ValueError(f"{model} is {article} {actual}, expected a {kind}: `argen models` lists them")


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
