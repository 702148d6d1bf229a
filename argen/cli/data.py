"""`argen data`."""

import argparse
from pathlib import Path

from argen.command import (
    HelpFormatter,
)

HELP = "build datasets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sets = parser.add_subparsers(dest="set", required=True, metavar="SET")
    add = sets.add_parser(
        "emoji", help="single images with names, about 10,000 in 6 styles", formatter_class=HelpFormatter
    )
    add.add_argument("--out", type=Path, required=True, metavar="DIR")
    add.add_argument(
        "--icons", type=Path, metavar="DIR", help="folder for the icon packages; missing ones are fetched with npm"
    )
    add.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    add = sets.add_parser("scenes", help="composed images with exact truth", formatter_class=HelpFormatter)
    add.add_argument("--emoji", type=Path, required=True, metavar="DIR", help="made by `argen data emoji`")
    add.add_argument("--out", type=Path, required=True, metavar="DIR")
    add.add_argument(
        "--num", type=int, default=12000, help="training scenes; the other splits have a tenth of that each"
    )
    add.add_argument(
        "--common",
        action="store_true",
        help="of the 65 common things alone that argen/emoji-sd draws, see docs/evaluation.md",
    )
    add.add_argument(
        "--kind", choices=("count", "colour", "pair", "relation"), help="of this kind alone (default: of all)"
    )
    add.add_argument("--seed", type=int, default=0, help="of the compositions")
    add = sets.add_parser(
        "names", help="tables of the names of all emoji in 28 languages, as they ship", formatter_class=HelpFormatter
    )
    add.add_argument("--out", type=Path, required=True, metavar="DIR")
    add.add_argument(
        "--icons", type=Path, metavar="DIR", help="folder for the packages; a missing one is fetched with npm"
    )
    add = sets.add_parser(
        "sample", help="a small set out of a large one, as it ships for the tests", formatter_class=HelpFormatter
    )
    add.add_argument("--emoji", type=Path, required=True, metavar="DIR", help="made by `argen data emoji`")
    add.add_argument("--out", type=Path, required=True, metavar="DIR")
    add.add_argument("--num", type=int, default=64, help="images")


def run(args: argparse.Namespace) -> None:
    from argen.data import concepts, emoji, scenes

    if args.set == "names":
        count = concepts.build(emoji.fetch_package(*emoji.NAMES_PACKAGE, args.icons or emoji.cache_folder()), args.out)
        print(f"{args.out}: {count:,} concepts")
        return
    if args.set == "emoji":
        counts = emoji.build(args.out, args.icons, args.size)
    elif args.set == "scenes":
        counts = scenes.build(args.emoji, args.out, args.num, args.seed, args.common, args.kind)
    else:
        counts = emoji.sample(args.emoji, args.out, args.num)
    print(f"{args.out}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()))
