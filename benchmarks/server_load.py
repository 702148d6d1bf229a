"""Many clients at once, and faults: start a server, kill it in the middle, and count what is lost.

    pip install . && python benchmarks/server_load.py --jobs 200 --clients 8

Each of the clients submits its jobs over HTTP and waits for them; meanwhile the page is loaded again and again. In the middle the
server is killed and started again. At the end each job must have the image of its own seed, and no other. Then faults
are tried: made-up paths and hosts, huge numbers, 300 clients that wait and leave, a full disk, files deleted by hand, a second server
on the same folder, SIGTERM.
"""

import argparse
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from argen.metadata import read_request

PATIENCE = 120.0  # seconds for a server to answer


class Server:
    """`argen ui` in a process of its own."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.address = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "argen", "ui", "--port", str(self.port), "--data-dir", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.ask("/api/jobs")

    def ask(self, path: str, body: dict | None = None):
        """Send a request -> JSON, or bytes; waits for a server that is still starting."""
        end = time.monotonic() + PATIENCE
        data = None if body is None else json.dumps(body).encode()
        while True:
            request = urllib.request.Request(self.address + path, data, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    text = response.read()
                return json.loads(text) if response.headers["content-type"] == "application/json" else text
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def memory(self) -> float:
        """Return the resident memory in MB (Linux)."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def client(server: Server, number: int, jobs: int, kill: threading.Barrier) -> dict[str, int]:
    """Submit the jobs of one client, half before the server is killed -> its ids and their seeds."""
    seeds = {}
    for index in range(jobs):
        if index == jobs // 2:
            kill.wait()
            kill.wait()  # until the server is there again
        seed = number * 10_000 + index
        seeds[server.ask("/api/jobs", {"prompt": "a pizza", "seed": seed})["id"]] = seed
    return seeds


