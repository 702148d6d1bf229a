"""Who may ask a server for what: models, files, names, keys, open connections, slow bodies."""

import errno
import io
import json
import logging
import socket
import time
import urllib.request

import pytest
from PIL import Image
from test_faults import run_event
from test_server import KEYS, Served

from argen.jobs.access import UnknownModel
from argen.jobs.messages import error_message
from argen.jobs.queue import Studio
from argen.jobs.store import Store
from argen.request import Request
from argen.server.app import KEPT_FILES, OnceAMinute, max_connections
from argen.server.guard import check_keys, owner_of
from argen.ui.build import build
from argen.ui.context import AppContext


@pytest.fixture(scope="module")
def page(tmp_path_factory, pipe):
    """A server with two keys and its page."""
    models = tmp_path_factory.mktemp("models")
    studio = Studio(tmp_path_factory.mktemp("page"), lambda name: pipe, folders=[models])
    served = Served(studio, KEYS, build(AppContext(studio, owner_of(KEYS[0]))))
    yield served
    served.close()


def log_in(page, name: str, key: str, path: str = "/login") -> dict[str, str]:
    """The headers of somebody who is at the page."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    login = urllib.request.Request(f"{page.address}{path}", f"username={name}&password={key}".encode(), form)
    with urllib.request.urlopen(login) as answer:
        cookies = [line.partition(";")[0] for line in answer.headers.get_all("set-cookie")]
    return {"cookie": "; ".join(cookies)}


def event_of(page, elem_id: str, headers: dict) -> tuple[int, list]:
    """(number, what its inputs are at first) of the event of a button."""
    config = page.ask("/config", **headers)[1]
    parts = {one["id"]: one for one in config["components"]}
    (button,) = (id for id, one in parts.items() if one["props"].get("elem_id") == elem_id)
    event = next(one for one in config["dependencies"] if [button, "click"] in map(list, one["targets"]))
    return event["id"], [parts[one]["props"].get("value") for one in event["inputs"]]


def uploaded(page, name: str, data: bytes, headers: dict) -> dict:
    body = b'--xyz\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n' % name.encode()
    kind = "multipart/form-data; boundary=xyz"
    status, answer = page.ask("/gradio_api/upload", body + data + b"\r\n--xyz--\r\n", content_type=kind, **headers)
    assert status == 200
    return {"path": answer[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def test_no_front_end_loads_a_model_by_a_path(page, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hf_SECRET")
    headers = log_in(page, "me", KEYS[1])
    for path in (str(secret), str(tmp_path), str(tmp_path / "none"), "argen/emoji-vae", "\0"):
        number, _ = event_of(page, "draw-grid", headers)
        answer = run_event(page, number, ["argen/emoji-parti", "a", 0, "model", path, "none", "", "none", ""], headers)
        assert '"success":false' in answer
        assert "there is no model" in answer or "expected a name" in answer
        number, _ = event_of(page, "batch-go", headers)
        table = uploaded(page, "a.jsonl", json.dumps({"prompt": "a", "model": path}).encode(), headers)
        answer = run_event(page, number, [table, "argen/emoji-parti"], headers)
        assert "there is no model" in answer or "expected a name" in answer
        with pytest.raises(UnknownModel):
            page.studio.models(path)
        status, answer = page.ask("/api/jobs", {"prompt": "a", "model": path}, authorization=f"Bearer {KEYS[0]}")
        assert status in (400, 404)
        assert "there is no model" in answer["error"]["message"] or "expected a name" in answer["error"]["message"]
    assert page.studio.models("argen/emoji-vae", "tokenizer")


def test_pipelines_come_from_the_named_folders(page):
    (folder,) = page.studio.models.folders
    inside = str(folder / "mine")
    with pytest.raises(UnknownModel, match="there is no model"):  # a name as any other, until it is there
        page.studio.models.check(inside)
    (folder / "mine").mkdir()
    assert page.studio.models.check(inside) == page.studio.models.check_pipeline(inside) == inside
    (folder / "out").symlink_to("/etc")
    for path in ("/etc", "..", str(folder / ".." / "x"), str(folder / "out")):
        with pytest.raises(UnknownModel):
            page.studio.models.check(path)
        with pytest.raises(UnknownModel, match="may load"):
            page.studio.models.check_pipeline(path)
    assert page.studio.models.check_pipeline("argen/emoji-sd") == "argen/emoji-sd"


def test_only_images_of_the_owner_are_served(page):
    done = page.studio.result(page.studio.submit(Request("a pizza"), owner_of(KEYS[0])), timeout=60)
    letter = page.studio.store.folder / "letter.txt"
    letter.write_text("dear")
    mine, other = log_in(page, "me", KEYS[0]), log_in(page, "you", KEYS[1])
    image = page.studio.store.file(done.images[0].id)
    for path in (letter, image):
        for who in (mine, other):
            assert page.ask(f"/gradio_api/file={path}", **who)[0] == 403
    path = page.studio.store.link_for_download(done.images[0].id)
    assert page.ask(f"/gradio_api/file={path}", **mine) == (200, image.read_bytes())
    assert len(path.parent.name) == 16  # random: nobody else knows it


def test_a_name_belongs_to_no_key(page):
    first, second = log_in(page, "admin", KEYS[1]), log_in(page, "admin", KEYS[0])
    assert (page.ask("/gradio_api/user", **first)[1], page.ask("/gradio_api/user", **second)[1]) == (
        owner_of(KEYS[1]),
        owner_of(KEYS[0]),
    )


@pytest.mark.parametrize("path", ["/login", "/login/", "/v1/models"])
def test_wrong_keys_are_answered_late_on_every_path(tmp_path, pipe, path):
    studio = Studio(tmp_path, lambda name: pipe)
    served = Served(studio, KEYS, build(AppContext(studio, owner_of(KEYS[0]))))
    try:
        started = time.monotonic()
        for _ in range(6):
            if path.startswith("/login"):
                form = "application/x-www-form-urlencoded"
                assert served.ask(path, b"username=a&password=wrong", content_type=form)[0] == 400
            else:
                assert served.ask(path, authorization="Bearer wrong")[0] == 401
        assert time.monotonic() - started > 1.5  # 0.25 + 0.5 + 1 seconds
    finally:
        served.close()


def test_what_stays_open_needs_a_login_and_is_bounded(page, monkeypatch):
    monkeypatch.setattr("argen.server.guard.MAX_OPEN_STREAMS", 3)
    assert page.ask("/gradio_api/heartbeat/h1")[0] == 403
    head = f"Host: 127.0.0.1\r\nCookie: {log_in(page, 'me', KEYS[1])['cookie']}\r\n\r\n"
    held = [socket.create_connection(("127.0.0.1", page.port)) for _ in range(5)]
    answers = []
    for number, one in enumerate(held):
        one.sendall(f"GET /gradio_api/heartbeat/h{number} HTTP/1.1\r\n{head}".encode())
        answers.append(one.recv(20).split()[1])
    assert answers == [b"200"] * 3 + [b"429"] * 2
    for one in held:
        one.close()


def test_connections_are_bounded_and_other_clients_are_served(tmp_path, pipe, monkeypatch):
    """Those of a client that are too many are ended with an answer, at once."""
    monkeypatch.setattr("argen.server.app.max_connections", lambda: 20)
    served = Served(Studio(tmp_path, lambda name: pipe))
    try:
        idle = [socket.create_connection(("127.0.0.1", served.port), timeout=5) for _ in range(18)]
        idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b" 503 " in idle[-1].recv(100)
        with socket.create_connection(("127.0.0.1", served.port), 5, ("127.0.0.2", 0)) as other:
            other.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert b" 200 " in other.recv(100)
        for one in idle:
            one.close()
    finally:
        served.close()


def test_the_limit_leaves_files_for_the_program(monkeypatch):
    monkeypatch.setattr("argen.server.app.resource.getrlimit", lambda kind: (400, 400))
    monkeypatch.setattr("argen.server.app.resource.setrlimit", lambda kind, limits: None)
    assert max_connections() == 400 - KEPT_FILES


def test_asyncio_says_once_that_files_ran_out():
    record = logging.LogRecord("asyncio", 40, "", 0, "socket.accept() out of system resource", (), None)
    other = logging.LogRecord("asyncio", 40, "", 0, "something else", (), None)
    once = OnceAMinute()
    assert [once.filter(one) for one in (record, record, other, other)] == [True, False, True, True]


def test_a_body_that_trickles_is_ended(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr("argen.server.guard.BODY_TIMEOUT", 1.0)
    served = Served(Studio(tmp_path, lambda name: pipe))
    try:
        with socket.create_connection(("127.0.0.1", served.port)) as plain:
            plain.sendall(b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n")
            plain.settimeout(0.4)
            answer, started = b"", time.monotonic()
            while not answer:
                assert time.monotonic() - started < 3
                plain.sendall(b"{")
                try:
                    answer = plain.recv(100)
                except TimeoutError:
                    continue
            assert b" 408 " in answer
    finally:
        served.close()


@pytest.mark.parametrize("host", ["evil.com@localhost", "localhost/evil.com", "localhost#.evil.com", "localhost:x", ""])
def test_a_host_is_a_name_and_a_port(page, host):
    assert page.ask("/health", host=host)[0] in (400, 403)
    assert page.ask("/health", host=f"localhost:{page.port}")[0] == 200


@pytest.mark.parametrize("key", ["schlüssel-99", " " * 8, "a b c d e", "short", "tab\there!"])
def test_keys_that_no_client_can_send_are_refused(key):
    with pytest.raises(ValueError, match="a key"):
        check_keys(["good-key", key])


def test_a_refused_start_touches_nothing_and_a_kill_leaves_nothing(tmp_path):
    store = Store(tmp_path)
    file = store.export("x.csv")
    file.write_text("kept")
    part = tmp_path / ".0123456789abcdef.part"
    part.write_text("half")
    with pytest.raises(ValueError, match="in use by another argen"):
        Store(tmp_path)
    assert file.read_text() == "kept"
    assert part.exists()
    store.close()
    Store(tmp_path).close()
    assert not part.exists()


JUNK = {
    "another version": '{"prompt": "a", "hyperdrive": 1}',
    "no JSON": "junk",
    "deep": "[" * 100_000,
    "a number": 7,
}


@pytest.mark.parametrize("name", list(JUNK))
def test_a_row_that_cannot_be_read_fails_alone(tmp_path, pipe, name):
    studio = Studio(tmp_path, lambda name: pipe)
    served = Served(studio, (), build(AppContext(studio)))
    try:
        done = studio.result(studio.submit(Request("a pizza")), timeout=60).images[0]
        other = studio.result(studio.submit(Request("a robot")), timeout=60).images[0]
        studio.store.execute("update pictures set request = ?, tokens = '[[' where id = ?", (JUNK[name], done.id))
        studio.pause()
        waiting = studio.submit(Request("a cat"))
        studio.store.execute("update jobs set request = ? where id = ?", (JUNK[name], waiting))
        (job,) = served.ask("/api/jobs")[1]["jobs"]
        assert (job["state"], "cannot be read" in job["error"]) == ("failed", True)
        assert served.ask("/sdapi/v1/progress")[0] == 200
        assert served.ask(f"/api/jobs/{waiting}/again", b"", method="POST")[0] == 400
        studio.pause(False)
        assert studio.result(waiting, timeout=60).state == "failed"
        assert studio.result(studio.submit(Request("a pizza")), timeout=60).state == "done"
        saved_images = {saved.id: saved for saved in studio.store.images()}
        assert "cannot be read" in saved_images[done.id].fault
        assert saved_images[done.id].request.prompt == "a pizza"
        assert saved_images[other.id].fault == ""
        number, _ = event_of(served, "gallery-look", {})
        assert '"success":true' in run_event(served, number, ["", "", False, 1], {})
        assert served.ask(f"/pictures/{done.id}.png")[0] == 200
        assert studio.store.zip_images(list(saved_images)).stat().st_size > 1000
        studio.store.save_preset("local", "bad", {})
        studio.store.execute("update presets set settings = ?", (JUNK[name],))
        studio.store.execute("insert into grids values ('local', ?, '[]')", (JUNK[name],))
        assert studio.store.presets("local") == {"bad": {}} or name in ("another version", "a number")
        studio.store.last_grid("local")
    finally:
        served.close()


def test_a_full_disk_is_said(tmp_path, pipe, monkeypatch):
    studio = Studio(tmp_path, lambda name: pipe)
    served = Served(studio, (), build(AppContext(studio)))

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device", "/srv/secret/file")

    try:
        studio.result(studio.submit(Request("a pizza")), timeout=60)
        monkeypatch.setattr("gradio.routes.upload_fn", full)
        body = b'--xyz\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nx\r\n--xyz--\r\n'
        status, answer = served.ask("/gradio_api/upload", body, content_type="multipart/form-data; boundary=xyz")
        assert (status, "disk of the server is full" in answer["detail"]) == (507, True)
        monkeypatch.setattr("gradio.processing_utils.save_pil_to_cache", full)
        number, _ = event_of(served, "gallery-look", {})
        answer = run_event(served, number, ["", "", False, 1], {})
        assert "disk of the server is full" in answer
        assert "secret" not in answer
    finally:
        served.close()


def test_errors_name_no_path_of_the_server(page):
    done = page.studio.result(page.studio.submit(Request("a pizza"), owner_of(KEYS[1])), timeout=60)
    page.studio.store.file(done.images[0].id).write_bytes(b"junk")
    status, answer = page.ask(f"/pictures/{done.images[0].id}.png", authorization=f"Bearer {KEYS[1]}")
    assert status == 400
    assert f"the image {done.images[0].id} could not be read" in answer["detail"]
    assert str(page.studio.store.folder) not in str(answer)
    answer = page.ask("/gradio_api/file=/etc/passwd", **log_in(page, "me", KEYS[1]))
    assert answer == (403, {"detail": "File not allowed"})
    texts = {
        "no file at /srv/a/x.png: send one": "no file at x.png: send one",
        "'/srv/data/.studio/page' is gone": "'page' is gone",
        "see https://huggingface.co/a/b and argen/emoji-sd": "see https://huggingface.co/a/b and argen/emoji-sd",
    }
    for text, expected in texts.items():
        assert error_message(ValueError(text)) == expected
    assert (
        error_message(FileNotFoundError(2, "No such file or directory", "/srv/x/page"))
        == "No such file or directory: page"
    )


def test_links_of_answers_open_without_a_key_for_a_while(page, monkeypatch):
    key = {"authorization": f"Bearer {KEYS[1]}"}
    body = {"prompt": "a pizza", "response_format": "url", "size": "64x64"}
    url = page.ask("/v1/images/generations", body, **key)[1]["data"][0]["url"].removeprefix(page.address)
    status, data = page.ask(url)
    assert (status, Image.open(io.BytesIO(data)).size) == (200, (64, 64))
    assert page.ask(url.replace(".png", ".webp"))[0] == 401  # another path
    assert page.ask(url.replace("expires=", "expires=9"))[0] == 401
    assert page.ask(url.partition("?")[0])[0] == 401
    assert page.ask(f"/api/jobs?{url.partition('?')[2]}")[0] == 401
    now = time.time()
    monkeypatch.setattr("argen.server.guard.time.time", lambda: now + 3700)
    assert page.ask(url)[0] == 401


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/sdapi", "/sdapi/v1", "/api", "/pictures", "/v1/images/none"])
def test_every_path_of_the_apis_has_one_form_of_error(page, path):
    status, answer = page.ask(path, authorization=f"Bearer {KEYS[1]}")
    assert (status, bool(answer["error"]["message"])) == (404, True)
