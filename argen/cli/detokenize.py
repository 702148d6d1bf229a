"""`argen detokenize`."""

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

HELP = "turn a file of tokens into an image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="NPZ", help="made by `argen tokenize`")
    parser.add_argument("--tokenizer", metavar="ID", help="refuse files of another one")
    parser.add_argument("--tokens", type=int, metavar="K", help="only the first K, where the tokenizer can (FlexTok)")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="PNG file (default: the file's name with .png)")
    device_and_json(parser)
    load_arguments(parser, "dtype", "attention")


def run(args: argparse.Namespace) -> None:
    import torch

    from argen.eval.reconstruction import check_count, decoded
    from argen.metadata import read_tokens, save_made
    from tokenizers_img.pixels import to_pil

    out = writable(args.out or args.file.with_suffix(".png"))
    tokenizer_id, tokens = read_tokens(args.file)
    if args.tokenizer not in (None, tokenizer_id):
        raise ValueError(f"{args.file} was made by {tokenizer_id}, not by {args.tokenizer}: leave --tokenizer out")
    tokenizer = load_model(tokenizer_id, args.device, "tokenizer", load_options(args))
    check_count(tokenizer, args.tokens, len(tokens))
    tokens = tokens[: args.tokens]
    pixels = decoded(tokenizer, torch.from_numpy(tokens)[None].to(tokenizer.device))
    settings = {"file": args.file, "tokenizer": tokenizer_id, "tokens": args.tokens}
    save_made([to_pil(pixels[0])], [out], "detokenize", settings, tokenizer)
    if args.json:
        print(json.dumps({"file": str(out), "tokenizer": tokenizer_id, "tokens": len(tokens)}))
    else:
        print(f"{out} ({described(tokens)} of {tokenizer_id})")
