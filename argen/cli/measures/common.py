"""What the measures of `argen eval` share: options, drawing, reports."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argen.command import (
    check_loading,
    device_and_json,
    device_for,
    load_arguments,
    load_diffusion_model,
    load_model,
    load_options,
)

if TYPE_CHECKING:
    from argen.eval.images import ImageSet
    from argen.eval.judge import Truth

IMAGES = "images: a folder, or a .zip, .npz or .parquet file"
REAL = f"real {IMAGES}, or .npz statistics; emoji: those of the training images, for --features emoji"


def drawing_arguments(add: argparse.ArgumentParser, num: str, prompts: str | None) -> None:
    add.add_argument("--num", type=int, metavar="N", help=num)
    default = f" (default: {prompts})" if prompts else ""
    add.add_argument(
        "--prompts", type=Path, required=not prompts, metavar="FILE", help=f"one prompt a line, taken in turn{default}"
    )
    add.add_argument("--seed", type=int, default=0, help="image i is drawn from (seed, i) alone (default: 0)")
    add.add_argument("--guidance-scale", type=float, metavar="G", help="(default: the model's)")
    load_arguments(add)


def feature_arguments(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--features",
        default="inception",
        metavar="NAME",
        help="feature extractor: inception (FID as published), emoji (ships) or clip:ID (default: inception)",
    )
    add.add_argument("--inception-weights", type=Path, metavar="FILE", help="(default: torch's cache, or fetched)")
    add.add_argument(
        "--protocol",
        default="adm",
        metavar="NAME",
        help="resizing protocol for inception: adm, pytorch-fid, clean or torchmetrics (default: adm)",
    )
    add.add_argument("--crop", metavar="NAME-SIZE", help="of the real images: adm-256 (ImageNet), square-256 (COCO)")
    add.add_argument("--batch-size", type=int, default=32, metavar="B", help="images at a time (default: 32)")


def tool_arguments(add: argparse.ArgumentParser, num: int) -> None:
    add.add_argument(
        "--model", default="argen/emoji-sd", metavar="DIR", help="Stable Diffusion of emoji (default: argen/emoji-sd)"
    )
    add.add_argument("--num", type=int, default=num, metavar="N", help=f"prompts (default: {num})")
    add.add_argument("--seed", type=int, default=0, help="image i is drawn from (seed, i) alone (default: 0)")
    add.add_argument("--steps", type=int, metavar="N", help="of the sampler")
    add.add_argument("--guidance-scale", type=float, metavar="G")
    load_arguments(add, "dtype", "attention")


def judged_arguments(add: argparse.ArgumentParser, num: int) -> None:
    add.add_argument("--model", default="argen/emoji-parti", metavar="ID", help="(default: argen/emoji-parti)")
    add.add_argument("--num", type=int, default=num, metavar="N", help=f"the first N images (default: {num})")
    add.add_argument("--seed", type=int, default=0, help="image i is drawn from (seed, i) alone (default: 0)")
    add.add_argument("--guidance-scale", type=float, metavar="G", help="(default: the model's)")
    load_arguments(add)


def output_arguments(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="report.json, grid.png, images and features; resumes from what is there",
    )
    device_and_json(add)


def extractor_of(args: argparse.Namespace):
    from argen.device import pick
    from argen.eval import features

    device = pick(args.device)
    if args.features == "inception":
        return features.inception_features(args.inception_weights, args.protocol, device)
    if args.features == "emoji":
        return features.encoder_features("emoji", load_model("argen/emoji-clip", args.device))
    if args.features.startswith("clip:"):
        name = args.features.removeprefix("clip:")
        return features.clip_features(name, features.PublishedCLIP(name, device))
    raise ValueError(f"unknown features {args.features!r}: expected inception, emoji or clip: and a hub id or folder")


def check_drawing(args: argparse.Namespace) -> None:
    """Check that ``--model`` can be loaded as the options say, before what looks at its images is.

    Raises:
        ValueError: see `argen.command.check_loading`.
    """
    options = load_options(args)
    check_loading(args.model, device_for(args.device, options), options, "generator")


def drawn_by(model: Any) -> dict[str, str]:
    """Settings that say which weights draw, and in which precision: a run that is resumed with others would mix them."""
    from argen.metadata import made_by

    maker = made_by(model)
    return {"model_weights": maker["weights"]} | ({"dtype": maker["dtype"]} if "dtype" in maker else {})


def draw_samples(
    args: argparse.Namespace,
    prompts: list[str],
    num: int,
    settings: dict,
    folder="samples",
    call_arguments=lambda _: {},
):
    """Generate images with ``--model`` from `prompts` in turn, and save them in `folder`.

    Args:
        call_arguments: indices of images -> further arguments of the call for them.
    """
    from argen.eval import run
    from argen.eval.run_dir import lock_run_dir

    if num < 2:
        raise ValueError(f"--num is {num}: expected at least 2")
    settings |= {"model": args.model, "num": num, "seed": args.seed, "guidance_scale": args.guidance_scale}
    settings |= {"prompts": run.digest(prompts), "prompt_order": "i % prompts", "uint8": "rounded"}
    pipe = load_model(args.model, args.device, "generator", load_options(args))
    pipe.set_progress_bar_config(disable=True)
    settings |= drawn_by(pipe)
    lock_run_dir(args.out, settings)

    def sample(rows: range):
        generator_of = [run.generator_of(args.seed, index) for index in rows]
        texts = [prompts[index % len(prompts)] for index in rows]
        return pipe(texts, guidance_scale=args.guidance_scale, generator=generator_of, **call_arguments(rows)).images

    return run.draw(sample, num, args.out / folder)


def judged(
    args: argparse.Namespace, truths: "Sequence[Truth]", num: int, settings: dict
) -> "tuple[dict, dict, dict, ImageSet]":
    """Draw the prompts of `truths` in turn and judge the images -> what `finish` takes.

    Args:
        settings: of the run, besides those of every drawing; ``tokens`` is how many an image has, None for all.
    """
    from argen.eval import judge
    from argen.eval import run as runs
    from argen.eval.features import weights_digest

    check_drawing(args)
    network, seconds = load_model("argen/emoji-judge", args.device), {}
    settings = {"judge": weights_digest(network)} | settings
    arguments = {"num_tokens": settings.get("tokens")}
    with runs.timed(seconds, "draw"):
        samples = draw_samples(
            args, [truth.prompt for truth in truths], num, settings, call_arguments=lambda rows: arguments
        )
    with runs.timed(seconds, "judge"):
        scores = judge.evaluate(network, samples, truths)
    return settings, scores, seconds, samples


def finish(args: argparse.Namespace, settings: dict, scores: dict, seconds: dict, samples) -> None:
    from argen.eval import run

    table = run.report(args.out, settings, scores, seconds, samples)
    if table:
        print(json.dumps(scores) if args.json else table)


def pipeline_of(args: argparse.Namespace, settings: dict):
    """Load a diffusers pipeline and the judge -> these, and the function of an image's generator; locks the folder for `settings`."""
    from argen.eval import run
    from argen.eval.run_dir import lock_run_dir

    names = ("model", "num", "seed", "steps", "guidance_scale")
    pipe = load_diffusion_model(args.model, args.device, load_options(args))
    pipe.set_progress_bar_config(disable=True)
    settings |= drawn_by(pipe)
    lock_run_dir(args.out, settings | {name: getattr(args, name) for name in names})
    return pipe, load_model("argen/emoji-judge", args.device), partial(run.generator_of, args.seed)
