"""`argen merge`."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from argen.command import check_model, writable_folder

HELP = "save a generator with LoRA as a part of its weights"
DESCRIPTION = "Save a generator with LoRA added to its weights: a folder that loads as any other, is quantized, or starts another training."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an id that `argen models` lists, or a saved folder; also that of a LoRA, with the model that it was trained on",
    )
    parser.add_argument(
        "--lora",
        action="append",
        metavar="PATH[:WEIGHT]",
        help="folder of a LoRA, as runs/style/final:0.8; once or more often, each is added",
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR", help="a new folder, which loads by its path"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    writable_folder(args.out)
    check_model(args.model, "generator")

    from argen.device import silent
    from argen.files import new_folder
    from argen.hub.cards import ADAPTED, CARD_FILE, Card, read_folder_card
    from argen.hub.loading import load
    from argen.models.lora import read_adapters
    from samplers.errors import InvalidValue

    file = Path(args.model) / CARD_FILE
    own = read_folder_card(file) if file.is_file() else None
    is_lora = own is not None and own.target == ADAPTED
    if not args.lora and not is_lora:
        raise InvalidValue("lora is missing: name what is merged, as --lora runs/style/final:0.8", "lora")
    names = ",".join(args.lora or [])
    added = [f"{adapter.folder}:{weight:g}" for adapter, weight in read_adapters(names)]
    base = own.arguments["base"] if is_lora and own is not None else args.model
    added = [f"{args.model}:1"] * is_lora + added
    pipe = load(args.model, dtype="fp32", lora=names or None)
    card = pipe.card or Card("", "generator", "", "")
    pipe.card = replace(card, about=f"{base} with the LoRA {', '.join(added)}")
    with new_folder(args.out) as new, silent():
        pipe.save_pretrained(new)
    if args.json:
        print(json.dumps({"folder": str(args.out), "base": base, "lora": added}))
    else:
        print(f"{args.out}/ ({pipe.card.about})")
