"""`argen models`."""

import argparse
import json

HELP = "list what ships and which published weights can be loaded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", metavar="ID", help="whether the files of a model are whole")
    what.add_argument("--delete", metavar="ID", help="delete what was downloaded of a model")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    from argen.hub import local_cache
    from argen.hub.cards import all_cards

    if args.verify is not None:
        files = local_cache.verify(args.verify)
        if broken := [name for name, is_whole in files.items() if not is_whole]:
            raise ValueError(
                f"{', '.join(broken)} of {args.verify} is missing or broken: install argen or fetch it again"
            )
        print(json.dumps(files) if args.json else f"{args.verify}: {len(files)} files, all whole")
        return
    if args.delete is not None:
        deleted = local_cache.delete(args.delete)
        print(json.dumps({"deleted": deleted}) if args.json else f"deleted: {', '.join(deleted)}")
        return
    rows = []
    for entry in local_cache.local_cache():
        model = all_cards()[entry.id]
        row = {"id": entry.id, "kind": model.kind, "ships": entry.ships, "parameters_in_millions": model.parameters}
        row |= {"bytes": entry.bytes if entry.folder else None, "folder": entry.folder and str(entry.folder)}
        rows.append(row | {"licence": model.licence, "about": model.about, "repo": model.repo})
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for title, ships in (("Ships with argen", True), ("Published, fetched from the hub when first used", False)):
        print(f"{title}:")
        for row in (row for row in rows if row["ships"] is ships):
            size = f"{row['bytes'] / 1e6:.1f} MB" if ships else f"{row['parameters_in_millions']:,.0f}M parameters"
            downloaded = ", here" if row["folder"] and not ships else ""
            print(f"  {row['id']:34} {row['kind']:10} {size:>17}  {row['about']} ({row['licence']}{downloaded})")
