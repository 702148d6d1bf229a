"""`argen palette`."""

import argparse
from collections import Counter
from pathlib import Path

HELP = "name the most frequent colours of an image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMG")
    parser.add_argument("--num", type=int, default=3, metavar="N", help="colours (default: 3)")


def run(args: argparse.Namespace) -> None:
    from argen.images import open_image  # late, so that `argen --help` starts at once

    print("\n".join(colours(open_image(args.image), args.num)))


def colours(image, num: int) -> list[str]:
    """The most frequent colours of an image, each with its share of the tokens."""
    from argen.hub.loading import load
    from tokenizers_img.pixels import from_pil

    tokenizer = load("mosaic/tokenizer")
    ids = tokenizer.encode(from_pil(image, tokenizer.config.image_size)[None])[0]
    lines = []
    for id, count in Counter(ids.tolist()).most_common(num):
        red, green, blue = (round(255 * shade) for shade in tokenizer.palette[id].tolist())
        lines.append(f"#{red:02x}{green:02x}{blue:02x}  {count / len(ids):.0%}")
    return lines
