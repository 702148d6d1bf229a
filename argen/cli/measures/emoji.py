"""`argen eval emoji`."""

import argparse

from argen.cli.measures.common import finish, judged, judged_arguments, output_arguments

HELP = "objects, colours, counts and places in images of 500 fixed prompts"
DESCRIPTION = "Draw 500 fixed prompts whose truth is known and judge what the images show, beside the share that the judge gets right on real held-out images."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    judged_arguments(parser, num=500)
    parser.add_argument(
        "--common",
        action="store_true",
        help="prompts of 62 common things alone: of argen/emoji-sd's 65 those that the judge knows, of its 666; without it of all",
    )
    parser.add_argument("--tokens", type=int, metavar="K", help="of each image, of a model whose tokens are ordered")
    output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from argen.eval import judge

    truths = judge.read_prompts(judge.COMMON_PROMPTS if args.common else judge.PROMPTS)
    finish(args, *judged(args, truths, args.num, {"tokens": args.tokens, "common": args.common}))
