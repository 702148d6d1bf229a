"""What a server meets in use: made-up paths, other hosts, a full disk, signals, a second server, clients that leave."""

import base64
import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_server import KEYS, Served

from argen.jobs.queue import Studio
from argen.jobs.store import Store
from argen.request import Request
from argen.server.guard import FREE_TRIES, owner_of
from argen.ui.build import build
from argen.ui.context import AppContext


@pytest.fixture(scope="module", params=[(), KEYS], ids=["open", "keys"])
def page(request, tmp_path_factory, pipe):
    """A server with its page."""
    studio = Studio(tmp_path_factory.mktemp("page"), lambda name: pipe, folders=[Path("/nonexistent")])
    admin = owner_of(KEYS[0]) if request.param else None
    served = Served(studio, request.param, build(AppContext(studio, admin)))
    yield served
    served.close()


def log_in(page) -> dict[str, str]:
    """The headers of somebody who is at the page."""
    if not page.keys:
        return {}
    request = urllib.request.Request(
        f"{page.address}/login",
        f"username=me&password={KEYS[1]}".encode(),
        {"content-type": "application/x-www-form-urlencoded"},
    )
    with urllib.request.urlopen(request) as answer:
        cookies = [line.partition(";")[0] for line in answer.headers.get_all("set-cookie")]
    return {"cookie": "; ".join(cookies)}


def run_event(page, number: int, data: list, headers: dict) -> str:
    """What an event of the page answers, by its number."""
    body = {"fn_index": number, "data": data, "session_hash": f"s{number}", "event_data": None, "trigger_id": None}
    status, joined = page.ask("/gradio_api/queue/join", body, **headers)
    assert status == 200, joined
    request = urllib.request.Request(f"{page.address}/gradio_api/queue/data?session_hash=s{number}", headers=headers)
    text = ""
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            text += line.decode()
            if "process_completed" in text and text.endswith("\n"):
                return text
    return text


