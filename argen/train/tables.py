"""Tables that say which caption, class or control image belongs to which file: csv, jsonl and parquet, as people have them."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from argen.words import cut, read_lines, read_text, visible

Record = dict[str, object]
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
FILE_COLUMNS, CAPTION_COLUMNS, LABEL_COLUMNS = ("file_name", "image_path"), ("caption", "text", "prompt"), ("label",)


@dataclass(frozen=True)
class Columns:
    """The columns that a user named; None for those of the usual names."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    control: str | None = None


def read_table(data: bytes, name: str) -> list[Record]:
    """The rows of a table.

    Args:
        data: the bytes of its file.
        name: of the file, by whose suffix it is read.

    Raises:
        ValueError: it is damaged, empty, no text in UTF-8, or of another kind.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in TABLES:
        raise ValueError(f"{name} is no table of captions: expected a .csv, .jsonl or .parquet file")
    reader = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(suffix, _read_csv)
    if not (records := reader(data, name)):
        raise ValueError(f"{name} holds no rows: expected one for each image")
    return records


def _read_csv(data: bytes, name: str) -> list[Record]:
    """Comma, semicolon or tab between the cells: the one that is found most in the header."""
    text = read_text(data, name)
    header = text.partition("\n")[0]
    rows = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True, skipinitialspace=True
    )
    records = []
    try:
        for row in rows:
            if None in row:
                raise ValueError(
                    f"{name} has more cells in line {rows.line_num} than in its header: put captions with commas in quotes"
                )
            records.append(row)
    except csv.Error as error:
        raise ValueError(f"{name} cannot be read as a .csv, line {rows.line_num} ({error}): save it again") from error
    return records


def _read_jsonl(data: bytes, name: str) -> list[Record]:
    records = []
    for number, line in read_lines(data, name):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{name} has no JSON object in line {number}: expected one in each line")
        records.append(record)
    return records


def _read_parquet(data: bytes, name: str) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name} cannot be read as a .parquet table: make or fetch it again") from error


def pick_column(columns: Iterable[str], wanted: str | None, usual: Sequence[str], what: str, table: str) -> str | None:
    """The name of a column: the one that is wanted, else the first of the usual ones; None where it has none of them.

    Args:
        what: option that names the column, for the error.
        table: name of the table, for the error.

    Raises:
        ValueError: the wanted column is not there; says which are.
    """
    columns = list(columns)
    if wanted is not None and wanted not in columns:
        raise ValueError(f"{table} has no column {cut(wanted)!r} ({what}): it has {listed(columns)}")
    return wanted or next((name for name in usual if name in columns), None)


def listed(names: Iterable[object]) -> str:
    """The first five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(cut(name) for name in names[:5]) + more if names else "none"


def captions_of(value: object, where: str) -> tuple[str, ...]:
    """The captions in a cell: a text, a list of them, or nothing. Those that hold nothing visible are left out.

    Raises:
        ValueError: it is something else, an object say.
    """
    if value is None or (isinstance(value, float) and value != value):  # an empty cell that pandas wrote
        return ()
    if isinstance(value, str):
        return (value.strip(),) if visible(value) else ()
    if isinstance(value, list | tuple):
        return tuple(caption for item in value for caption in captions_of(item, where))
    if isinstance(value, int | float):
        return (str(value),)
    raise ValueError(f"the caption of {where} is {cut(value)!r}: expected a text, or a list of texts")


def label_of(value: object) -> str | None:
    """The name of the class in a cell; None for an empty one."""
    empty = value is None or (isinstance(value, float) and value != value) or not visible(str(value))
    if empty:
        return None
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).strip()
