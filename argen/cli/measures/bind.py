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
    from argen.diffusion.model_settings import binding, drawing
    from argen.eval import run as runs
    from argen.eval import tools

    binding_settings = args.settings or binding(args.model)
    truths, seconds, settings = tools.of_kind("pair", args.num), {}, {"settings": binding_settings}
    pipe, judge, generator_of = pipeline_of(args, settings)
    sampling, bound = drawing(args.model, args.steps, args.guidance_scale), SemanticBinding(pipe)

    def draw_plain(rows: range) -> list:
        return pipe([truths[i].prompt for i in rows], generator=[generator_of(i) for i in rows], **sampling).images

    def draw_bound(rows: range) -> list:
        return [
            bound(truths[i].prompt, settings=binding_settings, generator=generator_of(i), **sampling).images[0]
            for i in rows
        ]

    images = {}
    for name, sample in (("before", draw_plain), ("after", draw_bound)):
        with runs.timed(seconds, name):
            images[name] = runs.draw(sample, len(truths), args.out / name)
    finish(args, settings, tools.before_and_after(judge, truths, **images), seconds, images["after"])
