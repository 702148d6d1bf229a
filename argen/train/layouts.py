"""How a user's images, captions and classes are arranged: what is there is detected, named and listed; no image is read."""

import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from argen.eval.images import SUFFIXES, natural
from argen.train.containers import Container, Folder, Parquets, Tars, Zip
from argen.train.tables import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    LABEL_COLUMNS,
    TABLES,
    Columns,
    Record,
    captions_of,
    label_of,
    listed,
    pick_column,
    read_table,
)
from argen.words import read_text

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
CAPTION_FILES = (".txt", ".caption")
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
EXPECTED = "expected a folder of images, or a .zip, .tar, .parquet, .jsonl or .csv file"


class Row(NamedTuple):
    """An image of a set, before it is read.

    Attributes:
        name: of its file in the container.
        label: name of its class.
        control: name of the file of its control image.
        split: train, validation, test, or "" where the set has no splits.
    """

    name: str
    captions: tuple[str, ...] = ()
    label: str | None = None
    control: str | None = None
    split: str = ""


@dataclass
class Listing:
    """What lies at a path.

    Attributes:
        layout: in words.
        classes: their names in order, where the images have classes.
        unlisted: names of images that the metadata do not name.
        dropped: reason -> names of samples that cannot be used.
        warnings: what may not be as it was meant, in sentences.
    """

    layout: str
    container: Container
    rows: list[Row]
    classes: list[str] | None = None
    unlisted: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def list_images(path: Path, captions: Path | None, columns: Columns) -> Listing:
    """List the images at `path`, see `argen.train.sources.open_source`.

    Args:
        captions: a table of captions beside `path`; None to look for one.

    Raises:
        FileNotFoundError, ValueError: there is nothing; nothing that can be read; the table does not fit the images.
    """
    if not path.exists():
        raise FileNotFoundError(f"no images at {path}: {EXPECTED}")
    if captions is not None and not captions.is_file():
        if captions.exists():
            raise ValueError(f"{captions} is a folder: expected a table of captions, a .csv, .jsonl or .parquet file")
        raise FileNotFoundError(f"no captions at {captions}: expected a .csv, .jsonl or .parquet file")
    suffix = "" if path.is_dir() else path.suffix.lower()
    if path.is_file() and suffix not in {".zip", ".tar", *TABLES}:
        raise ValueError(f"{path} is a file of another kind: {EXPECTED}")
    if suffix in TABLES and not (suffix == ".parquet" and _has_images(path, columns)):
        if captions is not None:
            raise ValueError(f"{path} and {captions} are both tables: give the folder of the images and one table")
        return _from_metadata(Folder(path.parent, walk=False), [path], columns, f"table {path.name}", all_images=False)
    container = Zip(path) if suffix == ".zip" else Folder(path) if path.is_dir() else None
    images = [] if container is None else _images(container)
    tars, tables = ([path] if suffix == end else _named(container, end) for end in (".tar", ".parquet"))
    if not images and (tars or tables):
        if captions is not None:
            raise ValueError(f"{path} holds its captions itself: leave {captions} away")
        return _from_tars(path, tars, columns) if tars else _from_parquet(path, tables, columns)
    if container is None or not images:
        ends = sorted({PurePosixPath(name).suffix.lower() or name for name in container.stamps}) if container else []
        hint = f"its files end in {listed(ends)}" if ends else "it is empty"
        raise ValueError(f"no images in {path} ({hint}): expected files like .png, .jpg or .webp")
    if captions is not None:
        return _from_metadata(container, [captions], columns, f"captions in {captions.name}")
    return _from_files(container, images, columns)


def _from_files(container: Container, images: list[str], columns: Columns) -> Listing:
    """Images beside metadata or caption files, in class folders, or alone."""
    tables = [
        name for name in container.stamps if re.fullmatch(r"metadata\.(csv|jsonl|parquet)", posixpath.basename(name))
    ]
    if tables:
        return _from_metadata(container, tables, columns, f"{posixpath.basename(tables[0])} beside the images")
    named = {option: name for option, name in vars(columns).items() if name is not None}
    if named:
        raise ValueError(
            f"{container.path} has no table with a column {', '.join(map(repr, named.values()))}: add a metadata.csv, or name "
            "no columns"
        )
    split_of, depth = _arrangement(images, container)
    beside = {name: _caption_file(name, container) for name in images}
    if any(beside.values()):
        rows = []
        for name, file in beside.items():
            text = read_text(container.read(file), file) if file else None
            rows.append(Row(name, captions_of(text, name), split=split_of.get(name, "")))
        return Listing("captions in .txt or .caption files beside the images", container, rows)
    rows = []
    for name in images:
        folders = name.split("/")[depth:-1]
        rows.append(Row(name, label=folders[0] if folders else None, split=split_of.get(name, "")))
    if all(row.label is not None for row in rows):
        return _classed(Listing("class folders, labels are their sorted names", container, rows))
    alone = [row.name for row in rows if row.label is None]
    listing = Listing("images without captions and classes", container, [row._replace(label=None) for row in rows])
    if len(alone) < len(rows):
        listing.warnings.append(
            f"there are folders, and images outside them ({listed(alone)}): the folders are no classes"
        )
    return listing


