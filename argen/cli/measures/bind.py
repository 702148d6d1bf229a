"""`argen eval bind`."""

import argparse

from argen.cli.measures.common import (
    finish,
    output_arguments,
    pipeline_of,
    tool_arguments,
)
from argen.command import BINDING

HELP = "what binding changes: things and colours of the judge's pairs, before and after"
DESCRIPTION = "Draw the judge's prompts of two coloured things, plainly and bound (ToMe), from the same noise."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tool_arguments(parser, 125)
    parser.add_argument("--settings", help=BINDING)
    output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from argen.diffusion import SemanticBinding
    from argen.diffusion.tools import binding, drawing
    from argen.eval import run as runs
    from argen.eval import tools

    how = args.settings or binding(args.model)
    truths, seconds, settings = tools.of_kind("pair", args.num), {}, {"settings": how}
    pipe, judge, generator_of = pipeline_of(args, settings)
    asked, bound = drawing(args.model, args.steps, args.guidance_scale), SemanticBinding(pipe)

    def plainly(rows: range) -> list:
        return pipe([truths[i].prompt for i in rows], generator=[generator_of(i) for i in rows], **asked).images

    def bindingly(rows: range) -> list:
        return [bound(truths[i].prompt, settings=how, generator=generator_of(i), **asked).images[0] for i in rows]

    drawn = {}
    for name, sample in (("before", plainly), ("after", bindingly)):
        with runs.timed(seconds, name):
            drawn[name] = runs.draw(sample, len(truths), args.out / name)
    finish(args, settings, tools.before_and_after(judge, truths, **drawn), seconds, drawn["after"])
