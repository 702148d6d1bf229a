"""`argen quantize`."""

import argparse
import json
from pathlib import Path

from argen.command import check_model, device_argument, writable_folder

HELP = "save a generator with weights of 8 or 4 bits"
DESCRIPTION = "Save a generator with weights of 8 or 4 bits: rounded to nearest, or so that its outputs change least on images that it draws first."


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
        help="columns that share a scale, 0 for whole rows, as layers have whose columns it does not divide (default: 0 with 8 bits, 32 with 4 bits)",
    )
    parser.add_argument(
        "--method",
        default="rtn",
        metavar="NAME",
        help="rtn (to nearest), gptq (calibrated), or rsq (also rotated where possible, and tokens weighted by attention) (default: rtn)",
    )
    parser.add_argument(
        "--act-order", action="store_true", help="round columns with large inputs first, with --group 0"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="images to calibrate with (default: 64)")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="of these images, one a line, taken in turn (default: of argen eval emoji, or the classes of the model)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="image i is drawn from S + i (default: 0)")
    device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    from argen.bounds import check
    from argen.models.quantized import Quantization
    from argen.words import read_prompts

    group = (32 if args.bits == 4 else 0) if args.group is None else args.group
    how = Quantization(args.bits, group, args.method, args.act_order)
    given = {"samples": args.samples, "prompts": args.prompts, "seed": args.seed}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not how.calibrated:
        raise ValueError(f"{next(iter(given))} is for the methods gptq and rsq, and the method is rtn: leave it out")
    check("num", args.samples, "samples")
    check("seed", args.seed)
    prompts = read_prompts(args.prompts) if args.prompts else None
    writable_folder(args.out)
    check_model(args.model, "generator")

    from argen.device import pick
    from argen.hub.calibration import Images, quantize_calibrated
    from argen.hub.loading import load_to_quantize
    from argen.hub.quantized import save_quantized

    pipe = load_to_quantize(args.model, how, pick(args.device))
    before = size(pipe.transformer)
    count = 64 if args.samples is None else args.samples
    result = quantize_calibrated(pipe, how, Images(count, prompts, args.seed or 0))
    save_quantized(pipe, result.metadata, args.out, result.tensors)
    after = size(pipe.transformer)
    if args.json:
        report = {"folder": str(args.out), "bytes": after, "bytes_before": before, "notes": result.notes}
        print(json.dumps(report | result.metadata))
    else:
        for note in result.notes:
            print(note)
        print(
            f"{args.out}/ ({after / 1e6:.1f} MB of the network that writes the tokens, {before / 1e6:.1f} MB in float32)"
        )


def size(network) -> int:
    """Bytes of the tensors of a network, each counted once."""
    tensors = {tensor.data_ptr(): tensor for tensor in network.state_dict().values()}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
