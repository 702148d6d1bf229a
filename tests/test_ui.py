"""The web page, driven in Chromium as a person would."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import tiny_pipeline
from PIL import Image

from argen.metadata import read_request

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 180_000  # milliseconds; a busy machine is slow
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium at /usr/bin/chromium"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(address, folder of pictures) of a running `argen ui`."""
    folder, port = tmp_path_factory.mktemp("ui") / "pictures", free_port()
    log = (folder.parent / "log").open("w")
    command = [sys.executable, "-m", "argen", "ui", "--port", str(port), "--data-dir", str(folder)]
    command += ["--model-dir", str(tmp_path_factory.getbasetemp())]
    server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, Path(log.name).read_text()
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address, folder
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def chromium():
    """One browser for a module."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(site, chromium):
    with chromium.new_context(viewport={"width": 1280, "height": 1000}) as context:
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.goto(site[0])
        page.get_by_placeholder("a red apple").wait_for(timeout=PATIENCE)
        yield page


def test_a_prompt_becomes_images_that_keep_their_settings(page, site):
    page.get_by_placeholder("a red apple").fill("a pizza")
    page.get_by_role("button", name="Generate", exact=True).first.click()
    page.locator("#state", has_text="4 images in").wait_for(timeout=PATIENCE)
    assert page.locator("#pictures img").count() >= 4
    thumbnail = page.locator("#pictures img").first
    assert thumbnail.evaluate("img => img.decode().then(() => img.naturalWidth)") == 256
    page.get_by_role("button", name="Settings of each image").click()
    page.locator("#settings", has_text="a pizza").wait_for(timeout=10_000)

    files = sorted(site[1].glob("*.png"))
    assert len(files) == 4
    assert [read_request(file).seed for file in files] == [0, 1, 2, 3]
    assert read_request(files[0]).prompt == "a pizza"
    if folder := os.environ.get("ARGEN_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "page.png")


def test_the_database_is_not_served(site):
    address, folder = site
    for route in ("gradio_api/file", "file"):
        url = f"{address}/{route}={folder.resolve()}/.studio/studio.db"
        with pytest.raises(urllib.error.HTTPError, match="40[34]"):
            urllib.request.urlopen(url, timeout=10)


def test_an_empty_prompt_is_answered_with_one_line(page):
    page.get_by_role("button", name="Generate", exact=True).first.click()
    page.get_by_text("the prompt is empty").first.wait_for(timeout=PATIENCE)


def test_a_stopped_image_goes_on_after_the_page_was_loaded_anew(page, site):
    page.get_by_placeholder("a red apple").fill("a rocket")
    page.get_by_label("Images").first.fill("9")
    page.get_by_text("More", exact=True).first.click()
    growing = "/\\d+%/.test(document.querySelector('#state').innerText)"  # previews arrive while it is drawn
    paused, over = page.locator("#line", has_text="paused"), page.locator("#state", has_text="9 images in")
    for candidates in (32, 64, 64):  # until it is long enough for a page on a busy machine to pause it in the middle
        before = set(site[1].glob("*.png"))
        page.get_by_label("Candidates").first.fill(str(candidates))
        page.locator("#draw").click()
        page.wait_for_function(growing, polling="raf", timeout=PATIENCE)
        page.locator("#line-pause").click()
        paused.or_(over).first.wait_for(timeout=PATIENCE)
        if paused.count():
            break
        page.locator("#line-pause").click()
        page.wait_for_timeout(2000)
    page.locator("#pictures img").first.wait_for(timeout=PATIENCE)
    page.reload()
    page.locator("#line", has_text="a rocket").wait_for(timeout=PATIENCE)
    page.locator("#state", has_text=re.compile(r"\d+%")).wait_for(timeout=PATIENCE)
    page.locator("#stop").click()
    page.locator("#state", has_text="stopped at").wait_for(timeout=PATIENCE)
    assert set(site[1].glob("*.png")) == before
    page.locator("#line-pause").click()
    page.locator("#resume").click()
    over.wait_for(timeout=PATIENCE)
    assert len(set(site[1].glob("*.png")) - before) == 9
    page.locator("#again").click()
    for _ in range(PATIENCE // 250):
        if len(set(site[1].glob("*.png")) - before) == 18:
            break
        time.sleep(0.25)
    rockets = [read_request(file) for file in set(site[1].glob("*.png")) - before]
    assert {one.prompt for one in rockets} == {"a rocket"}
    seeds = [one.seed for one in rockets]  # the best 9 of the candidates, and of as many more
    assert len(set(seeds)) == 18
    assert sum(seed < candidates for seed in seeds) == 9
    assert max(seeds) < 2 * candidates


def test_a_file_and_a_preset_restore_settings(page, site):
    expect = pytest.importorskip("playwright.sync_api").expect
    file = next(file for file in sorted(site[1].glob("*.png")) if read_request(file).prompt == "a pizza")
    page.get_by_role("button", name="Settings from an image, and presets").click()
    page.locator("#restore input[type=file]").set_input_files(file)
    page.locator("#restored", has_text="a pizza").wait_for(timeout=PATIENCE)
    box = page.locator("#prompt textarea, #prompt input").first
    expect(box).to_have_value("")  # nothing is taken before it is asked for
    page.locator("#use").click()
    expect(box).to_have_value("a pizza", timeout=PATIENCE)
    page.locator("#length", has_text="text tokens").wait_for(timeout=PATIENCE)
    page.locator("#preset input").fill("mine")
    page.locator("#preset input").press("Enter")
    page.locator("#keep").click()
    time.sleep(2)
    page.reload()
    page.get_by_role("button", name="Settings from an image, and presets").click()
    page.locator("#preset input").click()
    page.get_by_role("option", name="mine").click()
    page.locator("#restored", has_text="a pizza").wait_for(timeout=PATIENCE)


def test_the_gallery_finds_compares_and_deletes(page, site):
    page.get_by_role("tab", name="Gallery").click()
    page.locator("#found-state", has_text="1 to").wait_for(timeout=PATIENCE)  # what the tab finds by itself
    page.locator("#search textarea, #search input").first.fill("PIZZA a")
    page.locator("#search textarea, #search input").first.press("Enter")
    page.locator("#found-state", has_text="1 to 4").wait_for(timeout=PATIENCE)
    tiles = page.locator("#found button img")
    tiles.nth(0).click()
    page.locator("#about", has_text="a pizza").wait_for(timeout=PATIENCE)
    page.locator("#star").click()
    page.locator("#about", has_text="true").wait_for(timeout=PATIENCE)
    page.get_by_role("button", name="Token confidence").click()
    page.locator("#think").click()
    page.locator("#sure img").nth(1).wait_for(timeout=PATIENCE)
    tiles.nth(1).click()
    page.get_by_role("button", name="Compare with the previous one").click()
    page.locator("#pair img").nth(1).wait_for(timeout=PATIENCE)
    middle = page.locator("#pair .outer").bounding_box()["x"]
    page.locator("#meet input[type=range]").focus()
    page.keyboard.press("ArrowRight")  # the slider can be moved without a mouse
    for _ in range(40):
        if page.locator("#pair .outer").bounding_box()["x"] > middle + 5:
            break
        page.wait_for_timeout(250)
    assert page.locator("#pair .outer").bounding_box()["x"] > middle + 5
    before = len(list(site[1].glob("*.png")))
    page.locator("#delete").click()
    page.locator("#found-state", has_text="1 to 3").wait_for(timeout=PATIENCE)
    assert len(list(site[1].glob("*.png"))) == before - 1
    page.locator("#pack").click()
    page.locator("#packed a[href*='images.zip']").first.wait_for(timeout=PATIENCE)
    page.get_by_label("Favourites only").check()
    page.locator("#found-state", has_text="1 to 1").wait_for(timeout=PATIENCE)
    if folder := os.environ.get("ARGEN_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "gallery.png", full_page=True)


def painted_on(page):
    """The latest picture on the canvas, with a stroke in its middle."""
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit-latest").click()
    canvas = page.locator("#edit-canvas canvas").first
    canvas.wait_for(timeout=PATIENCE)
    time.sleep(2)
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.55 * box["width"], box["y"] + 0.55 * box["height"], steps=10)
    page.mouse.up()


def drawn_after(page, site, button):
    """Click -> the request of the last of four new pictures, and which cells of its grid were undecided."""
    before = set(site[1].glob("*.png"))
    page.locator(button).click()
    for _ in range(PATIENCE // 250):
        if len(new := set(site[1].glob("*.png")) - before) == 4:
            break
        page.wait_for_timeout(250)
    assert len(new) == 4
    request = read_request(max(new))
    return request, [token == -1 for row in request.tokens for token in row]


def test_what_is_painted_is_written_anew(page, site):
    painted_on(page)
    page.locator("#edit-prompt textarea").fill("a robot")
    request, undecided = drawn_after(page, site, "#edit-paint")
    page.locator("#state-edit", has_text="4 images in").wait_for(timeout=PATIENCE)
    assert request.prompt == "a robot"
    assert 1 <= sum(undecided) < 40
    page.locator("#edit-locked input").check()
    _, others = drawn_after(page, site, "#edit-paint")
    assert others == [not one for one in undecided]
    if folder := os.environ.get("ARGEN_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "edit.png", full_page=True)


def test_an_image_is_varied_gone_on_with_and_extended(page, site):
    painted_on(page)
    _, undecided = drawn_after(page, site, "#edit-vary")
    assert sum(undecided) == 16
    _, undecided = drawn_after(page, site, "#edit-fork")
    assert undecided == [False] * 32 + [True] * 32
    page.get_by_label("bottom").check()
    _, undecided = drawn_after(page, site, "#edit-extend")
    assert undecided == [False] * 48 + [True] * 16


def test_a_model_that_is_not_here_is_answered_with_one_line(page):
    page.get_by_label("Model").first.click()
    page.get_by_role("option", name="FoundationVision/LlamaGen:c2i_B_256", exact=True).click()
    page.get_by_text("could not be fetched from the hub").first.wait_for(timeout=PATIENCE)


SHADES = """async img => {  // how many different pixels an image has
    await img.decode();
    const canvas = new OffscreenCanvas(img.naturalWidth, img.naturalHeight), draw = canvas.getContext("2d");
    draw.drawImage(img, 0, 0);
    return new Set(new Uint32Array(draw.getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size;
}"""


def test_a_drawing_is_followed(page, site):
    page.get_by_role("tab", name="Control").click()
    canvas = page.locator("#canvas canvas").first
    canvas.wait_for(timeout=PATIENCE)
    seen, shades = page.locator("#seen img"), 1
    for attempt in range(
        24
    ):  # Gradio sends a stroke some moments after it ends, and none of a canvas that is not ready
        if attempt % 4 == 0:
            box = canvas.bounding_box()
            page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
            page.mouse.down()
            for across, down in ((0.7, 0.3), (0.7, 0.7), (0.3, 0.7), (0.3, 0.3)):
                page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"], steps=10)
            page.mouse.up()
        page.wait_for_timeout(500)
        page.get_by_role("button", name="Preview control image").click()
        seen.wait_for(timeout=PATIENCE)
        page.wait_for_timeout(500)
        if (shades := seen.evaluate(SHADES)) > 1:
            break
    assert shades > 1
    assert seen.evaluate("img => img.decode().then(() => img.naturalWidth)") == 128
    page.locator("#control-prompt textarea").fill("a pizza")
    page.locator("#control-draw").click()
    page.locator("#state-control", has_text="4 images in").wait_for(timeout=PATIENCE)
    request = read_request(max(site[1].glob("*.png")))
    assert request.model == "argen/emoji-control"
    assert min(min(pair) for pair in request.control.image.convert("RGB").getextrema()) < 100  # the line is in it
    if folder := os.environ.get("ARGEN_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "control.png")


def test_an_image_is_taken_apart(page, tmp_path):
    Image.new("RGB", (200, 200), (200, 40, 40)).save(tmp_path / "red.png")
    page.get_by_role("tab", name="Tokenizers").click()
    page.locator("#lab-picture input[type=file]").set_input_files(tmp_path / "red.png")
    page.locator("#lab-picture img").wait_for(timeout=PATIENCE)
    page.locator("#lab-go").click()
    page.locator("#lab-scores", has_text="64 tokens").wait_for(timeout=PATIENCE)
    assert page.locator("#lab-pictures img").count() >= 2
    page.get_by_role("button", name="Tokens").click()
    page.locator("#lab-look").click()
    page.locator("#lab-caption", has_text="64 tokens, 768 bits").wait_for(timeout=PATIENCE)
    assert page.locator("#lab-tokens td").count() >= 8
    if folder := os.environ.get("ARGEN_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "lab.png", full_page=True)


def test_a_prompt_is_bound(page, golden, tmp_path):
    tiny_pipeline(golden("tome/sdxl_attribute_binding")).save_pretrained(tmp_path / "sdxl")
    page.get_by_role("tab", name="Diffusion").click()
    page.locator("#pipeline textarea, #pipeline input").fill(str(tmp_path / "sdxl"))
    page.locator("#bind-prompt textarea").fill("a white dog and a black bird")
    page.locator("#bind-look").click()
    pairs = page.locator("#bind-pairs textarea")
    pytest.importorskip("playwright.sync_api").expect(pairs).to_have_value("dog=white\nbird=black", timeout=PATIENCE)
    page.get_by_role("button", name="More").click()
    page.locator("#tool-steps input[type=number]").fill("3")
    page.locator("#bind-run").click()
    page.locator("#bind-state", has_text="dog <- white").wait_for(timeout=PATIENCE)
    assert page.locator("#bind-before img").count() == 1
    assert page.locator("#bind-after img").count() == 1
    page.get_by_role("tab", name="Count").click()
    page.locator("#count-prompt textarea").fill("some apples")
    page.locator("#count-run").click()
    page.get_by_text("does not say how many of what").first.wait_for(timeout=PATIENCE)
    if folder := os.environ.get("ARGEN_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "tools.png", full_page=True)
