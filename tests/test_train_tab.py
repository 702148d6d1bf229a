"""Trainings beside the page: what stands behind the tab *Train*, and the tab in Chromium."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import psutil
import pytest
from PIL import Image
from test_server import Served
from test_ui import PATIENCE, chromium, page, site  # noqa: F401, fixtures
from test_ui import pytestmark as marks

from argen.hub.cards import ADAPTED, Card, ids, write_card
from argen.hub.loading import load
from argen.hub.model_cache import ModelCache
from argen.jobs import trainings as background
from argen.jobs.access import ModelAccess
from argen.jobs.queue import Forbidden, Studio
from argen.jobs.trainings import FAILED, FINISHED, MINI, RUNNING, STOPPED, Plan, Trainings, attach, time_left
from argen.train.containers import Zip
from argen.ui.build import build
from argen.ui.context import AppContext
from argen.ui.tabs.train import Train, describe, named

MODEL = "argen/emoji-llamagen"
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220)}


def browser(test):
    for mark in marks:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Ten squares with captions."""
    folder = tmp_path_factory.mktemp("squares")
    for number in range(5):
        for colour, value in COLOURS.items():
            pixels = np.full((64, 64, 3), 255, np.uint8)
            pixels[8 + number : 40 + number, 16:48] = value
            Image.fromarray(pixels).save(folder / f"{colour}{number}.png")
            (folder / f"{colour}{number}.txt").write_text(f"a {colour} square")
    return folder


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory) -> Path:
    """The same in a .zip."""
    path = tmp_path_factory.mktemp("packed") / "squares.zip"
    with zipfile.ZipFile(path, "w") as file:
        for each in sorted(images.iterdir()):
            file.write(each, each.name)
    return path


@pytest.fixture
def trainings(tmp_path):
    """None yet; what still runs at the end of a test is ended."""
    models = ModelCache("cpu", load)
    trainings = Trainings(ModelAccess(models, [], tmp_path / "trainings"))
    yield trainings
    if trainings.current is not None:
        trainings.current[1].kill()
        trainings.current[1].wait()


def plan(folder: Path, **changes) -> Plan:
    return Plan(**{"recipe": "llamagen", "images": str(folder), "init": MODEL, "steps": 2, "lora": 4} | changes)


def wait_for(trainings: Trainings, name: str, reached) -> background.State:
    """The first state for which `reached` is true."""
    for _ in range(600):
        state = trainings.state(name)
        if reached(state):
            return state
        assert state.status != FAILED, state.error
        time.sleep(0.2)
    raise AssertionError((trainings.folder / name / "output.log").read_text())


def test_a_lora_is_trained_watched_and_loaded(trainings, packed):
    trainings.start("icons", plan(packed), upload=packed)
    assert trainings.state("icons").status == RUNNING
    with pytest.raises(ValueError, match="the training icons runs, and one runs at a time"):
        trainings.start("others", plan(packed))
    assert not (trainings.folder / "others").exists()
    with pytest.raises(ValueError, match="the training icons runs: stop it first"):
        trainings.delete("icons", "icons")
    state = wait_for(trainings, "icons", lambda state: state.status == FINISHED)
    assert (state.step, state.log[-1]["held-out loss"] > 0, state.sample.name) == (2, True, "sample-000002.png")
    assert "images: 9" in (trainings.folder / "icons" / "output.log").read_text()
    assert describe(state).startswith("finished: 2 steps · loss ")
    assert trainings.models("trainings/icons").card.about == f"a LoRA of {MODEL}"
    with pytest.raises(ValueError, match="only one that was stopped can be resumed"):
        trainings.resume("icons")
    with pytest.raises(ValueError, match="there is a training icons: choose another name"):
        trainings.start("icons", plan(packed))
    with pytest.raises(ValueError, match="type icons to delete this training"):
        trainings.delete("icons", "ico")
    trainings.delete("icons", "icons")
    assert (trainings.names(), list(trainings.folder.iterdir()), trainings.models.load.loaded) == ([], [], {})


def test_a_training_is_stopped_and_resumed_by_another_page(trainings, images):
    trainings.start("icons", plan(images, steps=24))
    with pytest.raises(ValueError, match="the training icons is running"):
        trainings.resume("icons")
    wait_for(trainings, "icons", lambda state: state.kept == 10)
    trainings.stop("icons")
    state = wait_for(trainings, "icons", lambda state: state.status == STOPPED)
    assert state.kept in (10, 20)
    assert describe(state) == f"stopped: step {state.kept} of 24 is kept, and *Resume* goes on from there"
    with pytest.raises(ValueError, match="does not run: there is nothing to stop"):
        trainings.stop("icons")
    again = Trainings(trainings.models)
    assert (again.names(), again.state("icons")) == (["icons"], state)
    again.resume("icons")
    state = wait_for(again, "icons", lambda state: state.status == FINISHED)
    steps = [entry["step"] for entry in state.log]
    assert steps == [10, 20, 24]
    assert "  0%" not in (trainings.folder / "icons" / "output.log").read_text()


