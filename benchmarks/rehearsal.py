"""Published models at their full sizes without their weights: files of random numbers, loaded and run by argen's own command.

    pip install ".[openvino,seed]" && python benchmarks/rehearsal.py FoundationVision/LlamaGen:c2i_3B_384 --as int8

For each id, files in the published layout and precision are written into a hub cache of their own (`random_weights.py`), and deleted after it; then
`argen generate`, or `tokenize` and `detokenize`, runs on them offline in a process of its own, once for each setting. It prints a table:

- files: what was written, in GB;
- load: seconds from the start of the process until the model is there;
- peak: the most memory of the process in GB as the system counts it (``ru_maxrss``), pages of mapped files included; in brackets the most without them, which
  is what cannot be given back: while loading / while running;
- first: seconds until the first two tokens are there, with the text encoder and what is compiled;
- s/image: seconds of an image once the model is loaded and these two are there, from the first `--tokens` tokens, the sampler `sequential`, and decoding. Of a
  tokenizer the seconds of `tokenize` and `detokenize`, loading excepted; "> 60" where `--limit` stopped it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from random_weights import UNCLIP, make

from argen.command import Parser, guarded
from argen.hub.cards import Card, all_cards

PRECISIONS = ("fp32", "bf16", "int8", "int4")
HEADER = f"{'':44} {'as':14} {'files':>6} {'load':>6} {'peak GB':>18} {'first':>6} {'s/image':>8}"
MEASURED = Path(__file__).with_name("measured.py")


def options(setting: str) -> list[str]:
    """Options of `argen generate` for a setting, e.g. ``int8+offload``.

    Raises:
        ValueError: there is no such setting.
    """
    precision, plus, offload = setting.partition("+")
    if precision not in PRECISIONS or (plus and offload != "offload"):
        raise ValueError(f"as is {setting!r}: expected some of {', '.join(PRECISIONS)}, each with or without +offload")
    chosen = ["--quantize" if precision.startswith("int") else "--dtype", precision]
    return chosen + (["--offload", "model"] if offload else [])


def commands(card: Card, setting: str, folder: Path) -> list[list[str]]:
    """The commands that are measured: one to draw, or two of a tokenizer."""
    photo, tokens = folder / "photo.png", folder / "photo.npz"
    if card.kind == "tokenizer":
        arguments = options(setting)
        return [
            ["tokenize", str(photo), "--tokenizer", card.id, "-o", str(tokens), *arguments],
            ["detokenize", str(tokens), "-o", str(folder / "again.png"), *arguments],
        ]
    prompt = "class:golden retriever" if "class" in card.takes else "a red apple"
    line = ["generate", prompt, "--model", card.id, "-o", str(folder / "image.png"), *options(setting)]
    if "control" in card.takes:
        line += ["--control", str(photo), "--size", "512x512"]
    if card.grid or "control" in card.takes or not card.target.startswith("argen.pipelines.xar"):
        line += ["--sampler", "sequential"]
    return [line]


def measured(words: list[str], args: argparse.Namespace, cache: Path) -> dict:
    """Run a command on the files of a cache -> what it took.

    Raises:
        RuntimeError: it failed; with its last line.
    """
    facts = cache / "facts.json"
    facts.unlink(missing_ok=True)
    places = {"HF_HOME": cache, "HF_HUB_CACHE": cache / "hub", "TORCH_HOME": cache / "torch"}
    prompts = tempfile.mkdtemp(dir=cache)  # so that no text has been encoded before
    own = {"HF_HUB_OFFLINE": "1", "ARGEN_CACHE": prompts, "ARGEN_UNCLIP": UNCLIP}
    line = [sys.executable, str(MEASURED), str(facts), str(args.tokens), str(args.limit), *words, "--device", "cpu"]
    with tempfile.TemporaryFile("w+") as errors:
        environment = os.environ | {name: str(place) for name, place in places.items()} | own
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode or not facts.is_file():
        raise RuntimeError(f"exit code {process.returncode}: {said[-1] if said else 'it said nothing'}")
    unit = 1 if sys.platform == "darwin" else 1024
    return json.loads(facts.read_text()) | {"peak": usage.ru_maxrss * unit}


def row(card: Card, setting: str, results: list[dict], written: int) -> str:
    """A row of the table."""
    peak = max(result["peak"] for result in results)
    held = [max(result.get(f"{stage}_bytes", 0) for result in results) for stage in ("load", "run")]
    took, load = results[0], max(result.get("load", result.get("stopped", 0)) for result in results)
    first = f"{took['first']:.1f}" if "first" in took else ""
    if stopped := [result["stopped"] - result.get("load", 0) for result in results if "stopped" in result]:
        seconds = f"> {sum(stopped):.0f}"
    elif "write" in took:
        rest = took["tokens"] - took["first_tokens"]
        each = (took["write"] - took["first"]) / rest if rest else took["first"]
        seconds = f"{each * (took['all_tokens'] - took['first_tokens']) + took['decode']:.1f}"
    else:
        seconds = f"{sum(result['all'] - result['load'] for result in results):.1f}"
    memory = f"{peak / 1e9:.2f} ({held[0] / 1e9:.2f}/{held[1] / 1e9:.2f})"
    return f"{card.id:44} {setting:14} {written / 1e9:6.2f} {load:6.1f} {memory:>18} {first:>6} {seconds:>8}"


def rehearse(args: argparse.Namespace) -> None:
    """Print the table."""
    cards = all_cards()
    for id in args.models:
        if id not in cards or cards[id].repo is None or cards[id].kind not in ("generator", "tokenizer"):
            raise ValueError(f"{id} is none of the published generators and tokenizers: see argen models")
    for setting in args.settings:
        options(setting)
    print(HEADER, flush=True)
    for id in args.models:
        cache = Path(tempfile.mkdtemp(prefix="rehearsal-", dir=args.cache)) if not args.keep else args.cache
        try:
            cache.mkdir(parents=True, exist_ok=True)
            photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(photo).resize((512, 512), Image.Resampling.BICUBIC).save(cache / "photo.png")
            make(id, cache)
            written = sum(path.stat().st_size for path in (*cache.glob("hub/**/*"), *cache.glob("torch/**/*")))
            for setting in args.settings:
                try:
                    lines = commands(cards[id], setting, cache)
                    print(
                        row(cards[id], setting, [measured(line, args, cache) for line in lines], written),
                        flush=True,
                    )
                except RuntimeError as error:
                    print(f"{id:44} {setting:14} {error}", flush=True)
        finally:
            if not args.keep:
                shutil.rmtree(cache)


def main() -> int:
    parser = Parser(prog="python benchmarks/rehearsal.py", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="ID", help="published ids, see argen models")
    parser.add_argument("--as", nargs="+", dest="settings", default=["fp32"], metavar="SETTING")
    parser.add_argument(
        "--tokens", type=int, default=16, metavar="N", help="tokens that are drawn; 0: all (default: 16)"
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="S", help="seconds after which a command stops; 0: never (default: 0)"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="where files are written (default: the temporary folder)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the files in --cache, and use those that are there")
    args = parser.parse_args()
    if args.keep and args.cache is None:
        parser.error("--keep needs --cache, the folder to keep files in")
    return guarded("benchmarks/rehearsal.py", rehearse, args)


if __name__ == "__main__":
    sys.exit(main())
