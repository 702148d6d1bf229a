"""Access to models: every model name that a front end gets is checked here."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from argen.hub.cards import CARD_FILE, Card, check_kind, ids, list_models, read_folder_card

TRAINED = "trainings/"  # what the names of models begin with that were trained on the page
DEPTHS = "[!.]*", "[!.]*/[!.]*", "[!.]*/[!.]*/[!.]*"  # of folders that are looked through


class UnknownModel(KeyError):
    """Unknown model name, or a path outside the folders that models may be loaded from."""


class ModelAccess:
    """Loads models by name, if the name is allowed.

    Args:
        load: id or path -> the model.
        folders: where saved pipelines may be loaded from, beside the models that have an id.
        trainings: folder of those that the page has trained, which are called "trainings/NAME"; None for no such.
    """

    def __init__(self, load: Callable[[str], Any], folders: Sequence[Path] = (), trainings: Path | None = None):
        self.load, self.folders, self.trainings = load, [folder.resolve() for folder in folders], trainings

    def trained(self) -> dict[str, Path]:
        """The folders of what the page has trained, by the names of these models; the newest first."""
        results = self.trainings.glob("[!.]*/final") if self.trainings else []
        times = {path: path.stat().st_mtime for path in results if path.is_dir()}
        return {f"{TRAINED}{path.parent.name}": path for path in sorted(times, key=lambda path: -times[path])}

    def generators(self, control: bool | None = None, grid: bool = False, text: bool = False) -> list[str]:
        """The names of generators, as every front end lists them: those that have an id, then what was trained here.

        Args:
            control: those that take a control image, or those that take none; None for both.
            grid: only those whose images are grids of tokens, which can be edited.
            text: only those that draw captions.
        """
        trained = {name: card for name, path in self.trained().items() if (card := _generator_card(path)) is not None}
        cards = {card.id: card for card in list_models("generator")} | trained
        return [
            name
            for name, card in cards.items()
            if control in (None, "control" in card.takes)
            and (card.grid or not grid)
            and ("text" in card.takes or not text)
        ]

    def draws_classes(self, name: str) -> bool:
        """Whether a generator draws classes alone; the name has been checked."""
        path = Path(self.check(name))
        card = _generator_card(path) if path.is_dir() else next(card for card in list_models() if card.id == name)
        return card is not None and "text" not in card.takes

    def saved(self, pipeline: str) -> list[str]:
        """The names of what was trained, and the paths of what lies up to three folders below one of `folders`, that are saved pipelines of
        a class."""
        trained = [name for name, path in self.trained().items() if _class_of(path) == pipeline]
        within = None if self.trainings is None else self.trainings.resolve()
        files = {
            file for folder in self.folders for depth in DEPTHS for file in folder.glob(f"{depth}/model_index.json")
        }
        found = [file.parent for file in sorted(files) if within not in file.parents]
        return trained + [str(path) for path in found if _class_of(path) == pipeline]

    def __call__(self, name: str, kind: str = "generator") -> Any:
        """Load a model. Raises as `check` and the loader do."""
        return self.load(self.check(name, kind))

    def check(self, name: str, kind: str = "generator") -> str:
        """Check the name of a model: an id of `kind`, a path inside one of `folders`, or what was trained -> the name to load.

        Raises:
            UnknownModel: anything else.
            ValueError: the folder holds a model of another kind.
        """
        known = ids(kind)
        if name in known:
            return name
        if (path := self._inside(name)) is None and name.startswith(TRAINED) and name in (trained := self.trained()):
            path = str(trained[name])
        if path is not None:
            check_kind(path, kind)
            return path
        raise UnknownModel(f"there is no model {name[:100]!r}: expected one of {', '.join(known)}")

    def check_pipeline(self, name: str) -> str:
        """Check the name of a diffusers pipeline: OWNER/NAME on the hub, or a path inside one of `folders` -> the name to load.

        Raises:
            UnknownModel: another path of this machine.
        """
        name = name.strip()
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists():
            return name
        if (path := self._inside(name)) is not None:
            return path
        raise UnknownModel(
            f"{name[:100]!r} is not a pipeline that this server may load: expected OWNER/NAME on the hub, or a folder under one "
            "that --model-dir names at its start"
        )

    def _inside(self, name: str) -> str | None:
        """Return the resolved path if it exists inside one of `folders`, else None."""
        try:
            path = Path(name.strip()).resolve()
            inside = any(path.is_relative_to(folder) for folder in self.folders)
            return str(path) if name.strip() and inside and path.exists() else None
        except (OSError, ValueError):
            return None


def _generator_card(folder: Path) -> Card | None:
    """The card of a generator in a folder, with what its pipeline takes; None where there is none."""
    try:
        card = read_folder_card(folder / CARD_FILE)
    except ValueError:
        return None
    try:
        index = json.loads((folder / "model_index.json").read_text())
        by_class = not any(index["text_encoder"])
    except (OSError, ValueError, TypeError, LookupError):  # a LoRA, or a pipeline whose encoder has another name
        by_class = False
    card = replace(card, takes=("class",)) if by_class else card
    return card if card.kind == "generator" else None


def _class_of(folder: Path) -> str | None:
    """The class of a saved pipeline; None where it is none."""
    try:
        return json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, TypeError, LookupError):
        return None
