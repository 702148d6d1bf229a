"""Every route that is registered, and the bodies that real clients send: openai, litellm, LangChain, Open WebUI, webuiapi."""

import base64
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image, PngImagePlugin
from test_server import Served, opened, png

from argen.images import fitted
from argen.jobs.queue import Studio
from argen.metadata import differences, read_grid, read_request
from argen.request import Request

BODIES = {  # of clients that send null for what they leave out
    "/v1/images/generations": [
        {"n": None},
        {"size": None},
        {"response_format": None},
        {"stream": None},
        {"model": None},
        {"user": "me", "quality": "standard", "style": None, "background": None, "moderation": "auto"},
    ],
    "/sdapi/v1/txt2img": [
        {"seed": None},
        {"override_settings": None},
        {"width": None, "height": None},
        {"steps": None, "sampler_name": None, "cfg_scale": None, "styles": None},
    ],
}
LISTS = ("schedulers", "upscalers", "latent-upscale-modes", "sd-vae", "loras", "hypernetworks", "face-restorers")
LISTS += ("realesrgan-models", "prompt-styles")
NEEDED = {  # what a route needs to be called with, path -> body
    "/sdapi/v1/txt2img": {"prompt": "a pizza", "width": 128, "height": 128},
    "/sdapi/v1/img2img": {"prompt": "a pizza", "init_images": [base64.b64encode(png()).decode()]},
    "/sdapi/v1/extra-single-image": {"image": base64.b64encode(png()).decode(), "upscaling_resize": 2},
    "/sdapi/v1/extra-batch-images": {"imageList": [{"data": base64.b64encode(png()).decode(), "name": "a"}]},
    "/sdapi/v1/interrogate": {"image": base64.b64encode(png()).decode(), "model": "clip"},
    "/sdapi/v1/png-info": {"image": base64.b64encode(png()).decode()},
    "/sdapi/v1/options": {"samples_format": "png"},
    "/v1/images/generations": {"prompt": "a pizza"},
    "/api/jobs": {"prompt": "a pizza"},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory, pipe):
    from argen.hub.model_cache import ModelCache

    cache = ModelCache("cpu")
    studio = Studio(tmp_path_factory.mktemp("site"), lambda name: pipe if name == "argen/emoji-parti" else cache(name))
    served = Served(studio)
    yield served
    served.close()


@pytest.fixture(scope="module")
def client(site):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{site.address}/v1", api_key="none", max_retries=0)


def test_every_route_answers(site):
    """No route fails, whatever else it says."""
    done = site.studio.result(site.studio.submit(Request("a pizza")))
    left = site.studio.submit(Request("a pizza"))
    site.studio.cancel(left)
    names = {"{id}": done.id, "{form}": "png", "{name}": "argen/emoji-parti"}
    called = 0
    for path, methods in site.ask("/openapi.json")[1]["paths"].items():
        for method in methods:
            address = path.replace("/pictures/{id}", f"/pictures/{done.images[0].id}")
            for name, value in names.items():
                address = address.replace(name, value)
            address = address.replace(f"{done.id}/resume", f"{left}/resume")
            if path == "/v1/images/edits":
                continue  # a form, below
            body = NEEDED.get(path, {}) if method == "post" else None
            status, answer = site.ask(address, body, method.upper())
            assert status in (200, 201), (method, address, status, answer)
            called += 1
    assert called > 35
    for name in LISTS:
        assert isinstance(site.ask(f"/sdapi/v1/{name}")[1], list)


@pytest.mark.parametrize(("path", "more"), [(path, more) for path, rows in BODIES.items() for more in rows])
def test_null_means_left_out(site, path, more):
    assert site.ask(path, {"prompt": "a red apple", **more})[0] == 200


def test_what_is_not_there_says_so(site):
    for path in ("/v1/chat/completions", "/v1/none", "/sdapi/v1/none", "/api/none"):
        status, answer = site.ask(path, {})
        assert (status, bool(answer["error"]["message"])) == (404, True)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 11}, "n", "integer_above_max_value"),
        ({"n": "two"}, "n", "invalid_type"),
        ({"n": True}, "n", "invalid_type"),
        ({"partial_images": 4}, "partial_images", "integer_above_max_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"prompt": None}, "prompt", "missing_required_parameter"),
    ],
)
def test_openai_names_the_parameter(client, site, fields, param, code):
    openai = pytest.importorskip("openai")
    status, answer = site.ask("/v1/images/generations", {"prompt": "a", **fields})
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code)
    if fields.get("n") in (0, 11):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="a", **fields)
        assert caught.value.param == param


