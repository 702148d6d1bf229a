"""`argen eval control`."""

import argparse
from pathlib import Path

from argen.cli.measures.common import (
    draw_samples,
    finish,
    output_arguments,
)
from argen.command import load_arguments

HELP = "how closely a generator follows control images"
DESCRIPTION = "Draw the captions of scenes after their edges or segments, and without: F1 of edges (within 2 pixels), mIoU of segments."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="argen/emoji-control", metavar="ID", help="(default: argen/emoji-control)")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help=".parquet of `argen data scenes`")
    parser.add_argument("--type", default="canny", choices=("canny", "seg"), help="(default: canny)")
    parser.add_argument("--strength", type=float, default=1.0, metavar="X", help="of the control (default: 1)")
    parser.add_argument("--num", type=int, default=200, metavar="N", help="the first N scenes (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="image i is drawn from (seed, i) alone (default: 0)")
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="(default: the model's)")
    output_arguments(parser)
    load_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from argen.eval import control
    from argen.eval import run as runs

    scenes, seconds, samples = control.Scenes(args.data), {}, []
    settings = {"data": [str(args.data), scenes.table.identity], "control": args.type, "strength": args.strength}
    for folder, strength in (("samples", args.strength), ("free", 0.0)):

        def control_arguments(rows: range, strength: float = strength) -> dict:
            images = [scenes.control(index, args.type) for index in rows]
            return {"control_image": images, "control_type": args.type, "control_strength": strength}

        with runs.timed(seconds, f"draw {folder}"):
            samples.append(
                draw_samples(args, scenes.prompts, min(args.num, len(scenes)), settings, folder, control_arguments)
            )
    with runs.timed(seconds, "compare"):
        scores = control.evaluate(scenes, args.type, *samples)
    finish(args, settings, scores, seconds, samples[0])
