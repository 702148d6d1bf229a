"""Batches of requests: tables (CSV or JSON lines), and X/Y/Z grids of one prompt under several settings."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from argen.command import check_model
from argen.metadata import changes, made_by, read_request, save_images
from argen.pipelines.base import TokenPipeline
from argen.registry import samplers
from argen.request import Request, name_of, parse_sampler, setting_of
from argen.words import cut, read_lines, read_text
from samplers.settings import MOST_DIGITS, settings_of
from tokenizers_img.pixels import opaque

PARTS = "control", "tokens", "sampler_args"  # settings that are not single values
SETTINGS = tuple(name for name in settings_of(Request) if name not in PARTS)
TABLES = (".csv", ".tsv", ".jsonl")
EMPTY_CELLS = {
    "nan",
    "-nan",
    "n/a",
    "#n/a",
    "na",
    "<na>",
    "none",
    "null",
}  # as pandas and spreadsheets write empty cells
IGNORED_COLUMNS = ("file",)  # columns that argen writes, which are no settings
MAX_ROWS, MAX_BYTES, MAX_CELLS = 1000, 1_000_000, 100
SEPARATORS = {"prompt": "|", "sampler": "|"}  # of the values of an axis; the default is a comma
LABEL, GAP = 22, 4  # pixels


@dataclass(frozen=True)
class Axis:
    """A setting and its values along one axis of a grid."""

    name: str
    values: tuple

    @classmethod
    def parse(cls, text: str) -> "Axis":
        """Parse e.g. "guidance_scale=1,3,5"; prompts and samplers are separated by bars: "prompt=a cat|a dog".

        Raises:
            ValueError: an unknown setting, no values, or an invalid one.
        """
        name, _, values = text.partition("=")
        name = name_of(name.strip())
        parts = [part.strip() for part in values.split(SEPARATORS.get(name, ","))]
        if not values.strip() or not all(parts):
            raise ValueError(
                f"the axis {text!r} has no values: expected SETTING=VALUE,VALUE, e.g. guidance_scale=1,3,5"
            )
        setting = setting_of(name)
        for part in parts if name == "sampler" else ():
            try:
                parse_sampler(part)
            except ValueError as error:
                if "," not in part:
                    raise
                raise ValueError(
                    f"the axis {text!r}: {error}; several samplers have | between, e.g. sampler=jacobi|zipar:window=2"
                ) from error
        return cls(name, tuple(setting.parse(part) for part in parts))


def axis_names() -> list[str]:
    """Return the names of possible axes: settings of a request, and of the samplers, e.g. "lantern.k"."""
    names = [name for name in SETTINGS if name != "num_images"]
    return names + [
        f"{sampler}.{name}"
        for sampler in samplers
        for name, setting in settings_of(samplers[sampler]).items()
        if setting.kind
    ]


def read_table(path: Path, **defaults) -> list[Request]:
    """Read the requests of a file, one per row.

    Args:
        path: ``.csv`` or ``.tsv`` with the names of settings in its first line, or ``.jsonl`` with an object per line.
        defaults: for settings that a row leaves out or empty.

    Raises:
        ValueError: an unsupported or too large file, or an invalid row: says which.
    """
    if path.suffix.lower() not in TABLES:
        raise ValueError(f"{path.name} is no table: expected a file that ends in {', '.join(TABLES)}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes: expected at most {MAX_BYTES:,}")
    data = path.read_bytes()
    lines = path.suffix.lower() == ".jsonl"
    rows = _json_rows(data, path.name) if lines else _csv_rows(read_text(data, path.name), path.name)
    requests = []
    for number, row in rows:
        try:
            requests.append(Request.from_dict(defaults | _from_object(row())))
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"line {number} of {path.name}: {' '.join(str(error).split())}") from error
        if len(requests) > MAX_ROWS:
            raise ValueError(f"{path.name} has more than {MAX_ROWS:,} rows: split it")
    if not requests:
        raise ValueError(f"{path.name} has no rows: expected one a request")
    return requests


def _json_rows(data: bytes, name: str) -> Iterator[tuple[int, Callable[[], object]]]:
    """Yield (line number, function that parses it) of every line that is not empty."""
    for number, line in read_lines(data, name):
        yield number, partial(json.loads, line, parse_int=_integer)


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits: expected at most {MOST_DIGITS}")
    return int(digits)


def _csv_rows(text: str, file: str) -> Iterator[tuple[int, Callable[[], dict]]]:
    """Yield (line number, function that parses it) of every row that is not empty."""
    first, _, body = text.partition("\n")
    if re.fullmatch(r"sep=.\s*", first):  # for Excel
        text = body
    first_lines = text.lstrip("\r\n").splitlines()[:1]
    number = 1
    try:
        delimiter = next(
            (
                delimiter
                for delimiter in ",;\t"
                if "prompt" in _names(next(csv.reader(first_lines, delimiter=delimiter), []))
            ),
            None,
        )
        if delimiter is None:
            raise ValueError(
                f"{file}: the first line of the table names no column prompt: expected names of settings there"
            )
        table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        names: list[str] = []
        for row in table:
            if names and any(map(str.strip, row)):
                yield table.line_num, partial(_from_row, names, row)
            elif any(map(str.strip, row)):
                names = _names(row)
            number = table.line_num + 1
    except csv.Error as error:
        reason = "a quote that it opens is never closed" if "unexpected end" in str(error) else str(error)
        raise ValueError(f"line {number} of {file} is no row of a table ({reason}): save it as CSV again") from None


def _names(row: list[str]) -> list[str]:
    """Normalise the names of the columns; the column of row numbers that pandas writes gets none."""
    names = [name.strip().lower() for name in row]
    return ["" if re.fullmatch(r"unnamed: \d+(_level_\d+)?", name) else name for name in names]


def _from_row(names: list[str], row: list[str]) -> dict:
    """Parse the settings of a row; empty cells and columns without a name are skipped."""
    if any(map(str.strip, row[len(names) :])):
        raise ValueError("it has more values than the first line has names")
    if duplicates := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"the first line names the column {cut(duplicates[0])} twice: expected each once")
    pairs = zip(names, row, strict=False)
    cells = {name: cell for name, cell in pairs if name and cell.strip() and cell.strip().lower() not in EMPTY_CELLS}
    return {name: cell if name in IGNORED_COLUMNS else setting_of(name).parse(cell) for name, cell in cells.items()}


def _from_object(row: object) -> dict:
    if not isinstance(row, dict):
        raise ValueError("expected an object with names of settings")
    row = {name: value for name, value in row.items() if value is not None and name not in IGNORED_COLUMNS}
    if arguments := [name for name in row if name == "sampler_args" and not isinstance(row[name], dict)]:
        raise ValueError(
            f"{arguments[0]} is {cut(row['sampler_args'])}: expected an object with settings of the sampler"
        )
    settings = {
        name: value if name == "sampler_args" else setting_of(name).lenient(value) for name, value in row.items()
    }
    dotted = {name: settings.pop(name) for name in list(settings) if "." in name}
    for name, value in dotted.items():
        sampler, _, argument = name.partition(".")
        settings = {"sampler": sampler} | settings
        settings["sampler_args"] = settings.get("sampler_args", {}) | {argument: value}
    return settings


def check_generator(name: str) -> None:
    """Raises:
    ValueError: see `argen.command.check_model`.
    """
    check_model(name, "generator")


def check_requests(
    requests: Sequence[Request],
    models: Callable[[str], TokenPipeline],
    what: str = "row",
    check_name: Callable[[str], None] = check_generator,
) -> None:
    """Check that the models can run all requests, before the first one runs.

    Args:
        check_name: of a model, before any is loaded.

    Raises:
        ValueError: an unknown model, or a setting that does not fit it; says which request.
    """
    for check in (
        lambda request: check_name(request.model),
        lambda request: models(request.model).check(request),
    ):
        for number, request in enumerate(requests, 1):
            try:
                check(request)
            except ValueError as error:
                raise ValueError(f"{what} {number}: {error}") from error


def draw_table(
    requests: Sequence[Request], folder: Path, models: Callable[[str], TokenPipeline]
) -> Iterator[list[tuple[Path, Request]]]:
    """Generate the images that are missing; yields for each request its files, with the request that reproduces each.

    Raises:
        ValueError: a file of the folder was made from another table, or by other weights or in another precision; says which, before
            anything is generated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files_of = {
        row: [folder / f"{row:05d}-{number}.png" for number in range(1, request.num_images + 1)]
        for row, request in enumerate(requests, 1)
    }
    makers = cache(lambda name: {key: text for key, text in made_by(models(name)).items() if key != "argen"})
    saved = {}
    for row, request in enumerate(requests, 1):
        if all(file.exists() for file in files_of[row]):
            saved[row] = _read_row(row, request, files_of[row], makers(request.model))
    missing = [request for row, request in enumerate(requests, 1) if row not in saved]
    for name in dict.fromkeys(request.model for request in missing):
        models(name).encode_ahead([request.prompt for request in missing if request.model == name])
    for row, request in enumerate(requests, 1):
        files = files_of[row]
        requests_of_files = saved.get(row)
        if requests_of_files is None:
            *_, job = models(request.model).run(request)
            save_images(list(zip(job.images, job.requests, strict=True)), files)
            requests_of_files = job.requests
        yield list(zip(files, requests_of_files, strict=True))


