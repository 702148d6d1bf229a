"""`argen reconstruct`."""

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

HELP = "turn an image into tokens and back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMG")
    parser.add_argument("--tokenizer", default="argen/emoji-vitvqgan", metavar="ID", help="see `argen models`")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="PNG file (default: IMG's name with -reconstructed.png)"
    )
    device_and_json(parser)
    load_arguments(parser, "dtype", "attention")


def run(args: argparse.Namespace) -> None:
    from argen.eval.reconstruction import decoded, encoded
    from argen.images import open_image
    from argen.metadata import save_made
    from tokenizers_img.pixels import to_pil

    out = writable(args.out or args.image.with_name(f"{args.image.stem}-reconstructed.png"))
    image = open_image(args.image)
    tokenizer = load_model(args.tokenizer, args.device, "tokenizer", load_options(args))
    pixels, tokens = encoded(tokenizer, image)
    reconstruction = decoded(tokenizer, tokens, pixels)
    psnr = -10 * (reconstruction - pixels).square().mean().log10().item()
    settings = {"image": args.image, "tokenizer": args.tokenizer}
    save_made([to_pil(reconstruction[0])], [out], "reconstruct", settings, tokenizer)
    if args.json:
        print(json.dumps({"file": str(out), "tokenizer": args.tokenizer, "psnr": psnr, "tokens": tokens[0].tolist()}))
    else:
        print(f"{out} ({described(tokens[0].cpu().numpy())}, PSNR {psnr:.1f} dB)")
