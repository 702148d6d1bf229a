"""`argen samplers`."""

import argparse
import json

from argen.registry import samplers
from samplers.settings import settings_of

HELP = "list the samplers with their settings, as --sampler NAME:SETTING=VALUE,... takes them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Print the samplers."""
    rows = [described(name) for name in samplers]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['name']:12} {row['about']}")
        for name, setting in row["settings"].items():
            print(f"    {name:10} {setting['help']}: {setting['expected']} (default: {setting['default']})")


def described(name: str) -> dict:
    """Return a sampler and its settings, for JSON."""
    cls = samplers[name]
    settings = {
        setting.name: {"help": setting.help, "expected": setting.expected, "default": setting.default}
        for setting in settings_of(cls).values()
        if setting.kind
    }
    about = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
    return {"name": name, "about": about, "draws": getattr(cls, "draws", "tokens"), "settings": settings}
