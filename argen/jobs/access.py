"""Access to models: every model name that a front end gets is checked here."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from argen.hub.cards import check_kind, ids


class UnknownModel(KeyError):
    """Unknown model name, or a path outside the folders that models may be loaded from."""


class ModelAccess:
    """Loads models by name, if the name is allowed.

    Args:
        load: id or path -> the model.
        folders: where saved pipelines may be loaded from, beside the models that have an id.
    """

    def __init__(self, load: Callable[[str], Any], folders: Sequence[Path] = ()):
        self.load, self.folders = load, [folder.resolve() for folder in folders]

    def __call__(self, name: str, kind: str = "generator") -> Any:
        """Load a model. Raises as `check` and the loader do."""
        return self.load(self.check(name, kind))

    def check(self, name: str, kind: str = "generator") -> str:
        """Check the name of a model: an id of `kind`, or a path inside one of `folders` -> the name to load.

        Raises:
            UnknownModel: anything else.
            ValueError: the folder holds a model of another kind.
        """
        known = ids(kind)
        if name in known:
            return name
        if (path := self._inside(name)) is not None:
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
