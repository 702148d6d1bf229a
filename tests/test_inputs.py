"""Images and texts that the page takes: by the one reader, within bounds, and what is wrong in one line."""

import io
import zlib
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from test_access import event_of
from test_faults import run_event
from test_server import Served

from argen.hub.loading import load
from argen.hub.model_cache import ModelCache
from argen.jobs.queue import Studio
from argen.ui.build import build
from argen.ui.context import AppContext
from argen.ui.inputs import canvas_input, image_input
from argen.ui.tabs.diffusion import parse_bindings
from argen.ui.tabs.edit import cells_by_number


@pytest.fixture(scope="module")
def site(tmp_path_factory, pipe):
    cache = ModelCache("cpu")
    studio = Studio(tmp_path_factory.mktemp("site"), lambda name: pipe if name == "argen/emoji-parti" else cache(name))
    served = Served(studio, (), build(AppContext(studio)))
    yield served
    served.close()


@pytest.fixture(scope="module")
def client(site, tmp_path_factory):
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(site.address, verbose=False, download_files=str(tmp_path_factory.mktemp("files")))


def handed(path: Path):
    import gradio_client

    return gradio_client.handle_file(str(path))


def deep(path: Path) -> Path:
    """16 bits a pixel: the left half dark, the right one bright."""
    values = np.full((64, 64), 10_000, np.uint16)
    values[:, 32:] = 50_000
    Image.fromarray(values).save(path)
    return path


def wordy(path: Path) -> Path:
    """With a compressed text of 100 MB, which Pillow refuses."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    data, text = buffer.getvalue(), b"tEXt\0\0" + zlib.compress(b"a" * 100_000_000)
    chunk = len(text).to_bytes(4) + b"zTXt" + text + zlib.crc32(b"zTXt" + text).to_bytes(4)
    path.write_bytes(data[:33] + chunk + data[33:])
    return path


def test_every_image_that_is_taken_is_read_by_argen(site):
    page = site.server.config.app.routes[-1].app.get_blocks()
    taken = [one for event in page.fns.values() for one in event.inputs if isinstance(one, gr.Image | gr.ImageEditor)]
    assert len(taken) > 5
    assert all({"preprocess", "convert_and_format_image"} & vars(one).keys() for one in taken)


def test_16_bits_and_large_texts_are_read(tmp_path):
    class File:
        path = str(deep(tmp_path / "deep.png"))

    for read in (
        image_input(render=False).preprocess,
        canvas_input("RGB", render=False).convert_and_format_image,
        canvas_input("RGBA", render=False).convert_and_format_image,
    ):
        File.path = str(tmp_path / "deep.png")
        image = read(File).convert("L")
        assert (image.getpixel((10, 30)), image.getpixel((50, 30))) == (39, 195)
        File.path = str(wordy(tmp_path / "wordy.png"))
        assert read(File).convert("RGB").getpixel((3, 3)) == (255, 0, 0)


def test_clients_of_the_page_get_images_read_and_one_line(client, tmp_path):
    back = client.predict(handed(deep(tmp_path / "deep.png")), "argen/emoji-vitvqgan", api_name="/reconstruct")
    image = Image.open(back if isinstance(back, str) else back["path"]).convert("L").resize((64, 64))
    assert image.getpixel((10, 30)) < 90
    assert image.getpixel((50, 30)) > 150
    client.predict(handed(wordy(tmp_path / "wordy.png")), "argen/emoji-vitvqgan", api_name="/reconstruct")
    page = tmp_path / "page.png"
    page.write_text("<html></html>")
    with pytest.raises(Exception, match="the image could not be read as an image"):
        client.predict(handed(page), "argen/emoji-vitvqgan", api_name="/reconstruct")
    with pytest.raises(Exception, match="num_images is 'x': expected a whole number"):
        client.predict("a pizza", num_images="x", api_name="/generate")
    with pytest.raises(Exception, match="the question has 1,001 characters"):
        client.predict(handed(tmp_path / "deep.png"), "x" * 1001, api_name="/describe")


def test_without_a_seed_each_call_draws_another_image(client):
    seeds = [client.predict("a pizza", api_name="/generate")[1][0]["seed"] for _ in range(2)]
    seeds.append(client.predict("a pizza", seed=-1, api_name="/generate")[1][0]["seed"])
    assert len(set(seeds)) == 3
    assert client.predict("a pizza", seed=0, api_name="/generate")[1][0]["seed"] == 0


def test_texts_of_the_page_are_bounded(site):
    with pytest.raises(ValueError, match="the prompt has 1,001 characters"):
        parse_bindings("x" * 1001)
    number, _ = event_of(site, "bind-look", {})
    assert "the prompt has 64,000 characters" in run_event(site, number, ["a " * 32_000], {})
    with pytest.raises(ValueError, match="the list of cells has 1,001 characters"):
        cells_by_number("1" * 1001, (8, 8))
    with pytest.raises(ValueError, match="the question has 1,001 characters"):
        load("argen/emoji-seed-lm").describe(Image.new("RGB", (64, 64)), "x" * 1001)
