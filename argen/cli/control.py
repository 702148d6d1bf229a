"""`argen control`."""

import argparse
from pathlib import Path

from argen.command import (
    CONTROLS,
    size,
    writable,
)

HELP = "make a control image: edges, depth, a line drawing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMG")
    parser.add_argument("--type", default="canny", metavar="TYPE", help=f"{CONTROLS} (default: canny)")
    parser.add_argument("--size", type=size, metavar="WxH", help="of the control image (default: the image's own)")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="PNG file")


def run(args: argparse.Namespace) -> None:
    from argen.images import open_image
    from argen.metadata import save_made
    from argen.models.annotators import annotate, as_image, resized

    writable(args.out)
    image = open_image(args.image)
    flat = resized(image, args.type, args.size or image.size)
    settings = {"image": args.image, "type": args.type, "size": flat.size}
    save_made([as_image(annotate(flat, args.type))], [args.out], "control", settings)
    print(f"{args.out} ({args.type}, {flat.width} x {flat.height})")
