"""A package that cannot be used takes nothing down: lists leave out what it brings, with one warning; by its name it is one line."""

import logging
import sys
from pathlib import Path

import gradio as gr
import pytest

import argen
from argen.cli.main import main
from argen.hub import cards as card_files
from argen.hub.cards import CARD_FILE, Card, all_cards, kind_of
from argen.hub.loading import load
from argen.jobs.queue import Studio
from argen.registry import REGISTRIES, register, samplers
from argen.request import Request
from argen.ui.build import build
from argen.ui.context import AppContext

SAMPLER = """
from samplers.settings import Field, settings
from samplers.steps import Sequential

@settings
class S(Sequential):
    "Mine."
    k: int = Field(default=%s, ge=1, le=3, description="a number")
    name = "s"
"""
COMMAND = "HELP = %s\ndef add_arguments(parser): %s\ndef run(args): print('ran')\n"


@pytest.fixture
def install(tmp_path, monkeypatch, caplog):
    """A function that puts packages on `sys.path`: their entry points, and their files by name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = set(sys.modules)

    def put(package: str, group: str, points: str, **files: str | bytes) -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[argen.{group}]\n{points}\n")
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__", 1))
            path = path if path.suffix else path.with_suffix(".py")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        forget()

    def forget() -> None:
        for registry in REGISTRIES.values():
            registry.__dict__.pop("installed", None)
        card_files._package_cards.cache_clear()

    yield put
    monkeypatch.undo()
    forget()
    for name in set(sys.modules) - names:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('boo')", "RuntimeError: boo"),
        ("def (:", "SyntaxError"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ("x = 1", "no attribute 'S'"),
        ("S = 5", "no class with a __call__"),
        ("def S(): pass", "no class with a __call__"),
        ("class S: pass", "no class with a __call__"),
        (SAMPLER % "'many'", "k is 'many': expected a whole number, 1 to 3"),
        (SAMPLER % "9", "k is 9"),
    ],
)
def test_a_broken_sampler_is_left_out_with_one_warning(install, caplog, capsys, source, reason):
    install("bad-package", "samplers", "bad = bad_module:S", bad_module=source)
    with caplog.at_level(logging.WARNING):
        assert "bad" not in list(samplers)
        assert main(["samplers"]) == 0
        assert "bad" not in [name for name, _ in samplers.items()]
    warnings = [record.getMessage() for record in caplog.records if "bad-package" in record.getMessage()]
    assert len(warnings) == 1
    assert reason in warnings[0]
    with pytest.raises(ValueError, match="the sampler bad of the package bad-package cannot be used") as error:
        Request("a", sampler="bad:k=2")
    assert "\n" not in str(error.value)
    assert Request("a").sampler == "auto"


def test_a_good_sampler_is_listed_beside_a_broken_one(install):
    install("good", "samplers", "good = good_module:S", good_module=SAMPLER % "2")
    install("bad", "samplers", "bad = bad_module:S", bad_module="1 / 0")
    assert "good" in list(samplers)
    assert "bad" not in list(samplers)
    assert Request("a", sampler="good:k=3").sampler_args == {"k": 3}


def test_names_that_are_taken_or_cannot_be_typed_are_left_out(install, caplog):
    install("first", "samplers", "twin = twin_a:S", twin_a=SAMPLER % "1")
    install("second", "samplers", "twin = twin_b:S\nsequential = twin_b:S\na,b:c = twin_b:S", twin_b=SAMPLER % "2")
    with caplog.at_level(logging.WARNING):
        assert samplers["twin"]().k == 1
    assert len(caplog.records) == 3
    assert all("of the package second is left out" in record.getMessage() for record in caplog.records)
    assert samplers["sequential"].__module__ == "samplers.steps"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('boo')", "RuntimeError: boo"),
        (COMMAND % ("5", "pass"), "lacks HELP"),
        (COMMAND % ("'x'", "raise RuntimeError('args')"), "RuntimeError: args"),
    ],
)
@pytest.mark.parametrize("group", ["command", "measure"])
def test_a_broken_command_or_measure_is_left_out(install, capsys, caplog, group, source, reason):
    install("bad-package", f"{group}s", "badone = bad_module", bad_module=source)
    for argv in (["--help"], ["eval", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        assert "badone" not in capsys.readouterr().out
    assert reason in caplog.text
    if group == "command":
        assert main(["badone"]) == 2
        assert "the command badone of the package bad-package cannot be used" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", "--help"])


def test_a_percent_sign_in_a_help_is_printed(install, capsys):
    install("fine", "commands", "fine = fine_module", fine_module=COMMAND % ("'100% fine'", "pass"))
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "100% fine" in capsys.readouterr().out
    assert main(["fine"]) == 0
    assert capsys.readouterr().out == "ran\n"


def test_broken_recipes_and_pipelines_are_left_out(install, capsys, caplog):
    install("bad", "recipes", "badone = bad_module:R", bad_module="R = 7")
    install("worse", "pipelines", "BadPipeline = worse_module:P", worse_module="raise RuntimeError('boo')")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "badone" not in capsys.readouterr().out
    assert "expected an argen.train.loop.Recipe" in caplog.text
    assert "BadPipeline" not in list(REGISTRIES["pipeline"])


def test_the_page_stands_without_broken_tabs(install, caplog, tmp_path):
    tab = "TITLE = '%s'\ndef layout(context, tab): %s\n"
    install("one", "tabs", "raises = tab_a", tab_a=tab % ("Raises", "raise RuntimeError('boo')"))
    install("two", "tabs", "unimportable = tab_b", tab_b="raise RuntimeError('boo')")
    install("three", "tabs", "fine = tab_c", tab_c=tab % ("Fine", "pass"))
    studio = Studio(tmp_path / "studio", argen.load)
    try:
        blocks = build(AppContext(studio)).blocks.values()
    finally:
        studio.close()
    visible = {block.label: block.visible for block in blocks if isinstance(block, gr.Tab)}
    assert (visible["Raises"], visible["Fine"], visible["Generate"]) == (False, True, True)
    assert "unimportable" not in visible
    assert "the tab raises (tab_a) is left out (RuntimeError: boo)" in caplog.text


GOOD = 'id = "mine/judge"\nkind = "judge"\nabout = "x"\ntarget = "nowhere:read"\n'


@pytest.mark.parametrize(
    "text",
    [
        "id = [broken",
        b"id = '\xff'",
        GOOD.replace('"judge"', '"banana"'),
        GOOD.replace('"mine/judge"', "5"),
        GOOD + 'order = "first"\n',
        GOOD + "about2 = 1\n",
        GOOD.replace('"x"', '"\\u001b[31mred"'),
        GOOD.replace("mine/judge", "<script>alert(1)</script>"),
        GOOD.replace("mine/judge", "argen/emoji-parti"),
        "a = " + "[" * 3000 + "]" * 3000,
    ],
)
def test_one_broken_card_leaves_the_others_of_its_package(install, caplog, capsys, text):
    install(
        "mine",
        "cards",
        "mine = mine_cards",
        mine_cards____init__="",
        **{"mine_cards__a.toml": GOOD.replace("judge", "other", 1)},
    )
    (Path(sys.path[0]) / "mine_cards/b.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    by_id = all_cards()
    assert "mine/other" in by_id
    assert by_id["argen/emoji-parti"].target.startswith("argen.")
    assert "mine/judge" not in by_id
    assert caplog.text.count("a card of the package mine_cards is left out") == 1
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "mine/other" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(("points", "source"), [("x = card_module", "x = 1"), ("x = card_module:X", "X = 5")])
def test_entry_points_of_cards_that_are_none_are_left_out(install, caplog, points, source):
    install("mine", "cards", points, card_module=source)
    assert "argen/emoji-parti" in all_cards()
    assert "the card x of the package mine cannot be used" in caplog.text


def test_a_reader_of_a_package_that_is_missing_is_one_line(install):
    install("mine", "cards", "mine = mine_cards", mine_cards____init__="", **{"mine_cards__a.toml": GOOD})
    with pytest.raises(ValueError, match="the card mine/judge cannot be loaded by 'nowhere:read'.*No module named"):
        load("mine/judge")


class Empty:
    """No component of any kind."""


@pytest.mark.parametrize(
    ("kind", "name", "component"),
    [
        ("sampler", "new", None),
        ("sampler", "new", Empty),
        ("sampler", "new", "nothere:x"),
        ("sampler", "a:b", samplers["sequential"]),
        ("sampler", "a,b", samplers["sequential"]),
        ("card", "new/card", 7),
        ([], "new", samplers["sequential"]),
        ("tab", "new", Empty),
        ("pipeline", "new", 3),
    ],
)
def test_what_cannot_be_used_is_not_registered(kind, name, component):
    with pytest.raises(ValueError, match="cannot be used|cannot be typed|unknown kind"):
        register(kind, name, component)
    assert all(name not in registry for registry in REGISTRIES.values())


CARD = 'id = "a"\nkind = "%s"\nabout = "x"\ntarget = "%s"\n'


@pytest.mark.parametrize(
    "text",
    [
        CARD % ("generator", "subprocess:call"),
        CARD % ("generator", "shutil:rmtree"),
        CARD % ("judge", "runpy:run_path"),
        CARD % ("judge", "argen.models.files:read_network") + '[arguments]\nnetwork = "os"\n',
        CARD % ("judge", "argen.models.files:read_network") + '[arguments]\nnetwork = "subprocess:Popen"\n',
        CARD % ("diffusion", "argen.models.emoji_diffusion:read_sd") + '[tools.erase]\nvocabulary = "os:environ"\n',
    ],
)
def test_a_folder_imports_only_what_known_cards_name(tmp_path, monkeypatch, text):
    (tmp_path / CARD_FILE).write_text(text)
    monkeypatch.setattr("argen.hub.loading.resolve", lambda target: pytest.fail(f"imported {target}"))
    for read in (load, kind_of):
        with pytest.raises(ValueError, match="which no card of argen or of an installed package names"):
            read(str(tmp_path))


def test_arguments_of_a_folders_card_are_checked_first(tmp_path):
    (tmp_path / CARD_FILE).write_text(
        CARD % ("generator", "argen.pipelines.parti:read_emoji") + "[arguments]\nfoo = 1\n"
    )
    with pytest.raises(ValueError, match="cannot be loaded by .* with its arguments .*foo"):
        load(str(tmp_path))
    (tmp_path / CARD_FILE).write_text(CARD % ("generator", "argen.hub.loading:load"))
    with pytest.raises(ValueError, match="no model_index.json beside it"):
        load(str(tmp_path))


def test_a_card_holds_no_escapes():
    with pytest.raises(ValueError, match="expected text in one line"):
        Card("a", "judge", "\x1b[2J", "x:y")
