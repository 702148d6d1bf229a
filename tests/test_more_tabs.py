"""The tabs Many, Evaluate and Models, driven in Chromium as a person would, and what stands behind them."""

import csv
import re

import pytest
from PIL import Image
from test_ui import PATIENCE, chromium, page, site  # noqa: F401, fixtures
from test_ui import pytestmark as marks

from argen.eval import run


def browser(test):
    for mark in marks:
        test = mark(test)
    return test


def opened(page, name):  # noqa: F811
    page.get_by_role("tab", name=name, exact=True).click()


@browser
def test_a_grid_of_settings_is_drawn(page, tmp_path):  # noqa: F811
    opened(page, "X/Y/Z plot and Batch")
    page.locator("#grid-prompt textarea").fill("a red apple, noto style")
    page.locator("#values-x input, #values-x textarea").first.fill("1, 6")
    page.get_by_role("button", name="Generate grid").click()
    page.get_by_text("4 images, also in the gallery").wait_for(timeout=PATIENCE)
    with page.expect_download() as loaded:
        page.locator("#grid-table a").first.click()
    loaded.value.save_as(tmp_path / "grid.csv")
    rows = list(csv.DictReader((tmp_path / "grid.csv").open()))
    assert [(row["guidance_scale"], row["seed"]) for row in rows] == [
        ("1.0", "0"),
        ("6.0", "0"),
        ("1.0", "1"),
        ("6.0", "1"),
    ]
    assert page.locator("#grid img").is_visible()
    page.reload()
    opened(page, "X/Y/Z plot and Batch")
    page.get_by_text("4 images, also in the gallery").wait_for(timeout=PATIENCE)
    assert page.locator("#grid img").is_visible()


@browser
def test_a_table_goes_into_the_queue(page, site, tmp_path):  # noqa: F811
    opened(page, "X/Y/Z plot and Batch")
    table = tmp_path / "requests.csv"
    table.write_text("prompt,seed\na taxi,11\na tomato,12\n")
    page.locator("#batch-file input[type=file]").set_input_files(table)
    page.get_by_text("requests.csv").first.wait_for()
    page.get_by_role("button", name="Queue all rows").click()
    page.get_by_text("2 requests are in the queue").wait_for(timeout=PATIENCE)
    folder = site[1]
    for _ in range(120):
        if len(list(folder.glob("*.png"))) >= 2:
            break
        page.wait_for_timeout(500)
    assert len(list(folder.glob("*.png"))) >= 2
    table.write_text("prompt,seed\na taxi,eleven\n")
    page.locator("#batch-file button[aria-label='Remove'], #batch-file button[aria-label='Clear']").first.click()
    page.locator("#batch-file input[type=file]").set_input_files(table)
    page.get_by_role("button", name="Queue all rows").click()
    page.get_by_text("seed is 'eleven': expected a whole number").first.wait_for(timeout=PATIENCE)


@browser
def test_a_model_is_measured(page):  # noqa: F811
    opened(page, "Evaluate")
    page.get_by_label("the judge, on its 500 prompts").check()
    page.locator("#eval-num input[type=number]").fill("4")
    page.get_by_role("button", name="Measure").click()
    page.locator("#eval-state").get_by_text(re.compile(r"4 images in \d+ s")).wait_for(timeout=PATIENCE)
    assert page.locator("#eval").get_by_text("single: identity").first.is_visible()


@browser
def test_the_models_are_listed_and_checked(page):  # noqa: F811
    opened(page, "Models")
    page.locator("#models").get_by_text("argen/emoji-control").first.wait_for()
    page.locator("#models").get_by_role("button", name="Fullscreen").focus()
    for key in ("Tab", "ArrowDown", "ArrowUp", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.locator("#models-chosen").get_by_text("Chosen: argen/").wait_for()  # chosen by keyboard alone
    page.locator("#models").get_by_text("argen/emoji-parti").first.click()
    page.locator("#models-chosen").get_by_text("Chosen: argen/emoji-parti").wait_for()
    page.get_by_role("button", name="Verify files").click()
    page.get_by_text("files of argen/emoji-parti are whole").wait_for(timeout=PATIENCE)
    assert page.get_by_role("button", name="Delete download").is_disabled()  # it ships with argen


TABS = (
    "Generate",
    "Edit",
    "Control",
    "X/Y/Z plot and Batch",
    "Gallery",
    "Diffusion",
    "Tokenizers",
    "Evaluate",
    "Models",
)
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, select, [role=tab], [role=slider]")]
    .filter(one => one.checkVisibility() && one.type !== "file")
    .filter(one => !(one.getAttribute("aria-label") || one.getAttribute("aria-labelledby") || one.title
        || one.innerText.trim() || (one.labels && [...one.labels].some(label => label.innerText.trim()))
        || one.closest("label")?.innerText.trim()))
    .map(one => one.outerHTML.slice(0, 200))"""


@browser
def test_everything_has_a_name_for_screen_readers(page):  # noqa: F811
    for name in TABS:
        opened(page, name)
        for _ in range(20):  # names are given to what comes later, too
            page.wait_for_timeout(400)
            if not (nameless := page.evaluate(NAMELESS)):
                break
        assert nameless == [], name


@browser
def test_an_image_is_drawn_and_chosen_by_keyboard_alone(page, site):  # noqa: F811
    page.keyboard.press("Tab")
    for _ in range(60):
        if page.evaluate("document.activeElement.closest('#prompt') !== null"):
            break
        page.keyboard.press("Tab")
    page.keyboard.type("a taxi, noto style")
    page.keyboard.press("Enter")
    page.get_by_text(re.compile(r"4 images in ")).wait_for(timeout=PATIENCE)
    for _ in range(200):
        if page.evaluate("document.activeElement.innerText === 'Gallery'"):
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.locator("#found img").first.wait_for(timeout=PATIENCE)
    for _ in range(60):
        if page.evaluate(
            "document.activeElement.closest('#found') !== null && document.activeElement.querySelector('img') !== null"
        ):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#about").get_by_text("a taxi, noto style").first.wait_for(timeout=PATIENCE)


@browser
def test_the_page_fits_a_phone(page):  # noqa: F811
    for name in TABS:
        page.set_viewport_size({"width": 1280, "height": 1000})  # where no tab hides in a menu
        opened(page, name)
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name


@pytest.mark.parametrize("what", ["judge", "fid"])
def test_a_measurement_tells_how_far_it_is(what, tmp_path):
    from argen.hub.loading import load
    from argen.jobs.queue import Studio
    from argen.ui.tabs import evaluate

    studio = Studio(tmp_path, load)
    try:
        *updates, (state, rows, sheet) = evaluate.measure_model(
            studio, {"judge": evaluate.JUDGE, "fid": evaluate.FID}[what], "argen/emoji-parti", 6, 0
        )
    finally:
        studio.close()
    assert [text.split(",")[0] for text, *_ in updates[1:3]] == ["4 of 6 images", "6 of 6 images"]
    assert isinstance(sheet, Image.Image)
    assert rows[0][2] <= 6
    assert state.startswith("6 images in")
    if what == "fid":
        assert rows[0][0] == "FID-emoji"
        assert "biased" in state


def test_the_reference_ships_with_its_captions():
    from argen.eval.features import encoder_features
    from argen.hub.loading import load

    reference = run.read_reference(run.EMOJI, encoder_features("emoji", load("argen/emoji-clip")), None)
    assert reference.n == len(reference.captions) == 12853
