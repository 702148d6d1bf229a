"""`argen eval held-out`."""

import argparse
import json
from pathlib import Path

from argen.command import (
    device_and_json,
    load_arguments,
    load_model,
    load_options,
    writable,
)

HELP = "quick scores of any shipped model on held-out data"
DESCRIPTION = "Measure a model on held-out data: a generator by the ranks of its prompts, a tokenizer by what it keeps, an encoder by what it finds."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="made by `argen data emoji`")
    parser.add_argument("--model", default="argen/emoji-parti", metavar="ID", help="(default: argen/emoji-parti)")
    parser.add_argument(
        "--num-candidates", type=int, default=16, metavar="C", help="for the scores with re-ranking (default: 16)"
    )
    parser.add_argument("--grid", type=Path, metavar="PNG", help="also write a labelled grid of 32 images")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    device_and_json(parser)
    load_arguments(parser)


def run(args: argparse.Namespace) -> None:
    import torch

    from argen.data.tables import pixels, read_split
    from argen.eval import prompts, reconstruction, retrieval

    model = load_model(args.model, args.device, options=load_options(args))
    if args.grid:
        writable(args.grid)
    if hasattr(model, "likelihoods"):
        scores = retrieval.of_captions(model.likelihoods, args.data)
    elif hasattr(model, "run"):
        scores = prompts.evaluate(model, args.data, args.num_candidates, args.seed, args.grid)
    elif hasattr(model, "embed"):
        scores = retrieval.evaluate(model.embed, args.data)
    elif args.model == "argen/emoji-seed":
        scores = retrieval.of_tokens(model, load_model("argen/emoji-clip", args.device).embed, args.data)
    else:
        scores = reconstruction.evaluate(
            model, torch.from_numpy(pixels(read_split(args.data, "test"), model.config.image_size))
        )
    print(json.dumps(scores) if args.json else "\n".join(f"{name:55} {value:.3f}" for name, value in scores.items()))
