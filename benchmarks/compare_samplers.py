"""Every sampler on a shipped generator, one image at a time: forward passes, tokens per step, speed, the judge's score, FID-emoji.

pip install ".[bench]" && python benchmarks/compare_samplers.py --num 10 --plot samplers.png
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from argen.command import Parser, guarded, load_model
from argen.eval import run
from argen.eval.features import encoder_features
from argen.eval.images import ImageSet, open_images
from argen.eval.judge import evaluate, read_prompts
from argen.eval.run import cache_folder
from samplers.auto import Auto
from samplers.jacobi import Jacobi
from samplers.lantern import Lantern
from samplers.recycling import TokenRecycling
from samplers.rules import KSeq
from samplers.sjd import GroupedJacobi, SpeculativeJacobi
from samplers.speculative import Speculative
from samplers.steps import Sampler, Sequential
from samplers.trees import SMALL_TREE, DrawnTree, DynamicTree, IndependentTree
from samplers.zipar import ZipAR

KINDS = ("single", "colour", "count", "pair", "relation")  # of the judge's prompts


def compared() -> dict[str, Sampler]:
    """Return the samplers by their names in the table."""
    return {
        "sequential": Sequential(),
        "auto": Auto(),
        **{f"jacobi, window {window}": Jacobi(window) for window in (8, 16, 32)},
        "sjd": SpeculativeJacobi(),
        "gsd": GroupedJacobi(),
        "recycling": TokenRecycling(),
        "speculative, static tree": Speculative(),
        "speculative, dynamic tree": Speculative(DynamicTree(12, 3, 4)),
        "speculative, drawn tree": Speculative(DrawnTree(12, 4)),
        "speculative, k-SEQ": Speculative(IndependentTree(SMALL_TREE.paths), KSeq()),
        **{f"lantern, k 10, delta {delta}": Lantern(10, delta) for delta in (0.05, 0.1, 0.2, 0.4)},
        **{f"lantern, k 10, lambda {bound}": Lantern(10, lambda_=bound) for bound in (2.0, 5.0)},
        **{f"zipar, window {window}": ZipAR(window) for window in (2, 4)},
    }


def compare(args: argparse.Namespace) -> None:
    """Print a table, one row per sampler, and write it, with a plot if requested."""
    if args.plot:
        import matplotlib  # noqa: F401 - now, if it is missing, and not after an hour
    pipe = load_model(args.model, args.device, "generator")
    pipe.set_progress_bar_config(disable=True)
    judge = load_model("argen/emoji-judge", args.device)
    kinds: dict[str, list] = {}
    for truth in read_prompts():
        kinds.setdefault(truth.kind, []).append(truth)
    truths = [truth for kind in args.kinds for truth in kinds[kind][: args.num]]
    reference = open_images(args.ref) if args.ref else None
    rows = []
    for name, sampler in compared().items():
        if args.only and not any(name.startswith(one) for one in args.only):
            continue
        if getattr(pipe, "drafter", None) is None and name.startswith(("speculative", "lantern")):
            continue
        forward_passes, images, started = 0, [], time.perf_counter()
        for index, truth in enumerate(truths):
            out = pipe(truth.prompt, generator=torch.Generator().manual_seed(index), sampler=sampler)
            forward_passes, images = forward_passes + out.forward_passes, images + out.images
        seconds = time.perf_counter() - started
        scores = evaluate(judge, [np.asarray(image) for image in images], truths)
        identity = [entry for question, entry in scores.items() if question.endswith("identity")]
        row = {
            "sampler": name,
            "lossless": sampler.lossless,
            "forward_passes": forward_passes / len(truths),
            "tokens_per_step": len(truths) * pipe.length / forward_passes,
            "tokens_per_second": len(truths) * pipe.length / seconds,
            "identity": sum(entry["value"] * entry["n"] for entry in identity) / sum(entry["n"] for entry in identity),
        }
        if reference is not None:
            row["fid_emoji"] = _fid(images, reference)
        rows.append(row)
        if len(rows) == 1:
            print(" ".join(f"{column:>15}" for column in list(row)[2:]), "  sampler")
        cells = [f"{value:15.3f}" for value in list(row.values())[2:]]
        print(" ".join(cells), f"  {name}{'' if sampler.lossless else ' (relaxed)'}", flush=True)
    args.out.write_text(json.dumps({"model": args.model, "prompts": len(truths), "rows": rows}, indent=1) + "\n")
    if args.plot:
        _plot(rows, args.plot)


def _fid(images: list[Image.Image], reference: ImageSet) -> float:
    extractor = encoder_features("emoji", load_model("argen/emoji-clip", None))
    with tempfile.TemporaryDirectory() as folder:
        for index, image in enumerate(images):
            image.save(Path(folder) / f"{index}.png")
        samples = open_images(folder)
        return run.compare(samples, reference, extractor, ["fid"], Path(folder) / "features", cache_folder())[
            "FID-emoji"
        ]["value"]


def _plot(rows: list[dict], path: Path) -> None:
    """Plot tokens per step against the judge's identity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in rows:
        axes.scatter(row["tokens_per_step"], row["identity"], color="tab:blue" if row["lossless"] else "tab:orange")
        axes.annotate(
            row["sampler"],
            (row["tokens_per_step"], row["identity"]),
            fontsize=7,
            xytext=(4, 3),
            textcoords="offset points",
        )
    axes.margins(x=0.2, y=0.1)  # room for the names
    axes.set_xlabel("tokens per step")
    axes.set_ylabel("identity, by the judge (blue: lossless, orange: relaxed)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = Parser(prog="python benchmarks/compare_samplers.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="argen/emoji-llamagen", metavar="ID")
    parser.add_argument("--num", type=int, default=20, help="prompts of each of the judge's kinds (default: 20)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="(default: all five)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="samplers whose name begins so")
    parser.add_argument("--ref", type=Path, metavar="SET", help="training images, for FID-emoji")
    parser.add_argument("--out", type=Path, default=Path("samplers.json"), metavar="JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also plot quality against tokens per step")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    return guarded("benchmarks/compare_samplers.py", compare, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