def test_a_page_that_is_killed_leaves_no_process_and_a_training_to_resume(trainings, images):
    script = f"""
        import sys, time
        from pathlib import Path
        from argen.jobs.access import ModelAccess
        from argen.jobs.trainings import Plan, Trainings
        trainings = Trainings(ModelAccess(None, [], Path({str(trainings.folder)!r})))
        trainings.start("icons", Plan("llamagen", {str(images)!r}, {MODEL!r}, 5000, 4))
        print(trainings.current[1].pid, flush=True)
        time.sleep(600)
    """
    server = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    child = int(server.stdout.readline())
    wait_for(trainings, "icons", lambda state: state.kept is not None or state.step)
    with pytest.raises(ValueError, match="the training icons runs"):
        trainings.start("others", plan(images))
    server.kill()
    server.wait()
    server.stdout.close()
    state = wait_for(trainings, "icons", lambda state: state.status == STOPPED)
    for _ in range(100):
        if (
            not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
        ):  # nobody asked for it
            break
        time.sleep(0.2)
    else:
        raise AssertionError("the process goes on without its page")
    assert state.plan.steps == 5000
    assert "argen train: stopped" in (trainings.folder / "icons" / "output.log").read_text()


def test_a_failure_is_one_line(trainings, images):
    trainings.start("icons", plan(images, init=MINI, lora=None, recipe="flexar"))
    trainings.current[1].send_signal(signal.SIGKILL)
    trainings.current[1].wait()
    assert trainings.state("icons").error.startswith("the system has ended it")
    output = trainings.folder / "icons" / "output.log"
    trainings.current = None
    output.write_text("images: 10\n 10%|\r 20%|\nargen train: error: /a/b/c.png is broken\n")
    state = trainings.state("icons")
    assert (state.status, state.error) == (FAILED, "/a/b/c.png is broken")
    assert describe(state).startswith("**Failed:** c.png is broken\n\nnothing is kept yet")
    output.write_text("Traceback (most recent call last):\n  File ...\nRuntimeError: boo\n")
    assert trainings.state("icons").error == "RuntimeError: boo"
    output.write_text("icons:  20%|")  # the machine was switched off
    assert trainings.state("icons").status == STOPPED


BAD = [
    ("", {}, "the training has no name: type one"),
    ("a/b", {}, "the name is 'a/b': expected at most 60 letters"),
    ("..", {}, r"the name is '\.\.'"),
    ("ok", {"steps": 0}, "steps is 0: expected a whole number from 1"),
    ("ok", {"steps": None}, "steps is None: expected a whole number from 1"),
    ("ok", {"lora": None}, "lora is missing: expected a rank"),
    ("ok", {"lora": 300}, "lora is 300: expected"),
    ("ok", {"learning_rate": -1.0}, r"learning_rate is -1\.0: expected"),
    ("ok", {"recipe": "drafter"}, "recipe is drafter: expected one of llamagen"),
    ("ok", {"recipe": "seed-lm", "init": MINI, "lora": None}, "seed-lm trains no new small network: choose a model"),
    ("ok", {"init": "/etc"}, "there is no model '/etc'"),
    ("ok", {"images": "/nowhere"}, "no images at /nowhere"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD)
def test_what_cannot_be_trained_leaves_nothing(trainings, images, name, changes, message):
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=message):
        trainings.start(name, plan(images, **changes))
    assert trainings.names() == []
    assert not list(trainings.folder.glob("*"))


