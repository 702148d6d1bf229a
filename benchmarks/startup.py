"""How long argen takes to start, beside Python and `import torch`: each command in a process of its own, interleaved.

    pip install . && python benchmarks/startup.py --rounds 5

Prints a table: the medians of the seconds by the clock and of the seconds of work of the processor, which other programs disturb less
(0 on Windows), and how many times `import torch` each is. The first round, which fills the caches of the disk, is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

TORCH, GENERATE = "import torch", 'argen generate "a pizza"'
NAMES = ("python", TORCH, "import argen", "argen --help", "argen models", GENERATE)


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the commands by their names; `folder` is for their output."""
    argen = [sys.executable, "-m", "argen"]
    generate = ["generate", "a pizza", "-o", str(folder / "pizza.png"), "--json"]
    lines = [
        [sys.executable, "-c", "pass"],
        [sys.executable, "-c", "import torch"],
        [sys.executable, "-c", "import argen"],
        [*argen, "--help"],
        [*argen, "models"],
        [*argen, *generate],
    ]
    return dict(zip(NAMES, lines, strict=True))


def timed(line: list[str]) -> tuple[float, float, str]:
    """Run a command -> its wall-clock seconds, CPU seconds and output."""
    before, started = os.times(), time.perf_counter()
    process = subprocess.run(line, check=True, capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, os.times()
    work = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, work, process.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each command is started")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}: expected 1 or more")

    clock, work, drawing = {name: [] for name in NAMES}, {name: [] for name in NAMES}, []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds + 1):
            for name, line in commands(Path(folder)).items():
                seconds, processor, printed = timed(line)
                if turn:
                    clock[name].append(seconds)
                    work[name].append(processor)
                if turn and name == GENERATE:
                    drawing.append(json.loads(printed)["seconds"])

    print(f"{'':28}{'clock':>8}{'ratio':>8}{'work':>8}{'ratio':>8}")
    torch = median(clock[TORCH]), median(work[TORCH])
    rows = {name: (median(clock[name]), median(work[name])) for name in NAMES}
    rows["  the same without drawing"] = tuple(value - median(drawing) for value in rows[GENERATE])
    for name, (seconds, processor) in rows.items():
        times = processor / torch[1] if torch[1] else 0
        print(f"{name:28}{seconds:>8.2f}{seconds / torch[0]:>8.2f}{processor:>8.2f}{times:>8.2f}")


if __name__ == "__main__":
    main()
