"""The APIs, asked by the clients that people use, and by hostile ones."""

import base64
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import uvicorn
from PIL import Image

from argen.jobs.queue import Studio
from argen.request import Request
from argen.server.app import configured, create
from argen.server.guard import owner_of

KEYS = ("first-key", "second-key")


class Served:
    """A server in a thread."""

    def __init__(self, studio: Studio, keys=(), page=None):
        self.keys = keys
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.studio, self.address = studio, f"http://127.0.0.1:{self.port}"
        config = configured(create(studio, page, keys), "127.0.0.1", self.port)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)

    def ask(self, path: str, body=None, method=None, **headers) -> tuple[int, object]:
        """(status, JSON or bytes) of a request."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        request = urllib.request.Request(
            self.address + path, data, headers, method=method or ("POST" if body is not None else "GET")
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        self.studio.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory, pipe):
    served = Served(Studio(tmp_path_factory.mktemp("site"), lambda name: pipe))
    yield served
    served.close()


@pytest.fixture(scope="module")
def locked(tmp_path_factory, pipe):
    served = Served(Studio(tmp_path_factory.mktemp("locked"), lambda name: pipe), KEYS)
    yield served
    served.close()


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def png(size=(128, 128), colour="red", mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def client(site):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{site.address}/v1", api_key="none", max_retries=0)


def test_openai_draws(client, site, pipe):
    response = client.images.generate(prompt="a pizza", model="argen/emoji-parti", n=2, extra_body={"seed": 5})
    *_, job = pipe.run(Request("a pizza", num_images=2, seed=5))
    assert [opened(one.b64_json).tobytes() for one in response.data] == [one.tobytes() for one in job.images]
    (car,) = client.images.generate(prompt="ein Auto", model="argen/emoji-parti").data
    (literal,) = client.images.generate(prompt="ein Auto", model="argen/emoji-parti", extra_body={"literal": True}).data
    assert (car.revised_prompt, literal.revised_prompt) == ("an automobile", "ein Auto")
    large = client.images.generate(prompt="a pizza", model="argen/emoji-parti", size="512x512", response_format="url")
    with urllib.request.urlopen(large.data[0].url) as file:
        assert Image.open(file).size == (512, 512)
    assert opened(
        client.images.generate(prompt="a pizza", model="argen/emoji-parti", size="512x512").data[0].b64_json
    ).size == (512, 512)


def test_openai_streams_what_is_written_so_far(client):
    kwargs = {"prompt": "a pizza", "model": "argen/emoji-parti", "extra_body": {"sampler": "sequential"}}
    events = list(client.images.generate(**kwargs, stream=True, partial_images=2))
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed"
    assert 1 <= kinds.count("image_generation.partial_image") <= 2
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))
    partial, whole = opened(events[0].b64_json), opened(events[-1].b64_json)
    assert partial.size == whole.size == (256, 256)
    assert partial.crop((0, 224, 256, 256)).getextrema() == ((230, 230),) * 3  # its last row is not written yet
    assert whole.tobytes() != partial.tobytes()


def test_openai_edits(client, site, pipe):
    openai = pytest.importorskip("openai")
    before = client.images.generate(prompt="a pizza", model="argen/emoji-parti").data[0].b64_json
    mask = Image.new("RGBA", (256, 256), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 128, 256, 256))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    kwargs = {"image": ("a.png", base64.b64decode(before)), "mask": ("m.png", buffer.getvalue())}
    response = client.images.edit(**kwargs, prompt="a robot", model="argen/emoji-parti", n=2)
    assert len(response.data) == 2
    saved = site.studio.store.images(limit=2)
    kept = pipe.read_tokens(opened(before))[0, :4].tolist()
    for one in saved:
        assert [list(row) for row in one.tokens[:4]] == kept
        assert one.request.prompt == "a robot"
    drawn = ("a.png", base64.b64decode(before))
    client.images.edit(image=[drawn], prompt="a robot", model="argen/emoji-parti")  # as image[], and without a mask
    (varied,) = site.studio.store.images(limit=1)
    assert sum(row.count(-1) for row in varied.request.tokens) == 48
    with pytest.raises(openai.BadRequestError, match="got 2 images"):
        client.images.edit(image=[drawn, drawn], prompt="a robot", model="argen/emoji-parti")


def test_openai_lists_models(client):
    openai = pytest.importorskip("openai")
    names = [model.id for model in client.models.list()]
    assert "argen/emoji-parti" in names
    assert "argen/emoji-vae" not in names
    assert client.models.retrieve("argen/emoji-llamagen").owned_by == "argen"
    with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3'"):
        client.images.generate(prompt="a pizza", model="dall-e-3")


@pytest.fixture(scope="module")
def webui(site):
    webuiapi = pytest.importorskip("webuiapi")
    return webuiapi.WebUIApi(host="127.0.0.1", port=site.port)


def test_a1111_draws(webui, pipe):
    response = webui.txt2img(prompt="a pizza", seed=5, batch_size=2, width=256, height=256)
    *_, job = pipe.run(Request("a pizza", num_images=2, seed=5))
    assert [one.tobytes() for one in response.images] == [one.resize((256, 256), 1).tobytes() for one in job.images]
    assert response.info["all_seeds"] == [5, 6]
    assert response.info["cfg_scale"] == 1.5  # 7 is what nobody chose
    assert "CFG scale: 1.5, Seed: 6" in response.info["infotexts"][1]
    assert webui.txt2img(prompt="a pizza", seed=5, cfg_scale=3.0).info["cfg_scale"] == 3.0


def test_a1111_paints_in_and_varies(webui, site, pipe):
    image = webui.txt2img(prompt="a pizza", seed=5, width=128, height=128).image
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (0, 0, 64, 128))
    kwargs = {"images": [image], "prompt": "a robot", "width": 128, "height": 128, "seed": 1}
    webui.img2img(**kwargs, mask_image=mask)
    before = pipe.read_tokens(image)[0]
    (after,) = site.studio.store.images(limit=1)
    assert [list(row[4:]) for row in after.tokens] == before[:, 4:].tolist()
    webui.img2img(**kwargs, denoising_strength=0.25)
    (after,) = site.studio.store.images(limit=1)
    assert sum(row.count(-1) for row in after.request.tokens) == 16
    kept = [
        (cell, old)
        for row, olds in zip(after.tokens, before.tolist(), strict=True)
        for cell, old in zip(row, olds, strict=True)
    ]
    assert sum(cell == old for cell, old in kept) >= 48


def test_a1111_tells_and_takes_settings(webui):
    assert webui.get_progress()["state"]["job_count"] == 0
    assert "argen/emoji-parti" in [model["model_name"] for model in webui.get_sd_models()]
    assert {"sequential", "jacobi"} <= {one["name"] for one in webui.get_samplers()}
    webui.set_options({"sd_model_checkpoint": "argen/emoji-llamagen"})
    assert webui.util_get_current_model() == "argen/emoji-llamagen"
    webui.set_options({"sd_model_checkpoint": "argen/emoji-parti"})
    image = webui.txt2img(prompt="a pizza", seed=5).image
    assert "Seed: 5, Size: 512x512, Model: argen/emoji-parti" in webui.png_info(image).info
    assert webui.interrupt() == {}


def test_a1111_progress_and_interrupt(site, webui):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(webui.txt2img, prompt="a pizza", batch_size=8, sampler_name="sequential")
        end = time.monotonic() + 30
        while not 0 < (now := webui.get_progress())["progress"] < 1:
            assert time.monotonic() < end
        assert now["state"]["job_count"] == 1
        webui.interrupt()
        response = running.result(timeout=60)  # what is written so far, as A1111 answers
    assert len(response.images) == 8
    assert "interrupted at" in response.info["comments"][0]
    assert site.ask("/api/jobs")[1]["jobs"] == []


def test_the_queue_over_http(site):
    status, answer = site.ask("/api/jobs", {"prompt": "a pizza", "seed": 4, "num_images": 2})
    assert status == 201
    done = site.studio.result(answer["id"], timeout=60)
    status, job = site.ask(f"/api/jobs/{answer['id']}")
    assert (status, job["state"], job["progress"]) == (200, "done", 1.0)
    assert job["images"] == [saved.id for saved in done.images]
    status, file = site.ask(f"/pictures/{job['images'][0]}.png")
    assert file == site.studio.store.file(job["images"][0]).read_bytes()
    status, answer = site.ask(f"/api/jobs/{answer['id']}/again", b"", method="POST")
    assert status == 201
    assert site.studio.result(answer["id"], timeout=60).images[0].request.seed == 6
    assert "/v1/images/generations" in site.ask("/openapi.json")[1]["paths"]


HOSTILE = {
    "a prompt of 1 MB": ("/v1/images/generations", {"prompt": "x" * 2**20}, 400, "expected at most 1,000"),
    "10,000 pictures": ("/v1/images/generations", {"prompt": "a", "n": 10_000}, 400, "less than or equal to 10"),
    "10,000 pictures of A1111": (
        "/sdapi/v1/txt2img",
        {"prompt": "a", "batch_size": 100, "n_iter": 100},
        400,
        "expected a whole number, 1 to 64",
    ),
    "10,000 pictures of the queue": (
        "/api/jobs",
        {"prompt": "a", "num_images": 10_000},
        400,
        "expected a whole number, 1 to 64",
    ),
    "no prompt": ("/v1/images/generations", {}, 400, "prompt: Field required"),
    "an empty prompt": ("/sdapi/v1/txt2img", {}, 400, "the prompt is empty"),
    "a number for a prompt": ("/v1/images/generations", {"prompt": 7}, 400, "prompt: Input should be a valid string"),
    "a list": ("/v1/images/generations", [1, 2], 400, "valid dictionary"),
    "no JSON": ("/v1/images/generations", b"{", 400, "JSON"),
    "a text for n": ("/v1/images/generations", {"prompt": "a", "n": "many"}, 400, "n: "),
    "NaN": (
        "/v1/images/generations",
        b'{"prompt": "a", "temperature": NaN}',
        400,
        "temperature is nan: expected a number",
    ),
    "NaN of A1111": (
        "/sdapi/v1/txt2img",
        b'{"prompt": "a", "cfg_scale": NaN}',
        422,
        "cfg_scale: Input should be a finite",
    ),
    "infinity": ("/api/jobs", b'{"prompt": "a", "guidance_scale": Infinity}', 400, "guidance_scale is inf"),
    "a huge seed": ("/api/jobs", {"prompt": "a", "seed": 2**64}, 400, "seed is"),
    "an unknown field": ("/api/jobs", {"prompt": "a", "path": "/etc/passwd"}, 400, "unknown field 'path'"),
    "an unknown model": ("/api/jobs", {"prompt": "a", "model": "../../etc"}, 404, "there is no model"),
    "a path for a model": ("/sdapi/v1/options", {"sd_model_checkpoint": "/etc/passwd"}, 404, "there is no model"),
    "a huge size": ("/v1/images/generations", {"prompt": "a", "size": "99999x99999"}, 400, "expected 1 to 2048"),
    "an endless size": ("/v1/images/generations", {"prompt": "a", "size": "9" * 5000 + "x1"}, 400, "size is"),
    "tokens of nobody": ("/api/jobs", {"prompt": "a", "tokens": [["a"]]}, 400, "something else than ids"),
    "a control of nothing": ("/api/jobs", {"prompt": "a", "control": {"picture": "x"}}, 400, "expected"),
    "no picture": ("/sdapi/v1/img2img", {"prompt": "a", "init_images": []}, 422, "init_images"),
    "no base64": ("/sdapi/v1/img2img", {"prompt": "a", "init_images": ["%%%"]}, 400, "is not base64"),
    "text as a picture": (
        "/sdapi/v1/png-info",
        {"image": base64.b64encode(b"hello").decode()},
        400,
        "could not be read",
    ),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_requests_get_one_clear_line(site, name):
    path, body, status, message = HOSTILE[name]
    actual_status, answer = site.ask(path, body)
    assert (actual_status, "Traceback" in str(answer)) == (status, False)
    assert message in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 2000
    assert site.ask("/v1/models")[0] == 200


def test_large_things_are_refused_before_they_are_read(site):
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    status, answer = site.ask("/sdapi/v1/png-info", {"image": base64.b64encode(bomb.getvalue()).decode()})
    assert status == 413
    assert "too many pixels: expected at most 25 million" in answer["error"]["message"]
    with socket.create_connection(("127.0.0.1", site.port)) as sequential:  # a body that is announced, and never sent
        sequential.sendall(b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\n")
        assert b" 413 " in sequential.recv(200)
    with socket.create_connection(("127.0.0.1", site.port)) as sequential:  # one that never ends
        sequential.sendall(b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        part = b"%x\r\n%s\r\n" % (2**20, b"x" * 2**20)
        with suppress(OSError):  # it hangs up while it is being talked to
            for _ in range(33):
                sequential.sendall(part)
        sequential.settimeout(10)
        assert b" 413 " in sequential.recv(200)
    assert site.ask("/v1/models")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/pictures/.studio/studio.db",
        "/pictures/..%2f..%2fetc%2fpasswd.png",
        "/pictures/%00.png",
        "/pictures/studio.db",
        "/api/jobs/../../x",
        "/v1/models/../../x",
    ],
)
def test_no_path_comes_from_outside(site, path):
    status, answer = site.ask(path)
    assert status == 404
    assert b"SQLite" not in (answer if isinstance(answer, bytes) else b"")


def test_a_key_is_needed_and_jobs_are_their_owners(locked):
    for path in ("/v1/models", "/api/jobs", "/sdapi/v1/options"):
        assert locked.ask(path)[0] == 401
        assert locked.ask(path, authorization="Bearer wrong")[0] == 401
        assert locked.ask(path, authorization=f"Bearer {KEYS[0]}")[0] == 200
        basic = base64.b64encode(f"me:{KEYS[1]}".encode()).decode()
        assert locked.ask(path, authorization=f"Basic {basic}")[0] == 200
    mine, other = ({"authorization": f"Bearer {key}"} for key in KEYS)
    locked.studio.pause()
    id = locked.ask("/api/jobs", {"prompt": "a pizza"}, **mine)[1]["id"]
    with ThreadPoolExecutor(8) as pool:
        tries = list(pool.map(lambda _: locked.ask(f"/api/jobs/{id}", method="DELETE", **other), range(16)))
    assert {status for status, _ in tries} == {403}
    assert tries[0][1]["error"]["message"] == "that job belongs to somebody else"
    assert locked.ask(f"/api/jobs/{id}", **other)[0] == 403
    assert locked.ask("/api/jobs", **other)[1]["jobs"] == []
    locked.ask("/sdapi/v1/interrupt", {}, **other)
    locked.studio.pause(False)
    done = locked.studio.result(id, timeout=60)
    assert (done.state, done.owner) == ("done", owner_of(KEYS[0]))
    assert locked.ask(f"/pictures/{done.images[0].id}.png", **other)[0] == 403
    assert locked.ask(f"/api/jobs/{id}", method="DELETE", **mine)[0] == 200
    assert locked.ask("/api/jobs/none", method="DELETE", **mine)[0] == 404


def test_other_sites_and_other_names_are_refused(site):
    assert site.ask("/api/jobs", {"prompt": "a"}, origin="https://evil.example")[0] == 403
    assert site.ask("/v1/models", host="evil.example")[0] == 403
    assert site.ask("/api/jobs", {"prompt": "a pizza"}, origin=site.address)[0] == 201