def _read_row(row: int, request: Request, files: list[Path], maker: dict[str, str]) -> list[Request]:
    """The requests in the files of a row that were made before.

    Args:
        maker: what makes them now, from `made_by`.

    Raises:
        ValueError: they were made by another request, or not as now.
    """
    saved = [read_request(file) for file in files]
    if request.num_candidates is None and not _matches_request(saved[0], request):
        raise ValueError(f"{files[0]} was made with other settings than row {row} has: choose another --out")
    for file in files:
        if others := changes(file, maker):
            raise ValueError(
                f"{file} was made by {' and '.join(others)}: choose another --out, or load the model as then"
            )
    return saved


def _matches_request(saved: Request, request: Request) -> bool:
    """Whether the first image of a request has these settings; its sampler may have been chosen by the model."""
    settings = request.for_image(0).explicit_settings()
    return all(saved.explicit_settings().get(name) == value for name, value in settings.items() if name != "sampler")


def expand_axes(base: Request, axes: Sequence[Axis]) -> list[Request]:
    """Return a request for one image for every combination of the axes' values; the first axis changes fastest.

    Raises:
        ValueError: no axis, two of the same setting, or too many images.
    """
    names = [axis.name for axis in axes]
    if not axes or len(set(names)) < len(names):
        raise ValueError(f"the axes are {', '.join(names) or 'none'}: expected one to three different settings")
    of_samplers = {name.partition(".")[0]: name for name in names if "." in name or name == "sampler"}
    if len(of_samplers) > 1:
        raise ValueError(
            f"axes of two samplers: {' and '.join(of_samplers.values())}, but an image is drawn by one: expected settings of one of them"
        )
    if "num_images" in names:
        raise ValueError("num_images cannot be an axis: every combination has one image")
    combinations = list(product(*(axis.values for axis in reversed(axes))))
    if len(combinations) > MAX_CELLS:
        raise ValueError(f"the grid has {len(combinations):,} images: expected at most {MAX_CELLS}")
    single = replace(base, num_images=1)
    return [
        reduce(lambda request, setting: request.with_setting(*setting), zip(names, values[::-1], strict=True), single)
        for values in combinations
    ]


