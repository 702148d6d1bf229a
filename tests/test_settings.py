"""Settings: declared once, and reached from Python, the command line, tables, axes, files and both APIs."""

import json
from dataclasses import replace
from typing import Literal

import pytest

from argen.cli.main import main, parser
from argen.jobs.tables import Axis, expand_axes, read_table, settings_csv
from argen.registry import samplers
from argen.request import Request, parse_sampler, setting_of
from samplers.errors import InvalidValue
from samplers.lantern import Lantern
from samplers.settings import Field, make, settings, settings_of


@settings
class Toy:
    """A toy."""

    count: int = Field(3, ge=1, le=9, description="how many")
    share: float | None = Field(None, gt=0, le=1, description="of all")
    kind: Literal["red", "blue"] = "red"
    lambda_: bool = False
    name = "toy"


def test_a_setting_is_described_by_its_field():
    known = settings_of(Toy)
    assert list(known) == ["count", "share", "kind", "lambda"]
    assert (known["count"].low, known["count"].high, known["count"].default) == (1, 9, 3)
    assert known["count"].expected == "a whole number, 1 to 9"
    assert known["share"].expected == "a number, more than 0 to 1"
    assert known["kind"].expected == "one of red, blue"
    assert known["lambda"].field == "lambda_"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ({"count": 10}, "count is 10: expected a whole number, 1 to 9", "integer_above_max_value"),
        ({"count": 4.0}, "count is 4.0: expected a whole number", "invalid_type"),
        ({"count": True}, "count is True: expected a whole number", "invalid_type"),
        ({"count": 10**5000}, "count is a very long number: expected", "integer_above_max_value"),
        ({"share": 0}, "share is 0: expected a number, more than 0 to 1", "decimal_below_min_value"),
        ({"share": float("nan")}, "share is nan: expected a number", "invalid_type"),
        ({"kind": "green"}, "kind is 'green': expected one of red, blue", "invalid_value"),
        ({"lambda": "yes"}, "lambda is 'yes': expected true or false", "invalid_type"),
    ],
)
def test_a_wrong_value_is_one_line(arguments, message, code):
    with pytest.raises(InvalidValue) as error:
        make(Toy, arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert (error.value.param, error.value.code) == (next(iter(arguments)), code)


def test_an_unknown_setting_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown setting 'colour' of toy: expected count, share, kind, lambda"):
        make(Toy, {"colour": 1})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("num_images", "4.0", 4),
        ("temperature", "0,5", 0.5),
        ("steps", "50,15", (50, 15)),
        ("steps", "40", 40),
        ("top_k", "none", None),
        ("lantern.k", "7", 7),
        ("lantern.official", "yes", True),
        ("lantern_delta", "0.3", 0.3),  # as release 0.1 called it
    ],
)
def test_what_is_typed_is_read(name, text, value):
    assert setting_of(name).parse(text) == value


def test_every_setting_of_every_sampler_is_reached(tmp_path):
    for name in samplers:
        for setting in settings_of(samplers[name]).values():
            if setting.kind in (int, float):
                value = setting.default if setting.default is not None else setting.low
                typed = f"{name}:{setting.name}={value}"
                request = Request("a", sampler=typed)
                assert request.sampler_args == {setting.name: value}
                assert parse_sampler(request.sampler_text) == (name, {setting.name: value})
                assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request
                (axis,) = [Axis.parse(f"{name}.{setting.name}={value}")]
                assert expand_axes(Request("a"), [axis]) == [request]
                table = tmp_path / "t.csv"
                table.write_text(f'prompt,sampler\na,"{typed}"\n')
                assert read_table(table) == [request]
                table.write_text(settings_csv([request], ["x.png"]))
                assert read_table(table) == [request]
                arguments = parser(["generate"]).parse_args(["generate", "a", "-o", "x.png", "--sampler", typed])
                assert Request("a", sampler=arguments.sampler) == request


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("magic", "unknown sampler 'magic'"),
        ("lanter:k=3", "did you mean lantern"),
        ("lantern:k", "the sampler lantern has no setting 'k': expected SETTING=VALUE of k, delta"),
        ("lantern:k=x", "k is 'x': expected a whole number"),
        ("lantern:k=-1", "k is -1: expected a whole number, 0 to 65,536"),
        ("jacobi:k=3", "the sampler jacobi has no setting 'k=3': expected SETTING=VALUE of window"),
        ("auto:k=3", "none: it has no settings"),
    ],
)
def test_a_wrong_sampler_is_one_line(capsys, tmp_path, typed, message):
    assert main(["generate", "a", "-o", str(tmp_path / "x.png"), "--sampler", typed]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


def test_settings_of_release_0_1_are_read():
    old = {"prompt": "a", "sampler": "lantern", "lantern_k": 5, "lantern_delta": 0.1}
    assert Request.from_dict(old) == Request("a", sampler="lantern", sampler_args={"k": 5, "delta": 0.1})
    assert Request.from_dict({"prompt": "a", "sampler": "plain"}).sampler == "sequential"
    assert Request.from_dict({"prompt": "a", "sampler": "fast_preview"}).sampler == "zipar"


def test_another_sampler_has_no_arguments_of_the_first():
    request = Request("a", sampler="lantern:k=5")
    assert request.with_setting("sampler", "jacobi") == Request("a", sampler="jacobi")
    assert request.with_setting("lantern.delta", 0.3).sampler_args == {"k": 5, "delta": 0.3}
    assert request.with_setting("seed", 4) == replace(request, seed=4)


def test_the_defaults_of_lantern():
    assert (Lantern().delta, Lantern(lambda_=2.0).delta) == (0.2, None)


def test_samplers_are_listed(capsys):
    assert main(["samplers", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(samplers)
    assert rows["jacobi"]["settings"]["window"]["default"] == 16
    assert main(["samplers"]) == 0
    assert (
        "tokens that are guessed ahead: more save more passes, and make each pass slower: a whole number, 1 to 16,384 (default: 16)"
        in capsys.readouterr().out
    )
