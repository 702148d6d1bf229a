"""`argen models`."""

import argparse
import json

from argen.hub.cards import is_own

HELP = "list what ships and which published weights can be loaded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", metavar="ID", help="whether the files of a model are whole")
    what.add_argument(
        "--memory",
        nargs="*",
        metavar="MODEL",
        help="how much memory the weights of each take, or of ids and saved folders, and what fits here: the weights and what drawing an image needs "
        "beside, 0.84 GB and, for its keys and values, 15%% of a generator's network (by docs/measurements.md)",
    )
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
    if args.memory is not None:
        report, errors = memory(args.memory)
        if report["models"]:
            print(json.dumps(report, indent=1) if args.json else memory_text(report))
        if errors:
            raise ValueError("; ".join(errors))
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


def memory(models: list[str]) -> tuple[dict, list[str]]:
    """The bytes of the weights of models, by default of all, in each precision, and in which they fit into the memory that is free on the best
    device here, with what running them needs; and what is wrong with those that have no size, a line each."""
    from argen.device import pick
    from argen.hub.cards import all_cards
    from argen.hub.memory import free

    device = pick()
    available, rows, errors = free(device), [], []
    for model in models or all_cards():
        try:
            rows.append(memory_row(model, available))
        except (ValueError, OSError) as error:
            errors.append(str(error))
    return {"device": device.type, "free": available, "models": rows}, errors


def memory_row(model: str, available: int) -> dict:
    """An entry of `memory`.

    Raises:
        ValueError: there is no such model, or its files do not say its size.
    """
    from argen.hub.cards import all_cards, check_known, kind_of
    from argen.hub.loading import check_files
    from argen.hub.memory import size_of_card, size_of_files

    check_known(model)
    card, kind = all_cards().get(model), kind_of(model)
    size = size_of_files(model) if card is None else size_of_card(card)
    if card is None:
        check_files(model)
    dtypes = ("fp32", "bf16", "fp16") if card is None else card.dtypes
    sizes = {name: size for name, size in size.table().items() if name not in ("bf16", "fp16") or name in dtypes}
    generates = kind in (None, "generator")
    needs = {name: value and value + size.running(name, generates) for name, value in sizes.items()}
    fits = [name for name, needed in needs.items() if needed is not None and needed <= available]
    return {"id": model, "kind": kind, "bytes": sizes, "running": needs, "fits": fits}


def memory_text(report: dict) -> str:
    """The same as a table."""
    width = max(len(row["id"]) for row in report["models"])
    names = list(report["models"][0]["bytes"])
    lines = [
        f"{report['free'] / 1e9:.1f} GB are free on {report['device']}; weights with their text encoder in GB, and as what each fits, with what running it needs:"
    ]
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
