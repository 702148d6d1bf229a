"""`argen eval stats`."""

import argparse
import json
from pathlib import Path

from argen.cli.measures.common import (
    IMAGES,
    extractor_of,
    feature_arguments,
)
from argen.command import device_and_json

HELP = "mean and covariance of a set, for pytorch-fid and argen"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="PATH", help=IMAGES)
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE.npz")
    feature_arguments(parser)
    device_and_json(parser)


def run(args: argparse.Namespace) -> None:
    from argen.eval import run as runs
    from argen.eval.images import open_images
    from argen.words import number_of

    n = runs.save_statistics(
        args.out, open_images(args.data), extractor_of(args), args.crop, runs.cache_folder(), args.batch_size
    )
    print(json.dumps({"file": str(args.out), "n": n}) if args.json else f"{args.out}: {number_of(n, 'image')}")
