"""`argen samplers`."""

import argparse
import json

from argen.registry import about_of, samplers
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
        print(f"{'':12} {'; '.join(traits(row))}")
        for name, setting in row["settings"].items():
            default = "" if setting["default"] is None else f" (default: {setting['default']})"
            print(f"    {name:10} {setting['help']}: {setting['expected']}{default}")


def traits(row: dict) -> list[str]:
    """What a sampler keeps and writes, how it resumes and what it needs, in words."""
    kept = "lossless" if row["lossless"] else "relaxed"
    written = "for models of tokens" if row["draws"] == "tokens" else "for models of continuous latents"
    return [
        kept,
        written,
        f"resumes {row['resumes']}",
        *([f"needs a model with a {row['needs']}"] if row["needs"] else []),
    ]


def described(name: str) -> dict:
    """Return a sampler and its settings, for JSON."""
    cls = samplers[name]
    settings = {
        setting.name: {"help": setting.help, "expected": setting.expected, "default": setting.default}
        for setting in settings_of(cls).values()
        if setting.kind
    }
    traits = {"draws": getattr(cls, "draws", "tokens"), "lossless": cls().lossless, "needs": getattr(cls, "needs", "")}
    traits["resumes"] = getattr(cls, "resumes", "exactly")
    return {"name": name, "about": about_of(name), **traits, "settings": settings}
