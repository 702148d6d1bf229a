"""`argen eval emoji`."""

import argparse

from argen.cli.measures.common import (
    check_drawing,
    draw_samples,
    finish,
    output_arguments,
)
from argen.command import load_arguments, load_model

HELP = "objects, colours, counts and places in images of 500 fixed prompts"
DESCRIPTION = "Draw 500 fixed prompts whose truth is known and judge what the images show, beside the share that the judge gets right on real held-out images."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="argen/emoji-parti", metavar="ID", help="(default: argen/emoji-parti)")
    parser.add_argument("--num", type=int, default=500, metavar="N", help="the first N images (default: 500)")
    parser.add_argument(
        "--common",
        action="store_true",
        help="prompts of 62 common things alone: of argen/emoji-sd's 65 those that the judge knows, of its 666; without it of all",
    )
    parser.add_argument("--tokens", type=int, metavar="K", help="of each image, of a model whose tokens are ordered")
    parser.add_argument("--seed", type=int, default=0, help="image i is drawn from (seed, i) alone (default: 0)")
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="(default: the model's)")
    output_arguments(parser)
    load_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from argen.eval import judge
    from argen.eval import run as runs
    from argen.eval.features import weights_digest

    check_drawing(args)
    network, seconds = load_model("argen/emoji-judge", args.device), {}
    truths = judge.read_prompts(judge.COMMON_PROMPTS if args.common else judge.PROMPTS)
    settings = {"judge": weights_digest(network), "tokens": args.tokens, "common": args.common}
    arguments = {"num_tokens": args.tokens}
    with runs.timed(seconds, "draw"):
        samples = draw_samples(
            args, [truth.prompt for truth in truths], args.num, settings, call_arguments=lambda rows: arguments
        )
    with runs.timed(seconds, "judge"):
        scores = judge.evaluate(network, samples, truths)
    finish(args, settings, scores, seconds, samples)
