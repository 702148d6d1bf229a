"""Seconds per image of whole generators, from prompt to pixels, interleaved.

pip install . && python benchmarks/generators.py argen/emoji-llamagen argen/emoji-xar --batches 8
"""

import argparse
import sys
import time

import torch

from argen.command import Parser, guarded, load_model

SHIPPED = ["argen/emoji-llamagen", "argen/emoji-parti", "argen/emoji-xar", "argen/emoji-flextok-ar"]


def compare(args: argparse.Namespace) -> None:
    """Print a table of seconds per image, and the ratio to the first."""
    pipes = {name: load_model(name, args.device, "generator") for name in args.models}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    print(f"{'':34} {'batch':>5} {'seconds per image':>18} {'of the first':>13}   best of {args.rounds}")
    for batch in args.batches:
        best = dict.fromkeys(pipes, float("inf"))
        for index in range(args.rounds):
            for name, pipe in pipes.items():
                generator = torch.Generator().manual_seed(index)
                started = time.perf_counter()
                pipe(args.prompt, batch, generator=generator)  # its images are on the CPU, so it is over
                best[name] = min(best[name], (time.perf_counter() - started) / batch)
        first = next(iter(best.values()))
        for name, seconds in best.items():
            print(f"{name:34} {batch:5} {seconds:18.3f} {seconds / first:13.2f}", flush=True)


def main() -> int:
    parser = Parser(prog="python benchmarks/generators.py", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=SHIPPED, metavar="ID", help=f"(default: {' '.join(SHIPPED)})")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="B")
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    return guarded("benchmarks/generators.py", compare, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
