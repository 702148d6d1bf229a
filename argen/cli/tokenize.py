"""`argen tokenize`."""

import argparse
import json
from pathlib import Path

from argen.command import (
    described,
    device_and_json,
    load_arguments,
    load_model,
    load_options,
    writable,
)

HELP = "turn an image into a file of tokens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMG")
    parser.add_argument("--tokenizer", default="argen/emoji-vitvqgan", metavar="ID", help="see `argen models`")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="NPZ file (default: IMG's name with .npz)")
    device_and_json(parser)
    load_arguments(parser, "dtype", "attention")


def run(args: argparse.Namespace) -> None:
    from argen.eval.reconstruction import encoded
    from argen.images import open_image
    from argen.metadata import save_tokens

    out = writable(args.out or args.image.with_suffix(".npz"), ".npz")
    image = open_image(args.image)
    tokenizer = load_model(args.tokenizer, args.device, "tokenizer", load_options(args))
    tokens = encoded(tokenizer, image)[1][0].cpu().numpy()
    save_tokens(out, args.tokenizer, tokens)
    if args.json:
        print(json.dumps({"file": str(out), "tokenizer": args.tokenizer, "tokens": tokens.tolist()}))
    else:
        print(f"{out} ({described(tokens)} of {args.tokenizer})")
