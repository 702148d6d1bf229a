"""`argen eval everyday`."""

import argparse

from argen.cli.measures.common import finish, judged, judged_arguments, output_arguments

HELP = "things in images of 60 prompts in everyday words"
DESCRIPTION = """Draw 60 prompts as people type them ("a car", "coffee", "a purple umbrella") and judge whether the thing asked for is shown, under
any name that is right for it, beside the share that the judge gets right on real held-out images."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    judged_arguments(parser, num=60)
    output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from argen.eval import judge

    finish(args, *judged(args, judge.read_prompts(judge.EVERYDAY_PROMPTS), args.num, {}))
