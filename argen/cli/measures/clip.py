"""`argen eval clip`."""

import argparse

from argen.cli.measures.common import (
    check_drawing,
    draw_samples,
    drawing_arguments,
    finish,
    output_arguments,
)
from argen.command import CLIP, load_model

HELP = "how well a generator's images fit their prompts, by a CLIP"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="argen/emoji-parti", metavar="ID", help="(default: argen/emoji-parti)")
    drawing_arguments(parser, "images (default: one a prompt)", None)
    parser.add_argument("--clip", default=CLIP, metavar="ID", help=f"hub id or folder, or emoji (default: {CLIP})")
    parser.add_argument("--prefix", default="", metavar="TEXT", help='before each prompt; LlamaGen: "A photo depicts "')
    output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from argen.device import pick
    from argen.eval import clip_score
    from argen.eval import run as runs
    from argen.eval.features import PublishedCLIP
    from argen.words import read_prompts

    prompts, seconds = read_prompts(args.prompts), {}
    check_drawing(args)
    judge = load_model("argen/emoji-clip", args.device) if args.clip == "emoji" else None
    judge = judge or PublishedCLIP(args.clip, pick(args.device))
    settings = {"clip": args.clip, "prefix": args.prefix}
    with runs.timed(seconds, "draw"):
        samples = draw_samples(args, prompts, len(prompts) if args.num is None else args.num, settings)
    with runs.timed(seconds, "look"):
        scores = clip_score.evaluate(judge, args.clip, samples, prompts, args.prefix)
    finish(args, settings, scores, seconds, samples)
