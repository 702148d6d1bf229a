"""Many clients at once: ``python -m argen.stress`` starts a server, kills it in the middle, and counts what is lost.

Each of the clients submits its jobs over HTTP and waits for them; meanwhile the page is loaded again and again. In the middle the
server is killed and started anew. At the end each job must have the picture of its own seed, and no other.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
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
        command = [sys.executable, "-m", "argen.cli", "ui", "--port", str(self.port), "--data-dir", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.ask("/api/jobs")

    def ask(self, path: str, body: dict | None = None):
        """JSON, or bytes; a server that is not there yet is waited for."""
        end = time.monotonic() + PATIENCE
        data = None if body is None else json.dumps(body).encode()
        while True:
            asked = urllib.request.Request(self.address + path, data, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(asked, timeout=30) as found:
                    text = found.read()
                return json.loads(text) if found.headers["content-type"] == "application/json" else text
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def memory(self) -> float:
        """Resident, in MB (Linux)."""
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
    top = argparse.ArgumentParser(prog="python -m argen.stress", description=__doc__)
    top.add_argument("--clients", type=int, default=8)
    top.add_argument("--jobs", type=int, default=200, help="of all clients together (default: 200)")
    args = top.parse_args()
    with tempfile.TemporaryDirectory() as work:
        print(json.dumps(run(Server(Path(work) / "pictures"), args.clients, args.jobs // args.clients), indent=1))
    return 0


def run(server: Server, clients: int, each: int) -> dict:
    """The figures; `lost` and `mixed` must be 0."""
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
        running = [pool.submit(client, server, number, each, kill) for number in range(clients)]
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
    told = {id: server.ask(f"/api/jobs/{id}") for id in seeds}
    lost = [id for id, job in told.items() if job["state"] != "done" or len(job["pictures"]) != 1]
    for id in lost:
        print(
            f"{id} is {told[id]['state']} with {len(told[id]['pictures'])} pictures {told[id]['error']}",
            file=sys.stderr,
        )
    files = {id: server.folder / f"{job['pictures'][0]}.png" for id, job in told.items() if id not in lost}
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


if __name__ == "__main__":
    sys.exit(main())
