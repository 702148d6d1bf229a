"""`argen batch`."""

import argparse
import json
import sys
from functools import cache
from pathlib import Path

from argen.command import (
    check_loading,
    device_and_json,
    device_for,
    load_arguments,
    load_model,
    load_options,
    writable_folder,
)

HELP = "draw a table of prompts and settings; resumes where it stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, metavar="FILE", help="CSV with the settings' names first, or JSON lines")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR", help="for ROW-NUMBER.png and pictures.csv"
    )
    parser.add_argument("--model", metavar="ID", help="of rows that name none (default: argen/emoji-parti)")
    device_and_json(parser)
    load_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from argen.files import replacing
    from argen.hub.cards import reading_of
    from argen.jobs.tables import check_requests, draw_table, read_table, settings_csv
    from argen.words import number_of

    writable_folder(args.out, new=False)
    requests = read_table(args.table, **({"model": args.model} if args.model is not None else {}))
    options = load_options(args)
    device = device_for(args.device, options)
    models = cache(lambda name: load_model(name, args.device, "generator", options))
    check_requests(requests, models, check_name=lambda name: check_loading(name, device, options, "generator"))
    readings = dict.fromkeys((request.model, request.prompt, request.literal) for request in requests)
    for note in dict.fromkeys(note for each in readings for note in reading_of(*each).notes):
        print(f"argen batch: {note}", file=sys.stderr)
    rows = tqdm(draw_table(requests, args.out, models), total=len(requests), desc="batch", disable=args.json)
    files, requests_of_files = zip(*(pair for row in rows for pair in row), strict=True)
    with replacing(args.out / "pictures.csv") as file:
        file.write(settings_csv(requests_of_files, [path.name for path in files]).encode())
    print(
        json.dumps({"files": list(map(str, files))}) if args.json else f"{args.out}: {number_of(len(files), 'image')}"
    )
