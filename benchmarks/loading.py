"""What reading images costs a training on own images: share of a step, and memory against the number of images.

    pip install '.[train]' && python benchmarks/loading.py --num 1000 10000 --steps 60

Makes folders of captioned squares, and trains a small LlamaGen on each in a process of its own, after a first run has filled the cache of
token ids. "read" is the time that batches take to be drawn and read in their thread, "waited" that for which the step had to wait for them.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from argen.command import Parser, guarded

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220)}


def make_images(folder: Path, count: int) -> None:
    """`count` PNG files of 64 x 64 pixels, all different, and a table of their captions."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as table:
        for number in range(count):
            word = list(COLOURS)[number % len(COLOURS)]
            pixels = np.full((64, 64, 3), 255, np.uint8)
            pixels[10:50, 10:50] = COLOURS[word]
            pixels[chance.integers(64, size=20), chance.integers(64, size=20)] = chance.integers(0, 256, (20, 3))
            Image.fromarray(pixels).save(folder / f"{number:05}.png")
            table.write(json.dumps({"file_name": f"{number:05}.png", "text": f"a {word} square"}) + "\n")


def measure(folder: Path, out: Path, steps: int, batch: int, results: multiprocessing.Queue) -> None:
    """Train for `steps`; puts seconds of all steps, of reading and of waiting, and the peak memory in MB."""
    from concurrent.futures import Future

    from argen.registry import recipes
    from argen.train.loop import Training
    from argen.train.own.options import OwnOptions
    from argen.train.own.run import run

    spent = {"read": 0.0, "waited": 0.0, "step": 0.0}

    def timed(name, function):
        def wrapper(*arguments, **named):
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] += time.perf_counter() - start

        return wrapper

    Training.read, Training.step = timed("read", Training.read), timed("step", Training.step)
    Future.result = timed("waited", Future.result)
    options = OwnOptions(
        images=str(folder),
        size="mini",
        tokenizer="argen/emoji-vitvqgan",
        text_encoder="argen/emoji-clip",
        batch_size=batch,
        evaluate_every=10**6,
    )
    run(recipes["llamagen"], options, out, steps=steps)
    results.put(spent | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000})


def run_all(args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        for count in args.num:
            folder = Path(place) / str(count)
            make_images(folder, count)
            for name in ("first", "measured"):  # the first fills the cache
                results = context.Queue()
                job = (folder, Path(place) / f"{name}{count}", args.steps, args.batch, results)
                process = context.Process(target=measure, args=job)
                process.start()
                spent = results.get()
                process.join()
            shares = {part: spent[part] / spent["step"] for part in ("read", "waited")}
            print(
                f"{count} images: {1000 * spent['step'] / args.steps:.0f} ms a step of {args.batch}, of which reading {shares['read']:.1%}, "
                f"waiting for it {shares['waited']:.1%}; {spent['peak']:.0f} MB at most"
            )


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, nargs="+", default=[1000, 10000], help="images of each folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    sys.exit(guarded("loading", run_all, parser.parse_args()))
