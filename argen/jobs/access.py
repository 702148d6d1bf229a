"""Which models may be asked for: the one place that every front end's name of a model passes."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from argen.hub.cards import ids


class UnknownModel(KeyError):
    """No model has this name, or it lies where none may be loaded from."""


class ModelAccess:
    """Gives models by their names, those that may be asked for.

    Args:
        load: id or path -> the model.
        folders: where saved pipelines may be loaded from, beside the models that have an id.
    """

    def __init__(self, load: Callable[[str], Any], folders: Sequence[Path] = ()):
        self.load, self.folders = load, [folder.resolve() for folder in folders]

    def __call__(self, name: str, kind: str = "generator") -> Any:
        """A model. Raises as `check` and the loader do."""
        return self.load(self.check(name, kind))

    def check(self, name: str, kind: str = "generator") -> str:
        """The name of a model that may be asked for: an id of `kind`, or the path of something in one of `folders`.

        Raises:
            UnknownModel: anything else.
        """
        known = ids(kind)
        if name in known:
            return name
        if (path := self._inside(name)) is not None:
            return path
        raise UnknownModel(f"there is no model {name[:100]!r}: expected one of {', '.join(known)}")

    def check_pipeline(self, name: str) -> str:
        """The name of a diffusers pipeline that may be loaded: OWNER/NAME on the hub, or the path of something in one of `folders`.

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
        """The path of something in one of `folders`; None for any other text."""
        try:
            path = Path(name.strip()).resolve()
            inside = any(path.is_relative_to(folder) for folder in self.folders)
            return str(path) if name.strip() and inside and path.exists() else None
        except (OSError, ValueError):
            return None