@pytest.mark.parametrize("shape", ["with meta", "without meta", "address"])
def test_no_event_takes_a_file_that_was_not_uploaded(page, shape):
    headers, config = log_in(page), None
    config = page.ask("/config", **headers)[1]
    components = {one["id"]: one for one in config["components"]}
    secrets = page.studio.store.private_folder / "studio.db", Path("/etc/passwd")
    tried = 0
    for secret in map(str, secrets):
        file = {"path": secret, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
        if shape == "without meta":
            file = {"path": secret}
        elif shape == "address":
            file = {"path": f"http://127.0.0.1:{page.port}/config", "meta": {"_type": "gradio.FileData"}}
        for event in config["dependencies"]:
            kinds = [components[one]["type"] for one in event["inputs"]]
            if not {"image", "file", "imageeditor", "gallery", "imageslider"} & set(kinds) or not event["backend_fn"]:
                continue
            values = {
                "imageeditor": {"background": file, "layers": [file], "composite": file},
                "gallery": [{"image": file}],
            }
            values |= {"image": file, "file": file, "imageslider": [file, file]}
            data = [values.get(kind, "a") for kind in kinds]
            answer = run_event(page, event["id"], data, headers)
            assert '"success":false' in answer, (kinds, answer)
            assert "was not uploaded" in answer
            assert "root:" not in answer
            assert secret not in answer
            tried += 1
    assert tried >= 14
    cached = [file for file in page.studio.store.exports.rglob("*") if file.is_file()]
    assert not any(b"root:" in file.read_bytes() or file.read_bytes()[:6] == b"SQLite" for file in cached)


def test_the_database_is_not_served(page):
    for name in ("studio.db", "studio.db-wal", "lock"):
        path = page.studio.store.private_folder.resolve() / name
        for route in ("gradio_api/file", "file"):
            assert page.ask(f"/{route}={path}", **log_in(page))[0] in (403, 404)


def test_every_path_passes_the_guard(page):
    headers = log_in(page)
    for path in (
        "/",
        "/config",
        "/gradio_api/info",
        "/gradio_api/queue/join",
        "/openapi.json",
        "/health",
        "/docs",
        "/none",
    ):
        assert page.ask(path, host="evil.example", **headers)[0] == 403
        assert page.ask(path, origin="https://evil.example", **headers)[0] == 403
        assert page.ask(path, origin="null", **headers)[0] == 403
        assert page.ask(path, host="[", **headers)[0] == 400
        assert page.ask(path, origin="http://[", **headers)[0] == 400
    assert page.ask(f"/gradio_api/file=http://127.0.0.1:{page.port}/config", **headers)[0] == 403
    with socket.create_connection(("127.0.0.1", page.port)) as plain:
        key = base64.b64encode(os.urandom(16)).decode()
        upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        plain.sendall(f"GET /x HTTP/1.1\r\nHost: evil.example\r\n{upgrade}Sec-WebSocket-Key: {key}\r\n\r\n".encode())
        assert b" 403 " in plain.recv(200)


def test_no_scripts_come_from_elsewhere(page):
    status, answer = page.ask("/docs", **log_in(page))
    assert status == 404 or b"cdn" not in (answer if isinstance(answer, bytes) else json.dumps(answer).encode())


def test_the_endpoints_are_not_on_the_page(page):
    """Their components lie in a column that nobody sees."""
    config = page.ask("/config", **log_in(page))[1]
    hidden = {one["id"] for one in config["components"] if one["props"].get("visible") is False}

    def below(node: dict, seen: bool) -> dict[int, bool]:
        seen = seen and node["id"] not in hidden
        return {node["id"]: seen} | {
            id: visible for child in node.get("children", []) for id, visible in below(child, seen).items()
        }

    visible = {id: seen for child in config["layout"]["children"] for id, seen in below(child, True).items()}
    named = [event for event in config["dependencies"] if event["api_visibility"] == "public"]
    assert len(named) == 6
    assert not any(visible.get(one, False) for event in named for one in (*event["inputs"], *event["outputs"]))


def test_gradio_client_finds_a_handful_of_endpoints(page, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    login = {"auth": ("somebody", KEYS[1])} if page.keys else {}
    client = gradio_client.Client(page.address, verbose=False, download_files=str(tmp_path), **login)
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/generate", "/edit", "/control", "/describe", "/reconstruct", "/models"}
    images, settings = client.predict("a pizza", seed=3, num_images=2, api_name="/generate")
    assert len(images) == 2
    assert settings[1]["seed"] == 4
    assert settings[1]["model"] == "argen/emoji-parti"
    mask = tmp_path / "mask.png"
    from PIL import Image

    white = Image.new("L", (256, 256))
    white.paste(255, (0, 0, 128, 256))
    white.save(mask)
    image = gradio_client.handle_file(images[0]["image"])
    edited, _ = client.predict(image, gradio_client.handle_file(str(mask)), "a robot", api_name="/edit")
    assert len(edited) == 1
    with pytest.raises(Exception, match="temperature is -1"):
        client.predict("a pizza", temperature=-1, api_name="/generate")
    assert "emoji-parti" in str(client.predict(api_name="/models"))


def test_only_the_first_key_does_what_concerns_all(page):
    context = AppContext(page.studio, owner_of(KEYS[0]))

    class Asking:
        username = owner_of(KEYS[1])

    with pytest.raises(PermissionError, match="only the holder of the server's first key"):
        context.check_admin(Asking)
    Asking.username = owner_of(KEYS[0])
    context.check_admin(Asking)


def test_wrong_keys_are_answered_later_and_later(tmp_path, pipe):
    served = Served(Studio(tmp_path, lambda name: pipe), KEYS)
    try:
        started = time.monotonic()
        for _ in range(FREE_TRIES + 3):
            assert served.ask("/v1/models", authorization="Bearer wrong")[0] == 401
        assert time.monotonic() - started > 1.5  # 0.25 + 0.5 + 1 seconds
        with ThreadPoolExecutor(24) as pool:
            statuses = set(pool.map(lambda _: served.ask("/v1/models", authorization="Bearer no")[0], range(24)))
        assert statuses == {401, 429}
        assert served.ask("/v1/models", authorization=f"Bearer {KEYS[0]}")[0] == 200
    finally:
        served.close()


BOUNDLESS = {
    "steps": ("/api/jobs", {"steps": 10**9, "model": "argen/emoji-xar"}),
    "parts of steps": ("/api/jobs", {"steps": [10**9, 10], "model": "argen/emoji-xar"}),
    "lantern_k": ("/api/jobs", {"lantern_k": 10**12, "sampler": "lantern"}),
    "sampler_args": ("/api/jobs", {"sampler_args": {"k": 10**12}, "sampler": "lantern"}),
    "typed": ("/v1/images/generations", {"sampler": "jacobi:window=1000000000"}),
    "top_k": ("/v1/images/generations", {"top_k": 10**12}),
    "num_tokens": ("/v1/images/generations", {"num_tokens": 10**12}),
    "num_beams": ("/api/jobs", {"num_beams": 10**12}),
    "lantern_lambda": ("/api/jobs", {"lantern_lambda": 1e300, "sampler": "lantern"}),
    "temperature": ("/api/jobs", {"temperature": 1e300}),
    "a number of 400 digits": ("/api/jobs", {"top_k": 10**400}),
    "a real one of 400 digits": ("/api/jobs", {"temperature": 10**400}),
    "a list for a seed": ("/api/jobs", {"seed": [5]}),
    "a list for top_k": ("/api/jobs", {"top_k": [5]}),
    "a list for num_images": ("/api/jobs", {"num_images": [2]}),
    "size": ("/sdapi/v1/txt2img", {"width": 10**9, "height": 10**9}),
}


@pytest.mark.parametrize("name", list(BOUNDLESS))
def test_no_number_takes_the_memory(page, name):
    path, body = BOUNDLESS[name]
    key = {"authorization": f"Bearer {KEYS[0]}"} if page.keys else {}
    started = time.monotonic()
    status, answer = page.ask(path, {"prompt": "a", **body}, **key)
    assert status == 400
    assert "expected" in answer["error"]["message"]
    assert time.monotonic() - started < 2


def test_300_clients_wait_without_a_thread(tmp_path, pipe):
    served = Served(Studio(tmp_path, lambda name: pipe))
    served.studio.pause()
    body = json.dumps({"prompt": "a pizza"}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    waiting = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(300)]
    try:
        for one in waiting:
            one.sendall(head.encode() + body)
        end = time.monotonic() + 60
        while served.studio.store.count("waiting") < 300:
            assert time.monotonic() < end
            time.sleep(0.1)
        served.ask("/api/jobs")
        started = time.monotonic()
        assert len(served.ask("/api/jobs")[1]["jobs"]) == 200  # which is what it lists at most
        assert time.monotonic() - started < 0.5
        assert threading.active_count() < 100
        for one in waiting:  # they all go away
            one.close()
        end = time.monotonic() + 60
        while served.studio.store.count("waiting"):
            assert time.monotonic() < end
            time.sleep(0.2)
    finally:
        served.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_job(tmp_path, pipe, stream):
    served = Served(Studio(tmp_path, lambda name: pipe))
    served.studio.pause()
    body = json.dumps({"prompt": "a pizza", "n": 8, "stream": stream, "partial_images": 1}).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as plain:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        plain.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while not (jobs := served.ask("/api/jobs")[1]["jobs"]):
            time.sleep(0.05)
    stays = served.ask("/api/jobs", {"prompt": "a pizza"})[1]["id"]  # queued to stay: nobody waits for it
    try:
        end = time.monotonic() + 20
        while served.studio.progress(jobs[0]["id"]).state != "cancelled":
            assert time.monotonic() < end
            time.sleep(0.1)
        served.studio.pause(False)
        assert served.studio.result(stays, timeout=60).state == "done"
    finally:
        served.close()


def test_a_full_disk_fails_the_job_and_not_the_worker(tmp_path, pipe, monkeypatch):
    studio = Studio(tmp_path, lambda name: pipe)
    update, full = studio.store.update_job, threading.Event()

    def updated(id, **values):
        if full.is_set():
            raise sqlite3.OperationalError("database or disk is full")
        update(id, **values)

    def saved(*args):
        full.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(studio.store, "update_job", updated)
    monkeypatch.setattr("argen.jobs.store.save_images", saved)
    monkeypatch.setattr("argen.jobs.queue.RETRY_AFTER", 0.1)
    id = studio.submit(Request("a pizza"))
    try:
        failed = studio.result(id, timeout=60)  # told although nothing can be written
        assert failed.state == "failed"
        assert "disk of the server is full" in failed.error
        monkeypatch.undo()
        full.clear()
        assert studio.alive
        assert studio.result(studio.submit(Request("a pizza")), timeout=60).state == "done"
        assert studio.progress(id).state == "failed"
        assert not list(tmp_path.glob(".*.png*"))
    finally:
        studio.close()


def test_a_worker_that_died_is_said(tmp_path, pipe):
    served = Served(Studio(tmp_path, lambda name: pipe))
    try:
        assert served.ask("/health") == (200, {"status": "ok", "paused": False, "waiting": 0})
        with served.studio.changed:
            served.studio.closing = True
            served.studio.changed.notify_all()
        served.studio.worker.join(timeout=20)
        assert served.ask("/health")[0] == 503
    finally:
        served.close()


def test_a_folder_has_one_server(tmp_path):
    store = Store(tmp_path / "a")
    with pytest.raises(ValueError, match="in use by another argen"):
        Store(tmp_path / "a")
    store.close()
    Store(tmp_path / "a").close()
    assert (tmp_path / "a" / ".studio").stat().st_mode & 0o077 == 0
    assert (tmp_path / "a" / ".studio" / "studio.db").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("fault", ["corrupt", "another table", "folder", "file"])
def test_a_broken_folder_gets_one_line(tmp_path, fault):
    studio_folder = tmp_path / "a" / ".studio"
    if fault == "file":
        (tmp_path / "a").write_text("x")
    else:
        studio_folder.mkdir(parents=True)
    if fault == "corrupt":
        (studio_folder / "studio.db").write_bytes(b"SQLite format 3\0" + os.urandom(8000))
    elif fault == "another table":
        with sqlite3.connect(studio_folder / "studio.db") as database:
            database.execute("create table jobs (x)")
    elif fault == "folder":
        (studio_folder / "studio.db").mkdir()
    command = [sys.executable, "-m", "argen", "ui", "--port", "0", "--data-dir", str(tmp_path / "a")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("argen ui: error:")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    assert "data-dir" in lines[0]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_job_that_runs(tmp_path, sent):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "argen", "ui", "--port", str(port), "--data-dir", str(tmp_path / "a")]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        address, end = f"http://127.0.0.1:{port}/api/jobs", time.monotonic() + 120
        body = {"prompt": "a pizza", "num_images": 64, "sampler": "sequential"}
        while True:
            try:
                request = urllib.request.Request(
                    address, json.dumps(body).encode(), {"content-type": "application/json"}
                )
                with urllib.request.urlopen(request) as answer:
                    id = json.loads(answer.read())["id"]
                break
            except OSError:
                assert time.monotonic() < end, server.poll()
                time.sleep(0.3)
        while True:
            with urllib.request.urlopen(f"{address}/{id}") as answer:
                now = json.loads(answer.read())
            assert now["state"] in ("waiting", "running")
            if now["decided"] > 2:
                break
            time.sleep(0.1)
        server.send_signal(sent)
        _, errors = server.communicate(timeout=60)
        assert "Traceback" not in errors
    finally:
        server.kill()
    store = Store(tmp_path / "a")
    assert store.job(id)["state"] == "waiting"
    assert store.resume_file(id).is_file()
    store.close()


def test_half_open_requests_are_ended(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr("argen.server.app.HEADERS_TIMEOUT", 0.5)
    monkeypatch.setattr("argen.server.guard.BODY_TIMEOUT", 0.5)
    served = Served(Studio(tmp_path, lambda name: pipe))
    try:
        for sent in (b"", b"GET / HT", b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
            with socket.create_connection(("127.0.0.1", served.port)) as plain:
                plain.sendall(sent)
                plain.settimeout(10)
                with contextlib.suppress(ConnectionResetError):
                    assert plain.recv(100) == b""
        with socket.create_connection(("127.0.0.1", served.port)) as plain:
            plain.sendall(b"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
            plain.settimeout(10)
            assert b" 408 " in plain.recv(200)
    finally:
        served.close()
