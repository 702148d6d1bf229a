"""`argen train`."""

import argparse
from pathlib import Path

from argen.registry import recipes

HELP = "train a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help=", ".join(recipes),
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="made by `argen data emoji`; all of argen's own recipes need it"
    )
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="made by `argen data scenes`")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoints, log, sample grids; resumes from checkpoints there",
    )
    parser.add_argument("--clip", type=Path, metavar="DIR", help="trained emoji-clip (default: the shipped one)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="trained emoji-vitvqgan or emoji-flextok (default: the shipped one)",
    )
    parser.add_argument("--vae", type=Path, metavar="DIR", help="trained emoji-vae (default: the shipped one)")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="trained emoji-judge (default: the shipped one)")
    parser.add_argument(
        "--generator",
        type=Path,
        metavar="DIR",
        help="trained generator that a second stage, emoji-control or emoji-drafter starts from (default: the shipped one)",
    )
    parser.add_argument(
        "--x",
        metavar="KIND-SIZE",
        help="what emoji-xar predicts at a time: cell-4 (default), cell-1, a token, cell-8, the whole image, subsample-2, scale-2",
    )
    parser.add_argument("--setting", choices=("cpu", "gpu"), default="cpu", help="length and batch size")
    parser.add_argument("--steps", type=int, metavar="N", help="stop after step N of the schedule")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks first: faster steps; on a CPU this needs a C++ compiler",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches")


def run(args: argparse.Namespace) -> None:
    from argen.files import WEIGHTS
    from argen.train import recipes as training

    parts = {name: getattr(args, name) for name in ("clip", "tokenizer", "vae", "judge", "generator")}
    options = {"data": args.data, "scenes": args.scenes, "out": args.out, "seed": args.seed, "steps": args.steps}
    options |= {"compile": args.compile, "x": args.x, "shipped": WEIGHTS}
    scores = training.run(args.recipe, args.setting, **parts, **options)
    print(f"{args.out}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
