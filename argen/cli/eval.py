"""`argen eval`, also over many processes or machines: ``accelerate launch -m argen eval fid ...``."""

import argparse
from contextlib import nullcontext

from argen.bounds import check
from argen.command import HelpFormatter, check_numbers, writable_folder
from argen.registry import measures

HELP = "FID and the other numbers that papers report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="metric", required=True, metavar="WHAT")
    for name, measure in measures.items():
        text, description = measure.HELP.replace("%", "%%"), getattr(measure, "DESCRIPTION", None)
        add = commands.add_parser(name, help=text, description=description, formatter_class=HelpFormatter)
        measure.add_arguments(add)


def run(args: argparse.Namespace) -> None:
    """Run a measure; options are checked before anything is loaded, and a run that writes nothing leaves the folder as it was."""
    from argen.eval.run_dir import released_if_empty

    check_options(args)
    with released_if_empty(args.out) if _has_folder(args) else nullcontext():
        measures[args.metric].run(args)


def _has_folder(args: argparse.Namespace) -> bool:
    """Whether a measure writes into a run folder; the others print, or write one file."""
    return getattr(args, "out", None) is not None and args.metric != "stats"


def check_options(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: a number out of bounds, an unknown name, or a folder that cannot be written.
    """
    from argen.diffusion import rece, tome
    from argen.eval import features, images, run

    check_numbers(args)
    check("run_seed", getattr(args, "seed", None), "seed")
    options = vars(args)
    if options.get("crop"):
        images.check_crop(args.crop)
    if options.get("protocol"):
        features.check_protocol(args.protocol)
    if options.get("settings"):
        tome.check_settings(args.settings)
    if options.get("concepts"):
        rece.check_erasure(args.concepts, args.preset or "object", retained=args.retain)
    if options.get("metrics"):
        run.check_names([name.strip() for name in args.metrics.split(",")])
    if _has_folder(args):
        writable_folder(args.out, new=False)
    elif args.metric == "stats":
        run.writable_npz(args.out)
