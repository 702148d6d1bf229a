"""`argen grid`."""

import argparse
import json
from functools import cache
from pathlib import Path

from argen.command import (
    check_loading,
    device_and_json,
    device_for,
    load_arguments,
    load_model,
    load_options,
    writable,
)

HELP = "one prompt under several settings: a labelled image and a CSV"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help="PNG file; the CSV lies beside it"
    )
    for name, what in (("x", "columns"), ("y", "rows"), ("z", "tables below each other")):
        help_text = f"the {what}, e.g. guidance_scale=1,3,5; prompts and samplers with | between: 'prompt=a cat|a dog'"
        parser.add_argument(f"--{name}", required=name == "x", metavar="SETTING=VALUES", help=help_text)
    parser.add_argument("--model", default="argen/emoji-parti", metavar="ID", help="(default: argen/emoji-parti)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    device_and_json(parser)
    load_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from argen.files import replacing
    from argen.jobs.tables import Axis, check_requests, expand_axes, grid_image, settings_csv
    from argen.metadata import save_made
    from argen.request import Request

    table = writable(writable(args.out).with_suffix(".csv"), ".csv")
    axes = [Axis.parse(text) for text in (args.x, args.y, args.z) if text]
    requests = expand_axes(Request(args.prompt, model=args.model, seed=args.seed), axes)
    options = load_options(args)
    device = device_for(args.device, options)
    models = cache(lambda name: load_model(name, args.device, "generator", options))
    check_requests(requests, models, "cell", lambda name: check_loading(name, device, options, "generator"))
    images = []
    for request in tqdm(requests, desc="grid", disable=args.json):
        *_, job = models(request.model).run(request)
        images += job.images
    settings = {"prompt": args.prompt, "model": args.model, "seed": args.seed}
    settings |= {"x": args.x, "y": args.y, "z": args.z}
    used = {request.model for request in requests}
    model = models(used.pop()) if len(used) == 1 else None
    save_made([grid_image(images, axes)], [args.out], "grid", settings, model)
    with replacing(table) as file:
        file.write(
            settings_csv(requests, [f"{args.out.name} {number}" for number in range(1, len(requests) + 1)]).encode()
        )
    print(json.dumps({"file": str(args.out), "table": str(table)}) if args.json else f"{args.out}, {table}")
