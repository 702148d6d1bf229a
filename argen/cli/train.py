"""`argen train`."""

import argparse
import tomllib
from pathlib import Path

from argen.command import add_settings
from argen.registry import recipes
from argen.words import cut
from samplers.settings import settings_of

HELP = "train a model"
DESCRIPTION = """Train a model: a generator or an image tokenizer on your own images (--images), by the recipe of its published code, or one of the shipped
family, emoji-..., on sets that `argen data` makes. A run that was stopped resumes with the same command."""
OWN = [  # settings of `argen.train.own.options.OwnOptions` that have a flag of their own
    "images", "captions", "image_column", "caption_column", "label_column", "control_column", "split", "missing_captions", "strict", "init", "size", "text_encoder",
    "image_size", "crops", "control", "lora", "batch_size", "micro_batch", "learning_rate", "warmup", "dropped", "described", "objective", "ema_decay", "evaluate_every", "keep_checkpoints", "tracker",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from argen.train.own.options import OwnOptions

    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help=", ".join(recipes),
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoints, log, sample grids; resumes from checkpoints there",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="image tokenizer: of own images any; else a trained folder (default: the shipped one)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="of own images, how many; else stop after step N of the schedule"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks first: faster steps; on a CPU this needs a C++ compiler",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches")
    own = parser.add_argument_group(
        "own images", "of the recipes " + ", ".join(name for name in recipes if not name.startswith("emoji-"))
    )
    own.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML with some of these options and steps; others on the line win"
    )
    add_settings(own, OwnOptions, OWN, "the recipe's")
    parser = parser.add_argument_group("the shipped family", "of the recipes emoji-...")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="made by `argen data emoji`; all of argen's own recipes need it"
    )
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="made by `argen data scenes`")
    parser.add_argument("--clip", type=Path, metavar="DIR", help="trained emoji-clip (default: the shipped one)")
    parser.add_argument("--vae", type=Path, metavar="DIR", help="trained emoji-vae (default: the shipped one)")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="trained emoji-judge (default: the shipped one)")
    parser.add_argument(
        "--generator",
        type=Path,
        metavar="DIR",
        help="trained generator that a second stage, emoji-control or emoji-drafter starts from (default: the shipped one)",
    )
    parser.add_argument(
        "--x",
        metavar="KIND-SIZE",
        help="what emoji-xar predicts at a time: cell-4 (default), cell-1, a token, cell-8, the whole image, subsample-2, scale-2",
    )
    parser.add_argument("--setting", choices=("cpu", "gpu"), default="cpu", help="length and batch size")


def read_config(args: argparse.Namespace) -> None:
    """Set options that were not given to what the file of --config says.

    Raises:
        ValueError: it cannot be read, or has something else; says what.
    """
    from argen.train.own.options import OwnOptions

    known = settings_of(OwnOptions)
    try:
        content = tomllib.loads(args.config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{args.config} is no TOML ({error}): expected lines as size = 'B'") from error
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in (*OWN, "tokenizer", "steps"):
            raise ValueError(
                f"{args.config} has {cut(repr(key))}: expected options of own images, as size or batch-size"
            )
        if name == "steps" and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{args.config}: steps is {cut(repr(value))}: expected a whole number, at least 1")
        if getattr(args, name) in (None, False):
            try:
                setattr(
                    args, name, value if name == "steps" or known[name].kind is bool else known[name].parse(str(value))
                )
            except ValueError as error:
                raise ValueError(f"{args.config}: {error}") from error


def run(args: argparse.Namespace) -> None:
    from argen.files import WEIGHTS
    from argen.jobs.trainings import attach
    from argen.train import recipes as training
    from argen.train.own.options import OwnOptions
    from argen.train.own.run import OwnRecipe
    from argen.train.own.run import run as train_own

    recipe = recipes[args.recipe]
    if args.config is not None:
        if not isinstance(recipe, OwnRecipe):
            raise ValueError(f"--config is for own images, and {args.recipe} is of the shipped family: leave it out")
        read_config(args)
    given = [
        name for name in ("data", "scenes", "clip", "vae", "judge", "generator", "x") if getattr(args, name) is not None
    ]
    if isinstance(recipe, OwnRecipe):
        if args.images is None or given:
            what = f"--{given[0]} is of the shipped family: leave it out" if given else "give --images a folder"
            raise ValueError(f"the recipe {args.recipe} learns from your own images: {what}")
        lock = attach(args.out)  # noqa: F841 - held to the end
        options = {name: value for name in (*OWN, "tokenizer") if (value := getattr(args, name)) is not None}
        scores = train_own(recipe, OwnOptions(**options), args.out, args.seed, args.steps, compile=args.compile)
        if scores:  # of the first process
            print(f"{args.out / 'final'}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        return
    if foreign := [name for name in OWN if getattr(args, name) not in (None, False)]:
        raise ValueError(
            f"--{foreign[0].replace('_', '-')} is for own images, and {args.recipe} is of the shipped family: leave it out"
        )
    args.tokenizer = None if args.tokenizer is None else Path(args.tokenizer)
    parts = {name: getattr(args, name) for name in ("clip", "tokenizer", "vae", "judge", "generator")}
    options = {"data": args.data, "scenes": args.scenes, "out": args.out, "seed": args.seed, "steps": args.steps}
    options |= {"compile": args.compile, "x": args.x, "shipped": WEIGHTS}
    scores = training.run(args.recipe, args.setting, **parts, **options)
    print(f"{args.out}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
