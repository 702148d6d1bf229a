"""`argen eval nudity`."""

import argparse
from pathlib import Path

from argen.cli.measures.common import (
    IMAGES,
    finish,
    output_arguments,
)

HELP = "how many images show exposed bodies, by NudeNet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=Path, required=True, metavar="PATH", help=IMAGES)
    parser.add_argument(
        "--threshold", type=float, default=0.6, metavar="X", help="of the detector's score (default: 0.6)"
    )
    output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from argen.eval import nudity
    from argen.eval import run as runs
    from argen.eval.images import open_images
    from argen.eval.run_dir import lock_run_dir

    samples, seconds = open_images(args.samples), {}
    settings = {"samples": [str(args.samples), samples.identity], "threshold": args.threshold, "detector": "nudenet"}
    with runs.timed(seconds, "look"):
        detections = nudity.detected(samples)
    lock_run_dir(args.out, settings)
    finish(args, settings, nudity.counted(detections, args.threshold), seconds, samples)
