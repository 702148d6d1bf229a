"""Settings: frozen dataclasses of pydantic, whose fields carry default, bounds, choices and help.

A setting is declared once, as a field. Checks, command-line flags, widgets, bodies of the APIs, metadata and axes of tables come from it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic import Field as Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from samplers.errors import InvalidValue

SHOWN = 60  # characters of a wrong value in an error
MOST_DIGITS = 400  # of a number that is typed
Class = TypeVar("Class")


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def settings(cls: type[Class]) -> type[Class]:
    """Make a class a frozen pydantic dataclass that refuses a wrong value in one line: which, and what is expected.

    Integers are taken for floats, and nothing else for anything: no text for a number, no 4.0 for 4, no NaN.
    """
    config = ConfigDict(arbitrary_types_allowed=True, strict=True, allow_inf_nan=False)
    wrapped: Any = pydantic_dataclass(cls, frozen=True, config=config)  # a `Class`, which its types do not say
    construct = wrapped.__init__

    def __init__(self, *args, **kwargs):
        try:
            construct(self, *args, **kwargs)
        except ValidationError as error:
            raise _in_words(wrapped, error) from None

    wrapped.__init__ = __init__
    return wrapped


def _in_words(cls: type, error: ValidationError) -> ValueError:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    where = first["loc"][0] if first["loc"] else ""
    available = settings_of(cls)
    name = list(available)[where] if isinstance(where, int) else str(where).removesuffix("_")
    if first["type"] == "value_error" and not first["loc"]:  # of a check of several settings
        return first["ctx"]["error"]
    if name not in available:
        names = ", ".join(typed_of(cls)) or "none, there are no settings"
        return InvalidValue(f"unknown setting {name[:SHOWN]!r}: expected some of {names}", name)
    if first["type"] == "missing":
        message = f"{name} is missing: expected {available[name].expected}"
        return InvalidValue(message, name, "missing_required_parameter")
    kind = "integer" if available[name].kind is int else "decimal"
    side = {"greater_than": "below_min", "less_than": "above_max"}.get(first["type"].removesuffix("_equal"))
    code = (
        f"{kind}_{side}_value"
        if side
        else "invalid_type"
        if first["type"].endswith(("_type", "finite_number"))
        else "invalid_value"
    )
    return InvalidValue(f"{name} is {_preview(first['input'])}: expected {available[name].expected}", name, code)


def _preview(value: Any) -> str:
    """A wrong value, as an error shows it."""
    try:
        return repr(value)[:SHOWN]
    except ValueError:  # an integer of more digits than Python writes
        return "a very long number"


@dataclass(frozen=True)
class Setting:
    """What front ends know of a setting.

    Attributes:
        name: as users write it, e.g. "lambda" of the field ``lambda_``.
        field: as the class has it.
        kind: int, float, bool or str; of other fields None, and only Python can set them.
        optional: whether None is allowed, which leaves it to the model or to another setting.
        pair: whether two numbers may stand for one.
        low, high: both are allowed, unless `open_low`.
        flags: shorter forms of the command-line flag, which is the name.
    """

    name: str
    field: str
    kind: type | None
    default: Any
    help: str
    optional: bool = False
    pair: bool = False
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    choices: tuple[str, ...] = ()
    note: str = ""
    flags: tuple[str, ...] = ()
    metavar: str = ""

    @property
    def bounds(self) -> str:
        """E.g. "0 to 1", "1 or more"; empty where there are none."""
        low = None if self.low is None else f"more than {self.low:,}" if self.open_low else f"{self.low:,}"
        if self.high is None:
            return "" if low is None else low if self.open_low else f"{low} or more"
        return f"at most {self.high:,}" if low is None else f"{low} to {self.high:,}"

    @property
    def expected(self) -> str:
        """What a value must be, e.g. "a whole number, 1 to 64"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        kinds: dict[type | None, str] = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "text",
            None: self.help,
        }
        note = f" ({self.note})" if self.note else ""
        pair = ", or two between commas" if self.pair else ""
        return ", ".join(filter(None, (kinds[self.kind], self.bounds))) + pair + note

    def parse(self, text: str) -> Any:
        """The value that was typed: "4", "4.0", "0,5", "yes", "none", "50,15".

        Raises:
            ValueError: it is none of this setting.
        """
        text = text.strip()
        if self.optional and text.lower() in ("", "none", "null"):
            return None
        if self.pair and (both := re.fullmatch(r"[(\[]?\s*(\d+)\s*,\s*(\d+)\s*[)\]]?", text)):
            return int(both[1]), int(both[2])
        if self.kind in (None, str):
            return text
        if self.kind is float:
            text = re.sub(r"^([+-]?\d+),(\d+)$", r"\1.\2", text)  # as many countries write 1.5
        elif self.kind is int:
            text = re.sub(r"^([+-]?\d+)\.0*$", r"\1", text)
        try:
            if len(text) > MOST_DIGITS or "_" in text:  # which Python takes inside numbers
                raise ValueError
            return TypeAdapter(self.kind).validate_python(text)
        except ValueError:
            preview = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
            raise InvalidValue(
                f"{self.name} is {preview!r}: expected {self.expected}", self.name, "invalid_type"
            ) from None

    def lenient(self, value: Any) -> Any:
        """A value as pages, forms and tables have it: 4.0 for 4, and text for a number."""
        if isinstance(value, str) and self.kind is not str:
            return self.parse(value)
        is_whole = self.kind is int and isinstance(value, float) and value.is_integer()
        return int(value) if is_whole else value