def test_without_a_seed_images_differ_and_have_an_address(client, site):
    first, second = (client.images.generate(prompt="a pizza").data[0] for _ in range(2))
    assert first.b64_json != second.b64_json
    assert site.ask(first.url.removeprefix(site.address))[0] == 200  # LangChain's wrapper takes the address alone
    alone = client.images.generate(prompt="a pizza", response_format="b64_json").data[0]
    assert alone.url is None


@pytest.mark.parametrize("form", ["jpeg", "webp", "png"])
def test_output_formats_and_sizes(client, form):
    response = client.images.generate(prompt="a pizza", output_format=form, size="192x128")
    image = opened(response.data[0].b64_json)
    assert (image.format, image.size) == (form.upper(), (192, 128))  # another shape is padded
    assert response.output_format == form


def test_partial_images_are_new_each_time(client):
    kwargs = {"prompt": "a pizza", "extra_body": {"sampler": "sequential", "seed": 1}}
    events = list(client.images.generate(**kwargs, stream=True, partial_images=3))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    images = [opened(event.b64_json).convert("RGB") for event in events]
    assert len({image.tobytes() for image in images}) == 4
    undecided = [sum(pixel == (230, 230, 230) for pixel in image.getdata()) / (256 * 256) for image in images]
    assert undecided[0] > undecided[1] > undecided[2] > undecided[3]
    assert undecided[2] <= 0.3


def test_wrapped_and_unpadded_base64_is_read(site):
    text = base64.b64encode(png((64, 64), (250, 251, 255))).decode()
    wrapped = "\n".join(text[at : at + 40] for at in range(0, len(text), 40))
    for one in (wrapped, text.rstrip("="), text.replace("+", "-").replace("/", "_"), f"data:image/png;base64,{text}"):
        assert site.ask("/sdapi/v1/png-info", {"image": one})[0] == 200


def test_a1111_images_know_how_they_were_made(site):
    status, answer = site.ask("/sdapi/v1/txt2img", {"prompt": "a pizza", "seed": 3, "negative_prompt": "blurry"})
    assert status == 200
    image, info = opened(answer["images"][0]), json.loads(answer["info"])
    assert image.info["parameters"] == info["infotexts"][0]
    assert "Seed: 3" in image.info["parameters"]
    assert "negative_prompt is not used" in info["comments"][0]
    status, answer = site.ask("/sdapi/v1/extra-single-image", {"image": answer["images"][0], "upscaling_resize": 0.5})
    assert opened(answer["image"]).size == (256, 256)