def main() -> int:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("--clients", type=int, default=8)
    top.add_argument("--jobs", type=int, default=200, help="of all clients together (default: 200)")
    args = top.parse_args()
    with tempfile.TemporaryDirectory() as work:
        figures = run(Server(Path(work) / "pictures"), args.clients, args.jobs // args.clients)
        survived = faults(Server(Path(work) / "faults"))
    print(json.dumps(figures | {"faults survived": survived}, indent=1))
    return 0 if not figures["lost"] and not figures["mixed"] and all(survived.values()) else 1


def run(server: Server, clients: int, jobs_per_client: int) -> dict:
    """Run the load test -> its figures; `lost` and `mixed` must be 0."""
    answers, over, kill = [], threading.Event(), threading.Barrier(clients + 1)

    def visit() -> None:
        while not over.wait(0.25):
            started = time.perf_counter()
            try:
                with urllib.request.urlopen(server.address, timeout=30) as page:
                    page.read()
                answers.append(time.perf_counter() - started)
            except OSError:
                pass  # while it is dead

    visitor = threading.Thread(target=visit)
    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, server, number, jobs_per_client, kill) for number in range(clients)]
        kill.wait()
        server.kill()
        server.start()
        visitor.start()
        kill.wait()
        seeds = {id: seed for one in running for id, seed in one.result().items()}
    memory, jobs = [], server.ask("/api/jobs")["jobs"]
    while jobs:
        memory.append(server.memory())
        time.sleep(1)
        jobs = server.ask("/api/jobs")["jobs"]
    seconds = time.monotonic() - started
    over.set()
    visitor.join()
    jobs_by_id = {id: server.ask(f"/api/jobs/{id}") for id in seeds}
    lost = [id for id, job in jobs_by_id.items() if job["state"] != "done" or len(job["images"]) != 1]
    for id in lost:
        print(
            f"{id} is {jobs_by_id[id]['state']} with {len(jobs_by_id[id]['images'])} images {jobs_by_id[id]['error']}",
            file=sys.stderr,
        )
    files = {id: server.folder / f"{job['images'][0]}.png" for id, job in jobs_by_id.items() if id not in lost}
    mixed = [id for id, file in files.items() if read_request(file).seed != seeds[id]]
    server.kill()
    answers.sort()
    tenth = max(1, len(memory) // 10)
    return {
        "jobs": len(seeds),
        "lost": len(lost),
        "mixed": len(mixed),
        "seconds": round(seconds, 1),
        "page, median seconds": round(answers[len(answers) // 2], 3),
        "page, slowest of all": round(answers[-1], 3),
        "pages": len(answers),
        "memory after a tenth, MB": round(memory[tenth]),
        "memory at the end, MB": round(memory[-1]),
    }


def faults(server: Server) -> dict[str, bool]:
    """Check which faults the server survives."""
    results = {name: bool(check(server)) for name, check in FAULTS.items()}
    server.kill()
    return results


def status(server: Server, path: str, body: dict | None = None, **headers: str) -> int:
    """Return the status of a response."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.address + path, data, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def until(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    """Whether a condition becomes true in time."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.2)
    return bool(value)


def draw(server: Server) -> dict:
    """Submit a job and wait for it."""
    id = server.ask("/api/jobs", {"prompt": "a pizza"})["id"]
    until(lambda: server.ask(f"/api/jobs/{id}")["state"] not in ("waiting", "running"))
    return server.ask(f"/api/jobs/{id}")


def paths(server: Server) -> bool:
    """No event of the page takes a file that was not uploaded."""
    config = server.ask("/config")
    kinds = {one["id"]: one["type"] for one in config["components"]}
    secret = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    for event in config["dependencies"]:
        inputs = [kinds[one] for one in event["inputs"]]
        if event["backend_fn"] and {"file", "image"} & set(inputs):
            session = f"s{event['id']}"
            body = {"fn_index": event["id"], "session_hash": session}
            server.ask(
                "/gradio_api/queue/join",
                body | {"data": [secret if kind in ("file", "image") else "" for kind in inputs]},
            )
            with urllib.request.urlopen(f"{server.address}/gradio_api/queue/data?session_hash={session}") as answer:
                if any(b'"success":true' in line for line in answer):
                    return False
    return not any(b"hostname" in file.name.encode() for file in server.folder.rglob("*"))


def hosts(server: Server) -> bool:
    """No path answers another host, or another site."""
    headers_to_refuse = ({"host": "evil.example"}, {"origin": "https://evil.example"})
    addresses = ("/", "/config", "/gradio_api/info", "/openapi.json", "/api/jobs", "/health")
    return all(status(server, path, **headers) == 403 for path in addresses for headers in headers_to_refuse)


def numbers(server: Server) -> bool:
    """A huge number is refused before memory is allocated for it."""
    before = server.memory()
    settings = (
        {"steps": 10**9, "model": "argen/emoji-xar"},
        {"lantern_k": 10**12, "sampler": "lantern"},
        {"num_tokens": 10**12},
    )
    refused = all(status(server, "/api/jobs", {"prompt": "a", **setting}) == 400 for setting in settings)
    return refused and server.memory() < before + 100


def crowd(server: Server, clients: int = 300) -> bool:
    """While many clients wait, the queue is answered within half a second; their jobs end when they leave."""
    body = json.dumps({"prompt": "a pizza", "n": 10}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    waiting = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(clients)]
    for connection in waiting:
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
    all_wait = until(lambda: server.ask("/health")["waiting"] >= clients - 5)
    started = time.monotonic()
    server.ask("/api/jobs")
    quick = time.monotonic() - started < 0.5
    for connection in waiting:
        connection.close()
    return all_wait and quick and until(lambda: server.ask("/health")["waiting"] == 0)


def full_disk(server: Server) -> bool:
    """Jobs fail while the disk is full, and work again afterwards."""
    before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    refused = status(server, "/api/jobs", {"prompt": "a pizza"}) in (400, 507)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, before)
    return refused and draw(server)["state"] == "done"


def deleted_files(server: Server) -> bool:
    """An image deleted by hand is reported as missing, and nothing else is lost."""
    id = draw(server)["images"][0]
    (server.folder / f"{id}.png").unlink()
    return status(server, f"/pictures/{id}.png") == 404 and draw(server)["state"] == "done"


def second_server(server: Server) -> bool:
    """A second server on the same folder says so."""
    command = [sys.executable, "-m", "argen", "ui", "--port", "0", "--data-dir", str(server.folder)]
    other = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    return other.returncode == 2 and "in use by another argen" in other.stderr


def terminated(server: Server) -> bool:
    """SIGTERM keeps the running job; the server resumes it after a restart."""
    id = server.ask("/api/jobs", {"prompt": "a pizza", "num_images": 64, "sampler": "sequential"})["id"]
    until(lambda: server.ask(f"/api/jobs/{id}")["decided"] > 2)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(timeout=60)
    saved = (server.folder / ".studio" / "jobs" / f"{id}.npz").is_file()
    server.start()
    return saved and until(lambda: server.ask(f"/api/jobs/{id}")["state"] == "done", 300)


FAULTS = {
    "paths": paths,
    "hosts": hosts,
    "numbers": numbers,
    "a crowd": crowd,
    "a full disk": full_disk,
    "deleted files": deleted_files,
    "a second server": second_server,
    "SIGTERM": terminated,
}


if __name__ == "__main__":
    sys.exit(main())