def grid_image(images: Sequence[Image.Image], axes: Sequence[Axis]) -> Image.Image:
    """Arrange the images of `expand_axes` in a labelled grid: columns, rows, and one table per value of a third axis."""
    x_axis, y_axis, z_axis = (*axes, *[Axis("", ("",))] * (3 - len(axes)))
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    font = ImageFont.load_default(size=13)
    side = max([0, *(round(font.getlength(_label(y_axis, value))) for value in y_axis.values)]) + 2 * GAP
    width = max(width, *(round(font.getlength(_label(x_axis, value))) for value in x_axis.values)) + GAP
    table = LABEL * (1 + bool(z_axis.name)) + len(y_axis.values) * (height + GAP)
    page = Image.new("RGB", (side + len(x_axis.values) * width, len(z_axis.values) * table), "white")
    pen = ImageDraw.Draw(page)
    for number, value_z in enumerate(z_axis.values):
        top = number * table
        if z_axis.name:
            pen.text((GAP, top + GAP), _label(z_axis, value_z), fill="black", font=font)
            top += LABEL
        for column, value in enumerate(x_axis.values):
            pen.text((side + column * width, top + GAP), _label(x_axis, value), fill="black", font=font)
        for row, value in enumerate(y_axis.values):
            y = top + LABEL + row * (height + GAP)
            pen.text((GAP, y + height // 2), _label(y_axis, value), fill="black", font=font)
            for column in range(len(x_axis.values)):
                index = (number * len(y_axis.values) + row) * len(x_axis.values) + column
                page.paste(opaque(images[index]), (side + column * width, y))
    return page


def _label(axis: Axis, value) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if axis.name in ("", "prompt") else f"{axis.name} {text}"


def settings_csv(requests: Sequence[Request], files: Sequence[str]) -> str:
    """Format a CSV with the settings of each file."""
    rows = [request.explicit_settings() | {"sampler": request.sampler_text} for request in requests]
    names = [name for name in SETTINGS if any(name in row for row in rows)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", *names])
    for row, file in zip(rows, files, strict=True):
        table.writerow([file, *(row.get(name, "") for name in names)])
    return text.getvalue()