def _from_metadata(
    container: Container, tables: Sequence[str | Path], columns: Columns, layout: str, all_images: bool = True
) -> Listing:
    """Images that tables name. A file in several rows has the captions of all of them.

    Args:
        tables: names in the container, or paths elsewhere.
        all_images: whether the container lists all images, so that those that no table names are counted.
    """
    rows: dict[str, Row] = {}
    missing: list[str] = []
    for table in tables:
        inside = isinstance(table, str)
        data = container.read(table) if inside else table.read_bytes()
        base = posixpath.dirname(table) if inside else table.parent.absolute().as_posix()
        if not inside and isinstance(container, Zip):
            base = posixpath.commonpath([posixpath.dirname(name) for name in _images(container)])
        records = read_table(data, str(table))
        for found, row in _table_rows(container, records, base, columns, str(table)):
            if not found:
                missing.append(row.name)
            elif row.name in rows:
                row = row._replace(captions=rows[row.name].captions + row.captions)
            if found:
                rows[row.name] = row
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        count = "a file" if len(missing) == 1 else f"{len(missing):,} files"
        raise ValueError(f"{listed(map(str, tables))} names {count} that {verb} not there: {listed(missing)}")
    if all_images:
        images = _images(container)
        used = rows.keys() | {row.control for row in rows.values()}
        unlisted, split_of = [name for name in images if name not in used], _arrangement(images, container)[0]
    else:
        unlisted, split_of = [], {}
    ordered = sorted(rows.values(), key=lambda row: natural(row.name)) if all_images else rows.values()
    listing = Listing(
        layout, container, [row._replace(split=split_of.get(row.name, "")) for row in ordered], None, unlisted
    )
    return _classed(listing)


def _table_rows(
    container: Container, records: list[Record], base: str, columns: Columns, table: str
) -> Iterable[tuple[bool, Row]]:
    """Yield whether its file is there, and the row, of the records of one table."""
    names = dict.fromkeys(name for record in records for name in record)
    file_column = pick_column(names, columns.image, FILE_COLUMNS, "image column", table)
    caption_column = pick_column(names, columns.caption, CAPTION_COLUMNS, "caption column", table)
    label_column = pick_column(names, columns.label, LABEL_COLUMNS, "label column", table)
    control_column = pick_column(names, columns.control, (), "control column", table)
    if file_column is None:
        raise ValueError(f"{table} has no column file_name: it has {listed(names)}; name the one of the files")
    if caption_column is None and label_column is None:
        raise ValueError(
            f"{table} has no column caption, text or prompt: it has {listed(names)}; name the one of the captions"
        )
    for number, record in enumerate(records, 1):
        wanted = record.get(file_column)
        if not isinstance(wanted, str) or not wanted.strip():
            raise ValueError(f"{table} names no file in row {number}: expected one in the column {file_column}")
        name, control = container.find(wanted.strip(), base), None
        if control_column is not None and record.get(control_column):
            control = container.find(str(record[control_column]).strip(), base)
            if control is None:
                yield False, Row(str(record[control_column]))
        captions = captions_of(record.get(caption_column), wanted)
        yield name is not None, Row(name or wanted, captions, label_of(record.get(label_column)), control)


def _from_tars(path: Path, shards: list[Path], columns: Columns) -> Listing:
    """WebDataset: the files of a sample have the same name up to the first dot."""
    container = Tars(path, shards)
    samples: dict[str, dict[str, str]] = {}
    for name in container.stamps:
        folder, _, file = name.rpartition("/")
        stem, _, kind = file.partition(".")
        samples.setdefault(f"{folder}/{stem}", {})[kind.lower()] = name
    kinds = dict.fromkeys(kind for sample in samples.values() for kind in sample)
    usual = sorted(kind for kind in kinds if f".{kind}" in SUFFIXES and kind != columns.control)
    pick_column(kinds, columns.image, (), "image column", str(path))
    pick_column(kinds, columns.control, (), "control column", str(path))
    rows, without, fields = [], [], set()
    for key, files in samples.items():
        image = (
            files.get(columns.image) if columns.image else next((files[kind] for kind in usual if kind in files), None)
        )
        if image is None:
            without.append(key)
            continue
        values = _sample_values(container, files)
        caption = columns.caption or pick_column(values, None, ("txt", *CAPTION_COLUMNS), "", key)
        label = columns.label or pick_column(values, None, ("cls", *LABEL_COLUMNS), "", key)
        fields |= values.keys()
        captions, split = captions_of(values.get(caption), key), _split_of_file(container.shard(image))
        rows.append(Row(image, captions, label_of(values.get(label)), files.get(columns.control), split))
    pick_column(sorted(fields), columns.caption, (), "caption column", str(path))
    pick_column(sorted(fields), columns.label, (), "label column", str(path))
    dropped = {"without image": without} if without else {}
    return _classed(Listing("WebDataset shards (.tar)", container, rows, dropped=dropped))


