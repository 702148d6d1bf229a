"""`argen quantize`."""

import argparse
import json
from pathlib import Path

from argen.command import check_model, writable_folder

HELP = "save a generator with weights of 8 or 4 bits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an id that `argen models` lists, or a saved folder")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR", help="a new folder, which loads by its path"
    )
    parser.add_argument("--bits", type=int, default=8, metavar="N", help="of a weight, 8 or 4 (default: 8)")
    parser.add_argument(
        "--group",
        type=int,
        metavar="N",
        help="columns that share a scale, 0 for whole rows (default: 0 with 8 bits, 32 with 4 bits)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    from argen.hub.loading import load
    from argen.hub.quantized import quantize_model, save_quantized
    from argen.models.quantized import Quantization

    how = Quantization(args.bits, (32 if args.bits == 4 else 0) if args.group is None else args.group)
    writable_folder(args.out)
    check_model(args.model, "generator")
    pipe = load(args.model, dtype="fp32")
    before = size(pipe.transformer)
    quantize_model(pipe, how)
    save_quantized(pipe, how, args.out)
    after = size(pipe.transformer)
    if args.json:
        print(json.dumps({"folder": str(args.out), "bytes": after, "bytes_before": before, **how.to_dict()}))
    else:
        print(
            f"{args.out}/ ({after / 1e6:.1f} MB of the network that writes the tokens, {before / 1e6:.1f} MB in float32)"
        )


def size(network) -> int:
    """Bytes of the tensors of a network."""
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
