"""`argen eval fid`."""

import argparse
from pathlib import Path

from argen.cli.measures.common import (
    IMAGES,
    REAL,
    check_drawing,
    draw_samples,
    drawing_arguments,
    extractor_of,
    feature_arguments,
    finish,
    output_arguments,
)

HELP = "distance of a model's images, or of any set, to real ones"
DESCRIPTION = "How far images are from real ones: FID, sFID, IS, KID, precision and recall."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--samples", type=Path, metavar="PATH", help=IMAGES)
    source.add_argument("--model", metavar="ID", help="draw images with this generator, see `argen models`")
    parser.add_argument("--ref", type=Path, required=True, metavar="PATH", help=REAL)
    parser.add_argument("--metrics", default="fid", metavar="LIST", help="of fid, sfid, is, kid, pr (default: fid)")
    drawing_arguments(parser, "images to draw with --model (default: 2000)", "the captions of --ref")
    feature_arguments(parser)
    parser.add_argument("--force", action="store_true", help="accept statistics made with another resize or network")
    output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from argen.eval import run as runs
    from argen.eval.images import open_images
    from argen.eval.run_dir import lock_run_dir
    from argen.words import read_prompts

    if args.model:
        check_drawing(args)
    prompts = read_prompts(args.prompts) if args.prompts else None
    extractor, seconds = extractor_of(args), {}
    metrics = [name.strip() for name in args.metrics.split(",")]
    settings = {**runs.settings_of(extractor, args.crop), "reference": str(args.ref), "metrics": metrics}
    path = runs.EMOJI if str(args.ref) == "emoji" else args.ref
    reference = runs.read_reference(path, extractor, args.crop, args.force)
    runs.check(metrics, extractor, reference)
    if args.model:
        prompts = prompts or getattr(reference, "captions", None)
        if not prompts:
            raise ValueError(f"{args.ref} has no captions to draw: give --prompts FILE, one prompt a line")
        with runs.timed(seconds, "draw"):
            samples = draw_samples(args, prompts, 2000 if args.num is None else args.num, settings)
    else:
        samples = open_images(args.samples)
        settings["samples"] = [str(args.samples), samples.identity]
        lock_run_dir(args.out, settings)
    with runs.timed(seconds, "look and compare"):
        scores = runs.compare(
            samples, reference, extractor, metrics, args.out, runs.cache_folder(), args.crop, batch_size=args.batch_size
        )
    finish(args, settings, scores, seconds, samples)
