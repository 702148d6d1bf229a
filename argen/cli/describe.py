"""`argen describe`."""

import argparse
import json
from pathlib import Path

from argen.command import (
    device_and_json,
    load_model,
)

HELP = "say what an image shows, with a model that reads images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMG")
    parser.add_argument(
        "question", nargs="?", default="", help="about the image, for a model that answers; without one it is described"
    )
    parser.add_argument("--model", default="argen/emoji-seed-lm", metavar="ID", help="(default: argen/emoji-seed-lm)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0: the most probable words (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    device_and_json(parser)


def run(args: argparse.Namespace) -> None:
    from argen.images import open_image

    image = open_image(args.image)
    pipe = load_model(args.model, args.device, "generator")
    if not hasattr(pipe, "describe"):
        raise ValueError(f"{args.model} only draws: choose a model that reads images, e.g. argen/emoji-seed-lm")
    text = pipe.describe(image, args.question, temperature=args.temperature, seed=args.seed)
    print(json.dumps({"image": str(args.image), "text": text}) if args.json else text)
