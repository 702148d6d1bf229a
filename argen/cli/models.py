"""`argen models`."""

import argparse
import json

from argen.hub.cards import is_own

HELP = "list what ships and which published weights can be loaded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", metavar="ID", help="whether the files of a model are whole")
    what.add_argument("--memory", action="store_true", help="how much memory each takes, and what fits here")
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
    if args.memory:
        report = memory()
        print(json.dumps(report, indent=1) if args.json else memory_text(report))
        return
    rows = []
    for entry in local_cache.local_cache():
        model = all_cards()[entry.id]
        row = {
            "id": entry.id,
            "kind": model.kind,
            "ships": entry.ships,
            "parameters_in_millions": model.parameters or None,
        }
        row |= {"bytes": entry.bytes if entry.folder else None, "folder": entry.folder and str(entry.folder)}
        rows.append(row | {"licence": model.licence, "about": model.about, "repo": model.repo})
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    width = max(len(row["id"]) for row in rows)
    for title, group in groups(rows).items():
        print(f"{title}:")
        for row in group:
            downloaded = ", here" if row["folder"] and not row["ships"] else ""
            about = f"{row['about']} ({row['licence']}{downloaded})"
            print(f"  {row['id']:{width}} {row['kind']:10} {size_text(row):>19}  {about}")


def memory() -> dict:
    """The bytes of every model's weights in each precision, and in which it fits into the memory that is free on the best device here."""
    from argen.device import pick
    from argen.hub.cards import list_models
    from argen.hub.memory import PRECISIONS, SHARE, free, size_of_card

    device = pick()
    available, rows = free(device), []
    for card in list_models():
        size = size_of_card(card)
        sizes = {name: size.bytes(name) for name in PRECISIONS if name not in ("bf16", "fp16") or name in card.dtypes}
        fits = [name for name, needed in sizes.items() if needed is not None and needed <= SHARE * available]
        rows.append({"id": card.id, "kind": card.kind, "bytes": sizes, "fits": fits})
    return {"device": device.type, "free": available, "models": rows}


def memory_text(report: dict) -> str:
    """The same as a table."""
    width = max(len(row["id"]) for row in report["models"])
    names = list(report["models"][0]["bytes"])
    lines = [f"{report['free'] / 1e9:.1f} GB are free on {report['device']}; weights with their text encoder in GB:"]
    lines.append(f"  {'':{width}} {''.join(f'{name:>8}' for name in names)}  fits here")
    for row in report["models"]:
        sizes = "".join(f"{'' if size is None else f'{size / 1e9:.2f}':>8}" for size in row["bytes"].values())
        lines.append(f"  {row['id']:{width}} {sizes}  {', '.join(row['fits']) or 'nothing'}")
    return "\n".join(lines)


def groups(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows by where they come from, without the places that nothing comes from."""
    titles = "Ships with argen", "In installed packages", "Published, fetched from the hub when first used"
    sources = [2 if not row["ships"] else 0 if is_own(row["id"]) else 1 for row in rows]
    groups = {
        title: [row for row, source in zip(rows, sources, strict=True) if source == number]
        for number, title in enumerate(titles)
    }
    return {title: group for title, group in groups.items() if group}


def size_text(row: dict) -> str:
    """The size of a model's files where they ship, else its parameters; nothing where it is not known."""
    if row["ships"] and row["bytes"]:
        return f"{row['bytes'] / 1e6:.1f} MB"
    millions = row["parameters_in_millions"]
    return f"{millions:,.{0 if millions >= 10 else 1 if millions >= 1 else 3}f}M parameters" if millions else ""