@cache
def settings_of(cls: type) -> dict[str, Setting]:
    """The settings of a class of `settings`, by the names that users write."""
    declared: dict[str, FieldInfo] = getattr(cls, "__pydantic_fields__", {})
    all_settings = [_setting(name, field) for name, field in declared.items()]
    return {setting.name: setting for setting in all_settings}


def typed_of(cls: type) -> dict[str, Setting]:
    """Those of `settings_of` that can be typed; others only Python can set."""
    return {name: setting for name, setting in settings_of(cls).items() if setting.kind or setting.pair}


def _setting(name: str, field: FieldInfo) -> Setting:
    parts = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    limits = [*field.metadata, *(limit for part in parts for limit in _limits(part))]
    parts = tuple(get_args(part)[0] if get_origin(part) is Annotated else part for part in parts)
    choices = next((get_args(part) for part in parts if get_origin(part) is Literal), ())
    extra: Mapping[str, Any] = field.json_schema_extra if isinstance(field.json_schema_extra, Mapping) else {}
    choices = tuple(extra.get("choices", choices))
    kind: type | None = str if choices else next((part for part in parts if part in (int, float, bool, str)), None)
    metavars: dict[type | None, str] = {int: "N", float: "X"}
    low = next((_number(limit.ge) for limit in limits if isinstance(limit, Ge)), None)
    open_low = next((_number(limit.gt) for limit in limits if isinstance(limit, Gt)), None)
    below = next((_number(limit.lt) for limit in limits if isinstance(limit, Lt)), None)
    high = next((_number(limit.le) for limit in limits if isinstance(limit, Le)), None) if below is None else below
    return Setting(
        name.removesuffix("_"),
        name,
        kind,
        field.get_default(call_default_factory=True) if not field.is_required() else None,
        field.description or "",
        NoneType in parts,
        any(get_origin(part) is tuple for part in parts),
        open_low if low is None else low,
        high,
        open_low is not None,
        choices,
        extra.get("note", ""),
        tuple(extra.get("flags", ())),
        extra.get("metavar") or metavars.get(kind, name.upper()),
    )


def _number(bound: object) -> float | None:
    """A bound that front ends can show."""
    return bound if isinstance(bound, int | float) else None


def _limits(part: Any) -> list:
    """Constraints that annotate a type, in a ``Field`` or directly."""
    annotations = get_args(part)[1:] if get_origin(part) is Annotated else ()
    return [
        limit
        for annotation in annotations
        for limit in (annotation.metadata if isinstance(annotation, FieldInfo) else [annotation])
    ]


def make(cls: type, arguments: Mapping[str, Any]) -> Any:
    """An object of a class of `settings`, with arguments by the names that users write.

    Raises:
        ValueError: an unknown name, or a wrong value.
    """
    available = settings_of(cls)
    if unknown := [name for name in arguments if name not in available]:
        names = ", ".join(typed_of(cls)) or "none: it has no settings"
        owner = getattr(cls, "name", cls.__name__)
        raise ValueError(f"unknown setting {str(unknown[0])[:SHOWN]!r} of {owner}: expected {names}")
    return cls(**{available[name].field: value for name, value in arguments.items()})
