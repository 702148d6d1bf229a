"""`argen palette`."""

import argparse
from collections import Counter
from pathlib import Path

HELP = "name the most frequent colours of an image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMG")
    parser.add_argument("--num", type=int, default=3, metavar="N", help="colours (default: 3)")


def run(args: argparse.Namespace) -> None:
    from argen.hub.loading import load  # late, so that `argen --help` starts at once
    from argen.images import open_image
    from tokenizers_img.pixels import from_pil

    tokenizer = load("mosaic/tokenizer")
    ids = tokenizer.encode(from_pil(open_image(args.image), tokenizer.config.image_size)[None])[0]
    for id, count in Counter(ids.tolist()).most_common(args.num):
        red, green, blue = (round(255 * shade) for shade in tokenizer.palette[id].tolist())
        print(f"#{red:02x}{green:02x}{blue:02x}  {count / len(ids):.0%}")