def test_edits_by_a_form_that_names_its_image_as_a_list(site):
    border = "xyz"
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 64, 128))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    parts = {"image[]": png(), "mask": buffer.getvalue(), "prompt": b"a pizza", "n": b"2", "size": b"128x128"}
    body = b""
    for name, data in parts.items():
        more = b'; filename="a.png"' if name in ("image[]", "mask") else b""
        body += b'--xyz\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name.encode(), more, data)
    status, answer = site.ask(
        "/v1/images/edits", body + b"--xyz--\r\n", content_type=f"multipart/form-data; boundary={border}"
    )
    assert (status, len(answer["data"])) == (200, 2)
    status, answer = site.ask("/v1/images/edits", b"--xyz--\r\n", content_type="multipart/form-data; boundary=xyz")
    assert (status, answer["error"]["param"]) == (400, "image")


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"resize_mode": 0, "upscaling_resize": 2}, (256, 192)),
        ({"resize_mode": 1, "upscaling_resize_w": 300, "upscaling_resize_h": 100, "upscaling_crop": False}, (300, 225)),
        ({"resize_mode": 1, "upscaling_resize_w": 300, "upscaling_resize_h": 100}, (300, 100)),
        ({"resize_mode": 1, "upscaling_resize_w": 100, "upscaling_resize_h": 96, "upscaling_crop": True}, (100, 96)),
    ],
)
def test_a1111_scaling_keeps_the_shape(site, fields, size):
    """The left half is red: in the middle of what is cropped, too."""
    image = Image.new("RGB", (128, 96), "white")
    image.paste("red", (0, 0, 64, 96))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    status, answer = site.ask("/sdapi/v1/extra-single-image", {"image": text, **fields})
    image = opened(answer["image"])
    assert (status, image.size) == (200, size)
    red = [image.getpixel((x, size[1] // 2))[1] < 128 for x in range(size[0])]
    assert sum(red) == pytest.approx(size[0] / 2, abs=1)


def test_a_request_scales_so_many_pixels_and_no_more(site):
    text = base64.b64encode(png()).decode()
    images = [{"data": text, "name": None}] * 4
    body = {"imageList": images, "resize_mode": 1, "upscaling_resize_w": 4096, "upscaling_resize_h": 4096}
    status, answer = site.ask("/sdapi/v1/extra-batch-images", body)
    assert status == 400
    assert "67 million pixels together: expected at most 51 million" in answer["detail"]
    status, answer = site.ask("/sdapi/v1/txt2img", {"prompt": "a", "width": 2048, "height": 2048, "batch_size": 64})
    assert (status, "million pixels together" in answer["detail"]) == (400, True)
    body |= {"upscaling_resize_w": 64, "upscaling_resize_h": 64}
    assert len(site.ask("/sdapi/v1/extra-batch-images", body)[1]["images"]) == 4


def form(fields: dict[str, bytes]) -> dict:
    """Of a multipart form the body and its kind; image and mask are files."""
    body = b""
    for name, data in fields.items():
        more = b'; filename="a.png"' if name in ("image", "mask") else b""
        body += b'--xyz\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name.encode(), more, data)
    return {"body": body + b"--xyz--\r\n", "content_type": "multipart/form-data; boundary=xyz"}


def test_forms_take_the_numbers_of_every_field(site):
    fields = {"image": png(), "prompt": b"a pizza", "temperature": b"0.5", "guidance_scale": b"2", "top_k": b"20"}
    fields |= {"top_p": b"0.9", "seed": b"7", "n": b"1", "output_compression": b"90", "stream": b"false"}
    status, answer = site.ask("/v1/images/edits", **form(fields))
    assert status == 200, answer
    (saved,) = site.studio.store.images(limit=1)
    request = saved.request
    assert (request.temperature, request.guidance_scale, request.top_k, request.top_p) == (0.5, 2.0, 20, 0.9)
    assert request.seed == 7
    status, answer = site.ask("/v1/images/edits", **form(fields | {"temperature": b"warm"}))
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "temperature", "invalid_type")


@pytest.mark.parametrize("size", ["1536x1024", "300x200", "90x200", "128x128"])
@pytest.mark.parametrize("alpha", [True, False])
def test_edits_of_padded_images_keep_what_is_not_painted(site, client, size, alpha):
    """Three in a row, of the left half: the right half stays, token for token."""
    text = client.images.generate(prompt="a pizza", size=size, extra_body={"seed": 4}).data[0].b64_json
    (saved,) = site.studio.store.images(limit=1)
    kept = [row[4:] for row in saved.tokens]
    for number in range(3):
        image = opened(text)
        mask = Image.new("L", image.size, 255)
        mask.paste(0, (0, 0, image.width // 2, image.height))
        files = {"image": base64.b64decode(text)}
        over = Image.merge("RGBA", [*Image.new("RGB", image.size).split(), mask])
        if alpha:
            over = image.convert("RGBA")
            over.putalpha(mask)
            over.info = image.info
        buffer = io.BytesIO()
        info = PngImagePlugin.PngInfo()
        for name, value in image.info.items():
            info.add_text(name, value)
        over.save(buffer, "PNG", pnginfo=info)
        files["image" if alpha else "mask"] = buffer.getvalue()
        fields = {"prompt": b"a robot", "size": size.encode(), "seed": b"%d" % number}
        status, answer = site.ask("/v1/images/edits", **form(files | fields))
        assert status == 200, answer
        (saved,) = site.studio.store.images(limit=1)
        assert [row[4:] for row in saved.tokens] == kept
        assert all(cell == -1 for row in saved.request.tokens for cell in row[:4])
        text = answer["data"][0]["b64_json"]
        assert opened(text).size == tuple(map(int, size.split("x")))


def test_a1111_edits_of_padded_images_keep_what_is_not_painted(site):
    settings = {"prompt": "a pizza", "width": 300, "height": 200, "seed": 3}
    text = site.ask("/sdapi/v1/txt2img", settings)[1]["images"][0]
    (before,) = site.studio.store.images(limit=1)
    mask = Image.new("L", (300, 200))
    mask.paste(255, (0, 0, 150, 200))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    more = {"init_images": [text], "mask": base64.b64encode(buffer.getvalue()).decode()}
    assert site.ask("/sdapi/v1/img2img", settings | more | {"prompt": "a robot"})[0] == 200
    (after,) = site.studio.store.images(limit=1)
    assert [row[4:] for row in after.tokens] == [row[4:] for row in before.tokens]


def test_what_was_drawn_beside_a_padded_image_is_part_of_it(pipe):
    (original,) = pipe("a pizza", generator=torch.Generator().manual_seed(1)).images
    info, image = original.info, fitted(original, (512, 256))
    image.info = info
    assert torch.equal(pipe.read_tokens(image)[0], torch.tensor(read_grid(original)))
    image.paste("red", (0, 0, 80, 256))
    assert not torch.equal(pipe.read_tokens(image)[0], torch.tensor(read_grid(original)))


WRONG = {
    "a size in words": ({"size": "foo"}, "size", "invalid_value"),
    "no size": ({"size": "0x0"}, "size", "invalid_value"),
    "a large X": ({"size": "1024X1024"}, "size", "invalid_value"),
    "an empty prompt": ({"prompt": ""}, "prompt", "string_below_min_length"),
    "a long prompt": ({"prompt": "x" * 1001}, "prompt", "string_above_max_length"),
    "a large seed": ({"seed": 2**63}, "seed", "integer_above_max_value"),
    "a float above": ({"temperature": 101.5}, "temperature", "decimal_above_max_value"),
    "a float below": ({"top_p": -0.5}, "top_p", "decimal_below_min_value"),
    "a sampler": ({"sampler": "none"}, "sampler", "invalid_value"),
    "candidates": ({"n": 2, "num_candidates": 1}, "num_candidates", "invalid_value"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_argens_own_checks_name_the_parameter(site, name):
    fields, param, code = WRONG[name]
    status, answer = site.ask("/v1/images/generations", {"prompt": "a", **fields})
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, code)


def test_edits_name_the_file_that_is_wrong(site):
    for fields, param in (
        ({"image": b"<html>"}, "image"),
        ({"image": png(), "mask": b"junk"}, "mask"),
        ({"image": png(), "mask": png((64, 64))}, "mask"),
        ({"image": png(), "mask": png(mode="RGB", colour="white")}, "mask"),
    ):
        status, answer = site.ask("/v1/images/edits", **form({"prompt": b"a", **fields}))
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, param, "invalid_value")


def test_not_a_number_names_the_parameter(site):
    answer = site.ask("/v1/images/generations", b'{"prompt": "a", "temperature": NaN}')[1]
    assert (answer["error"]["param"], answer["error"]["code"]) == ("temperature", "invalid_type")


def test_no_model_is_the_usual_one_and_an_unknown_one_is_not_found(site):
    assert site.ask("/v1/images/generations", {"prompt": "a pizza", "model": ""})[0] == 200
    status, answer = site.ask("/v1/images/generations", {"prompt": "a", "model": "dall-e-3"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_a1111_takes_what_its_clients_send(site):
    text = base64.b64encode(png()).decode()
    body = {"prompt": "a pizza", "init_images": [text, text], "mask": "", "width": 128, "height": 128}
    status, answer = site.ask("/sdapi/v1/img2img", body)
    assert (status, "2 init_images were sent" in answer["info"]) == (200, True)
    for name in ("Sequential", "SEQUENTIAL", " sequential "):
        status, answer = site.ask("/sdapi/v1/txt2img", {"prompt": "a pizza", "sampler_name": name, "batch_size": 2})
        info = json.loads(answer["info"])
        assert (info["sampler_name"], info["comments"]) == ("sequential", [])
        assert (info["all_subseeds"], info["styles"], len(info["job_timestamp"])) == ([0, 0], [], 14)
    info = json.loads(site.ask("/sdapi/v1/txt2img", {"prompt": "zwei Hunde", "steps": 1})[1]["info"])
    assert (info["prompt"], info["revised_prompt"]) == ("zwei Hunde", "two dogs")
    assert "read as: two dogs" in info["comments"]
    answer = site.ask("/sdapi/v1/txt2img", {"prompt": "a pizza", "sampler_name": "DPM++ 2M"})[1]
    assert "there is no sampler 'DPM++ 2M'" in answer["info"]
    answer = site.ask("/sdapi/v1/txt2img", {"prompt": "a pizza", "sampler_name": "Euler"})[1]
    assert json.loads(answer["info"])["comments"] == ["there is no sampler 'Euler' for this model: auto was used"]


@pytest.mark.parametrize("name", ["lantern:k=5,delta=0.1", "Lantern", "euler:steps=3", "jacobi:widow=3", "lantrn:k=5"])
def test_a_sampler_of_argen_that_does_not_fit_is_refused_everywhere(site, name):
    for path, field in (("/sdapi/v1/txt2img", "sampler_name"), ("/v1/images/generations", "sampler")):
        status, answer = site.ask(path, {"prompt": "a red apple", field: name})
        assert status == 400, (path, answer)


def test_the_settings_of_a_sampler_are_in_the_texts(site):
    typed = "jacobi:window=4"
    answer = site.ask("/sdapi/v1/txt2img", {"prompt": "a pizza", "sampler_name": typed, "seed": 1})[1]
    info = json.loads(answer["info"])
    assert info["sampler_name"] == typed
    assert f'Sampler: "{typed}", ' in info["infotexts"][0]
    text = site.ask("/sdapi/v1/png-info", {"image": answer["images"][0]})[1]["info"]
    assert Request("a pizza", sampler=json.loads(re.search(r"Sampler: (\".*?\")", text)[1])).sampler_text == typed


def test_samplers_are_listed_with_their_settings(site):
    options = {row["name"]: row["options"] for row in site.ask("/sdapi/v1/samplers")[1]}
    assert options["jacobi"] == {"window": "16"}
    assert options["sequential"] == {}
    for name, settings in options.items():  # they are what may be typed
        typed = ",".join(f"{key}={value}" for key, value in settings.items())
        Request("a pizza", sampler=f"{name}:{typed}")


def test_unknown_fields_are_refused(site):
    status, answer = site.ask("/v1/images/generations", {"prompt": "a red apple", "guidance_scal": 3})
    assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "guidance_scal", "unknown_parameter")
    assert answer["error"]["message"].endswith("did you mean guidance_scale?")
    status, answer = site.ask("/api/jobs", {"prompt": "a red apple", "guidance_scal": 3})
    assert (status, answer["detail"].endswith("did you mean guidance_scale?")) == (400, True)


def test_another_method_says_which(site):
    for path, method in (("/sdapi/v1/png-info", "GET"), ("/v1/models", "POST"), ("/api/jobs", "PUT")):
        status, answer = site.ask(path, {} if method != "GET" else None, method)
        assert status == 405, (path, answer)
        assert f"does not take {method}: send " in answer["detail"]


def test_an_interrupted_batch_says_what_came_of_it(site):
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a pizza", "batch_size": 16, "sampler_name": "sequential", "seed": 2}
        running = pool.submit(site.ask, "/sdapi/v1/txt2img", body)
        end = time.monotonic() + 30
        while not 0 < site.ask("/sdapi/v1/progress")[1]["progress"] < 1:
            assert time.monotonic() < end
        site.ask("/sdapi/v1/interrupt", {})
        _, answer = running.result(timeout=60)
    info = json.loads(answer["info"])
    assert info["comments"][0].endswith(": 9 of 16 images")
    assert len(answer["images"]) == 9
    assert opened(answer["images"][3]).info["parameters"] == info["infotexts"][3]
    assert "Seed: 5" in info["infotexts"][3]
    assert "argen" not in opened(answer["images"][3]).info


def test_a_deeply_nested_text_in_a_file_is_no_grid(site, tmp_path):
    """Of any of the texts that argen writes."""
    for name in ("argen", "argen tokens", "argen version"):
        info = PngImagePlugin.PngInfo()
        info.add_text(name, "[" * 100_000)
        Image.new("RGBA", (128, 128), (255, 0, 0, 0)).save(tmp_path / "a.png", pnginfo=info)
        fields = {"image": (tmp_path / "a.png").read_bytes(), "prompt": b"a pizza"}
        assert site.ask("/v1/images/edits", **form(fields))[0] == 200
        with pytest.raises(ValueError, match="holds no settings|cannot be used"):
            read_request(tmp_path / "a.png")
        assert differences(tmp_path / "a.png", None) is None