def test_images_that_cannot_be_used_are_refused(images, tmp_path):
    def zipped(name: str, files: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as file:
            for inside, data in files.items():
                file.writestr(inside, data)
        return tmp_path / name

    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 no more")
    one = (images / "red0.png").read_bytes()
    cases = {
        "cannot be read as a .zip": tmp_path / "broken.zip",
        "no images in .*none.zip": zipped("none.zip", {"a.md": b"words"}),
        "holds one image that can be used: expected at least 2": zipped("one.zip", {"a.png": one, "a.txt": b"a"}),
        "have neither classes nor captions": zipped("bare.zip", {"a.png": one, "b.png": one}),
    }
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message):
            background.look(path)
    (tmp_path / "by-class").mkdir()
    for colour in COLOURS:
        (tmp_path / "by-class" / colour).mkdir()
        for number in range(2):
            image = (images / f"{colour}{number}.png").read_bytes()
            (tmp_path / "by-class" / colour / f"{number}.png").write_bytes(image)
    source = background.look(tmp_path / "by-class")
    for refused in (plan(tmp_path), plan(tmp_path, init=MINI, recipe="parti")):
        with pytest.raises(ValueError, match="the images have classes, and .* reads captions"):
            background.check_fits(refused, source)
    background.check_fits(plan(tmp_path, init=MINI), source)
    with pytest.raises(ValueError, match="^lora is for models of captions, and this one draws classes: leave it out$"):
        background.check_fits(plan(tmp_path, init="trainings/mine"), source, by_class=True)
    captions = background.look(images)
    with pytest.raises(ValueError, match="mine draws classes, and the images have captions: choose another model"):
        background.check_fits(plan(tmp_path, init="trainings/mine"), captions, by_class=True)


def made(folder: Path, name: str, *, index: dict | None = None, **changes) -> None:
    """A training that is finished: the card of what it made, and the index of a pipeline where it is one."""
    final = folder / name / "final"
    final.mkdir(parents=True)
    card = Card(name, "generator", "made here", ADAPTED if index is None else "argen.hub.loading:load")
    write_card(replace(card, **changes), final)
    if index is not None:
        (final / "model_index.json").write_text(json.dumps(index))


