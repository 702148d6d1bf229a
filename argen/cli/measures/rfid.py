"""`argen eval rfid`."""

import argparse
from pathlib import Path

from argen.cli.measures.common import (
    IMAGES,
    drawn_by,
    extractor_of,
    feature_arguments,
    finish,
    output_arguments,
)
from argen.command import load_arguments, load_model, load_options

HELP = "what a tokenizer keeps: rFID, PSNR, SSIM, use of codes"
DESCRIPTION = "What a tokenizer keeps of images: rFID, PSNR, SSIM, use of codes and, of a table made by `argen data emoji`, what the judge still recognises."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", default="argen/emoji-vitvqgan", metavar="ID", help="(default: argen/emoji-vitvqgan)"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help=IMAGES)
    parser.add_argument(
        "--tokens", type=int, metavar="K", help="decode only the first K, where the tokenizer can (FlexTok)"
    )
    feature_arguments(parser)
    output_arguments(parser)
    load_arguments(parser, "dtype", "attention")


def run(args: argparse.Namespace) -> None:
    from argen.eval import judge, reconstruction
    from argen.eval import run as runs
    from argen.eval.images import open_images
    from argen.eval.run_dir import lock_run_dir

    extractor, seconds = extractor_of(args), {}
    tokenizer = load_model(args.tokenizer, args.device, "tokenizer", load_options(args))
    reconstruction.check_count(tokenizer, args.tokens)
    images = open_images(args.data)
    real = reconstruction.Fitted(images, tokenizer.config.image_size, args.crop)
    settings = {**runs.settings_of(extractor, args.crop), "tokenizer": args.tokenizer, "uint8": "rounded"}
    settings["tokens"] = args.tokens
    settings["data"] = [str(args.data), real.identity]
    settings |= drawn_by(tokenizer)
    lock_run_dir(args.out, settings)
    with runs.timed(seconds, "reconstruct"):
        reconstructions = runs.draw(
            reconstruction.reconstructor(tokenizer, real, args.tokens), len(real), args.out / "samples"
        )
    with runs.timed(seconds, "look and compare"):
        scores = runs.compare(
            reconstructions, real, extractor, ["fid"], args.out, runs.cache_folder(), batch_size=args.batch_size
        )
    scores = {f"r{name}": entry for name, entry in scores.items()} | reconstruction.compare(
        tokenizer, reconstructions, real
    )
    icons = getattr(images, "table", None)
    if icons is not None and {"concept", "group"} <= set(icons.column_names):
        with runs.timed(seconds, "judge"):
            scores |= judge.recognised(load_model("argen/emoji-judge", args.device), reconstructions, real, icons)
    finish(args, settings, scores, seconds, reconstructions)
