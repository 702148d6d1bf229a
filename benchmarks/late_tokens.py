"""How much slower the last tokens of a large image are than the first, as the cache of keys and values grows.

    pip install ".[openvino]" && python benchmarks/late_tokens.py --model B L

Milliseconds of a pass of one token with guidance, at token 64 and at later ones of an image of 48 x 48 tokens, of a LlamaGen with random
weights. `read` is the least ratio that memory allows: of the bytes of weights and cache that a pass at token 2,304 reads to those at 64.
"""

import argparse
import copy
import importlib.util
import sys
import time
from statistics import median

import torch

from argen.command import Parser, guarded
from argen.hub.loading import compile_decoding
from argen.models.llamagen import SIZES, LlamaGen
from argen.models.quantized import Quantization, quantize
from argen.models.session import LlamaGenSession

PLACES = (64, 560, 1100, 2304)
GRID, PASSES, CHUNK = 48, 13, 256


def milliseconds(model: LlamaGen) -> list[float]:
    """Medians of `PASSES` passes that end at each of `PLACES`; what lies between is written in large passes."""
    condition = torch.tensor([1, model.config.classes])
    session = LlamaGenSession(model, model.cls_embedding(condition), torch.ones(2, 1, dtype=torch.bool), guided=True)
    done, medians = 0, []
    for place in PLACES:
        while done < place - PASSES:
            count = min(CHUNK, place - PASSES - done)
            session.forward(torch.zeros(1, count, dtype=torch.long), torch.arange(done, done + count))
            done += count
        times = []
        for done in range(place - PASSES, place):
            started = time.perf_counter()
            session.forward(torch.zeros(1, 1, dtype=torch.long), torch.tensor([done]))
            times.append(time.perf_counter() - started)
        done, medians = place, [*medians, 1e3 * median(times)]
    return medians


def least_ratio(model: LlamaGen, bits: int) -> float:
    """Bytes of weights and of both rows' cache in float32, at the last of `PLACES` and at the first."""
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear)) * bits / 8
    token = 2 * 2 * model.config.depth * model.config.dim * 4
    return (weights + PLACES[-1] * token) / (weights + PLACES[0] * token)


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """Print a row for each model and way of decoding."""
    print(f"{'':20}" + "".join(f"{f'at {place:,}':>12}" for place in PLACES) + f"{'ratio':>10}{'read':>8}")
    for size in args.model:
        torch.manual_seed(0)
        model = LlamaGen(grid=GRID, classes=1000, **SIZES[size]).eval()
        ways = {f"{size} argen": (model, 32)}
        if importlib.util.find_spec("openvino"):
            for bits in (32, 8):
                other = copy.deepcopy(model)
                if bits == 8:
                    quantize(other, Quantization(8))
                compile_decoding(other)
                ways[f"{size} compiled" + " int8" * (bits == 8)] = other, bits
        rounds: dict[str, list[list[float]]] = {}
        for _ in range(1 + args.rounds):  # the first compiles
            for name, (network, _) in ways.items():
                rounds.setdefault(name, []).append(milliseconds(network))
        for name, (_, bits) in ways.items():
            times = [median(each) for each in zip(*rounds[name][1:], strict=True)]
            cells = "".join(f"{each:12.1f}" for each in times)
            print(f"{name:20}{cells}{times[-1] / times[0]:10.2f}{least_ratio(model, bits):8.2f}", flush=True)


def main() -> int:
    parser = Parser(prog="python benchmarks/late_tokens.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["B"], choices=list(SIZES), help="sizes of LlamaGen (default: B)")
    parser.add_argument("--rounds", type=int, default=3)
    return guarded("benchmarks/late_tokens.py", measure, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