def _sample_values(container: Tars, files: dict[str, str]) -> Record:
    """The texts of a WebDataset sample by the ends of their files, and the fields of its .json."""
    values: Record = {}
    if "json" in files:
        try:
            record = json.loads(read_text(container.read(files["json"]), files["json"]))
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{files['json']} holds no JSON object: write it again")
        values |= record
    for kind in ("txt", "caption", "text", "cls", "label"):
        if kind in files:
            values[kind] = read_text(container.read(files[kind]), files[kind])
    return values


def _from_parquet(path: Path, files: list[Path], columns: Columns) -> Listing:
    """Parquet tables that hold the images."""
    container = Parquets(path, files)
    rows: list[Row] = []
    classes = None
    for file, table in container.tables.items():
        names = table.column_names
        image = pick_column(names, columns.image, (*IMAGE_COLUMNS, *FILE_COLUMNS), "image column", file)
        caption = pick_column(names, columns.caption, CAPTION_COLUMNS, "caption column", file)
        label = pick_column(names, columns.label, LABEL_COLUMNS, "label column", file)
        control = pick_column(names, columns.control, (), "control column", file)
        if image is None:
            raise ValueError(f"{file} has no column image: it has {listed(names)}; name the one of the images")
        class_names = getattr(table.features[label], "names", None) if label else None
        classes = class_names or classes
        captions = table[caption] if caption else [None] * len(table)
        labels = table[label] if label else [None] * len(table)
        for row, (text, value) in enumerate(zip(captions, labels, strict=True)):
            name, control_name = (container.name(file, row, each) if each else None for each in (image, control))
            known = class_names and isinstance(value, int) and 0 <= value < len(class_names)
            label_name = class_names[value] if known else label_of(value)
            rows.append(Row(name, captions_of(text, name), label_name, control_name, _split_of_file(file)))
    return _classed(Listing("parquet tables with an image column", container, rows, classes))


def _classed(listing: Listing) -> Listing:
    """The listing with its classes, where its images have labels: as they are given, else sorted, numbers by their value.

    Raises:
        ValueError: some images have none.
    """
    labels = {row.label for row in listing.rows} - {None}
    if not labels:
        listing.classes = None
        return listing
    without = [row.name for row in listing.rows if row.label is None]
    if without:
        raise ValueError(
            f"{len(without):,} of {len(listing.rows):,} images in {listing.container.path} have no label: {listed(without)}"
        )
    if listing.classes is None or not labels <= set(listing.classes):
        numbers = all(re.fullmatch(r"-?\d{1,18}", label) for label in labels)
        listing.classes = sorted(labels, key=int if numbers else None)
    return listing


def _has_images(path: Path, columns: Columns) -> bool:
    """Whether a parquet file holds images, and does not name files. One that cannot be read does: opening it says why."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError):
        return True
    wanted = columns.image or next((name for name in IMAGE_COLUMNS if name in names), None)
    return wanted not in (None, *FILE_COLUMNS)


def _images(container: Container) -> list[str]:
    names = (name for name in container.stamps if PurePosixPath(name).suffix.lower() in SUFFIXES)
    return sorted(names, key=natural)


def _named(container: Container | None, suffix: str) -> list[Path]:
    """Paths of the files of a folder that end so, without metadata."""
    if not isinstance(container, Folder):
        return []
    names = sorted(container.stamps, key=natural)
    return [
        container.path / n for n in names if n.lower().endswith(suffix) and posixpath.basename(n) != "metadata.parquet"
    ]


def _caption_file(name: str, container: Container) -> str | None:
    stem = name[: -len(PurePosixPath(name).suffix)]
    return next((stem + end for end in CAPTION_FILES if stem + end in container.stamps), None)


def _arrangement(images: list[str], container: Container) -> tuple[dict[str, str], int]:
    """The splits of the images by name, where they lie in the folders train, validation and test; and how many folders lie above those of
    the classes: of the splits, and those that all share and that are no class, since there are folders below or they repeat the zip's name.
    """
    depth = 0
    while True:
        parts = {name: name.split("/")[depth:] for name in images}
        folders = {part[0] if len(part) > 1 else "" for part in parts.values()}
        lower = {folder.lower() for folder in folders}
        if "train" in lower and lower <= SPLITS.keys():
            return {name: SPLITS[part[0].lower()] for name, part in parts.items()}, depth + 1
        is_zip_name = isinstance(container, Zip) and folders == {container.path.stem}
        if len(folders) > 1 or folders == {""} or not (is_zip_name or all(len(part) > 2 for part in parts.values())):
            return {}, depth
        depth += 1


def _split_of_file(name: str) -> str:
    """The split that a shard or a parquet file belongs to, by its name, e.g. train-00000-of-00001.parquet."""
    words = (re.match(r"[a-z]*", part)[0] for part in name.lower().split("/"))
    return next((SPLITS[word] for word in words if word in SPLITS), "")