def test_every_front_end_lists_what_was_trained(tmp_path, pipe):
    studio = Studio(tmp_path, lambda name: pipe)
    folder = studio.store.trainings
    assert studio.models.generators() == ids("generator")
    made(folder, "a-lora", grid=True)
    made(folder, "by-class", grid=True, index={"_class_name": "LlamaGenPipeline", "text_encoder": [None, None]})
    made(folder, "ordered", index={"_class_name": "FlexARPipeline", "text_encoder": ["transformers", "CLIPModel"]})
    made(folder, "a-vq", kind="tokenizer")
    (folder / "broken" / "final").mkdir(parents=True)
    (folder / "broken" / "final" / "argen.toml").write_text("id =")
    fits = lambda **which: {  # noqa: E731
        name.removeprefix("trainings/") for name in studio.models.generators(**which) if name.startswith("trainings/")
    }
    assert fits() == fits(control=False) == {"a-lora", "by-class", "ordered"}
    assert fits(grid=True) == {"a-lora", "by-class"}
    assert fits(text=True) == {"a-lora", "ordered"}
    assert fits(control=True) == set()
    assert not studio.models.draws_classes("trainings/a-lora")
    assert studio.models.draws_classes("trainings/by-class")
    blocks = build(AppContext(studio))
    fields = {"model", "edit-model", "grid-model", "batch-model", "eval-model", "gallery-model"}
    choices = {
        block.elem_id: {name for _, name in block.choices}
        for block in blocks.blocks.values()
        if block.elem_id in fields
    }
    shown = {field: {name for name in names if name.startswith("trainings/")} for field, names in choices.items()}
    everything = {"trainings/a-lora", "trainings/by-class", "trainings/ordered"}
    assert shown == dict.fromkeys(fields, everything) | {
        "edit-model": {"trainings/a-lora", "trainings/by-class"},
        "eval-model": {"trainings/a-lora", "trainings/ordered"},
    }
    served = Served(studio, page=blocks)
    try:
        listed = {model["id"] for model in served.ask("/v1/models")[1]["data"]}
        assert listed == {*ids("generator"), *everything}
        assert {model["model_name"] for model in served.ask("/sdapi/v1/sd-models")[1]} == listed
    finally:
        served.close()


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("argen.train.containers.MOST_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "large.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", bytes(1001))
        file.writestr("b.png", bytes(1000))
    container = Zip(tmp_path / "large.zip")
    assert container.read("b.png") == bytes(1000)
    with pytest.raises(ValueError, match=r"a\.png in .* unpacks to more than"):
        container.read("a.png")
    monkeypatch.setattr("argen.train.containers.BOMB", (1500, 2))
    with pytest.raises(ValueError, match="more than 2 times its size: expected a .zip of images"):
        Zip(tmp_path / "large.zip")


def test_peft_is_missed_in_a_line():
    with pytest.raises(ValueError, match=r"^peft is not installed: pip install 'argen\[train\]'$"):
        background.check_peft(lambda name: None)


def test_a_process_without_a_page_is_left_alone(tmp_path):
    assert attach(tmp_path / "run", {}) is None
    assert not (tmp_path / "run").exists()


def test_models_to_start_from(tmp_path):
    for name, kind in {
        "a/b": "LlamaGenPipeline",
        "c": "ParryPipeline",
        "trainings/mine/final": "LlamaGenPipeline",
    }.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    trainings = Trainings(ModelAccess(None, [tmp_path], tmp_path / "trainings"))
    assert trainings.starts("llamagen") == [MODEL, "trainings/mine", str(tmp_path / "a/b")]
    assert trainings.starts("flexar") == ["argen/emoji-flextok-ar"]
    assert trainings.starts("seed-lm") == ["argen/emoji-seed-lm"]
    assert MINI not in dict(named(trainings.starts("seed-lm"), "seed-lm")).values()
    assert (trainings.starts("parti"), trainings.starts("xar")) == (["argen/emoji-parti"], ["argen/emoji-xar"])


def test_the_time_that_is_left(tmp_path):
    (tmp_path / "log").touch()
    steps = [{"step": 10, "seconds": 20.0}, {"step": 20, "seconds": 30.0}]
    assert time_left(steps[:1], 100, tmp_path / "log") == pytest.approx(180, abs=5)
    assert time_left(steps, 100, tmp_path / "log") == pytest.approx(80, abs=5)
    again = [*steps, {"step": 30, "seconds": 9.0}]
    assert time_left(again, 100, tmp_path / "log") is None
    assert time_left([*again, {"step": 40, "seconds": 14.0}], 100, tmp_path / "log") == pytest.approx(30, abs=5)
    assert time_left([], 100, tmp_path / "log") is None


def test_others_than_the_administrator_see_and_do_nothing(trainings):
    import gradio as gr

    context = AppContext(SimpleNamespace(models=trainings.models), admin="first")
    with gr.Blocks():
        tab = Train(context)
    other = SimpleNamespace(username="second")
    assert "first key" in tab.show(None, other)[1]
    calls = [(tab.start, ["a", "llamagen", MODEL, 4, 2, 8, None, None]), (tab.look, [None])]
    for function, arguments in calls:
        with pytest.raises((gr.Error, Forbidden), match="first key"):
            function(other, *arguments)
    for function in (tab.stop, tab.resume, tab.use):
        with pytest.raises((gr.Error, Forbidden), match="first key"):
            function("a", other)
    with pytest.raises((gr.Error, Forbidden), match="first key"):
        tab.delete("a", "a", other)
    assert tab.show(None, SimpleNamespace(username="first"))[1] == "No training yet."
    with pytest.raises(gr.Error, match=r"there are no images: drop a \.zip'?$"):
        tab.start(SimpleNamespace(username="first"), "a", "llamagen", MODEL, 4, 2, 8, None, None)


def test_a_locked_folder_is_one_that_runs(trainings, images):
    folder = trainings.folder / "icons"
    folder.mkdir(parents=True)
    (folder / "training.json").write_text(json.dumps(vars(plan(images))))
    with filelock.FileLock(folder / "running.lock"):
        assert trainings.state("icons").status == background.STOPPING
    assert trainings.state("icons").status == STOPPED


@browser
def test_images_are_learned_on_the_page(page, site, packed):  # noqa: F811
    expect = pytest.importorskip("playwright.sync_api").expect
    page.get_by_role("tab", name="Train", exact=True).click()
    page.locator("#train-start").click()
    page.get_by_text("there are no images: drop a .zip").first.wait_for(timeout=PATIENCE)
    page.locator("#train-file input[type=file]").set_input_files(packed)
    page.locator("#train-file", has_text="squares").wait_for(timeout=PATIENCE)
    page.locator("#train-look").click()
    page.wait_for_function(
        "/images: 10/.test(document.querySelector('#train-report textarea')?.value)", timeout=PATIENCE
    )
    page.locator("#train-steps input").fill("12")
    page.locator("#train-name input, #train-name textarea").first.fill("icons")
    page.locator("#train-start").click()
    page.locator("#train-state", has_text="reading the images").wait_for(timeout=PATIENCE)
    page.reload()
    page.get_by_role("tab", name="Train", exact=True).click()
    page.locator("#train-state", has_text="finished: 12 steps").wait_for(timeout=PATIENCE)
    page.locator("#train-curve canvas, #train-curve svg").first.wait_for(timeout=PATIENCE)
    page.locator("#train-sample img").wait_for(timeout=PATIENCE)
    if folder := os.environ.get("ARGEN_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "train.png", full_page=True)
    page.locator("#train-use").click()
    expect(page.locator("#model input")).to_have_value("trainings/icons", timeout=PATIENCE)
    page.get_by_placeholder("a red apple").fill("a red square")
    page.get_by_label("Images").first.fill("1")
    page.locator("#draw").click()
    page.locator("#state", has_text="1 image in").wait_for(timeout=PATIENCE)
