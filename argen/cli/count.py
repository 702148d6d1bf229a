"""`argen count`."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from argen.command import (
    COUNT_RATE,
    diffusion_arguments,
    load_diffusion_model,
    load_options,
    writable,
    writable_all,
)
from argen.words import number_of

if TYPE_CHECKING:
    from argen.diffusion.count_token import CountStep

HELP = "generate an exact number of objects (count-token optimisation)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt", help='a number from 1 to 25 and what is counted, for example "five apples" or "two dozen eggs"'
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="PNG file")
    parser.add_argument(
        "--plain",
        type=Path,
        metavar="FILE",
        help="also the image before, from the same noise: the same where that is right",
    )
    parser.add_argument(
        "--token", type=Path, metavar="FILE", help="also the token, a textual inversion in .safetensors"
    )
    parser.add_argument(
        "--use", type=Path, metavar="FILE", help="draw with a token that was made before, optimise nothing"
    )
    parser.add_argument("--iterations", type=int, default=50, metavar="N", help="at most (default: 50)")
    parser.add_argument("--learning-rate", type=float, metavar="R", help=COUNT_RATE)
    parser.add_argument(
        "--noises",
        type=int,
        default=1,
        metavar="N",
        help="images that share the token, so that others can (default: 1)",
    )
    parser.add_argument(
        "--clip-count", type=Path, metavar="FILE", help="clipcount_pretrained.ckpt; argen/emoji-sd needs none"
    )
    parser.add_argument(
        "--detector", metavar="DIR", help="of objects, on the hub or in a folder, as hustvl/yolos-tiny (default: none)"
    )
    diffusion_arguments(parser, 1, 0)


def run(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from argen.diffusion import CountToken
    from argen.diffusion.base import unit_noise
    from argen.diffusion.count_token import check_noises, read_token
    from argen.diffusion.model_settings import counters, counting, counting_rate
    from argen.metadata import save_made
    from argen.words import parse_count
    from tokenizers_img.pixels import to_pil

    files = writable_all(args.out, args.plain)
    if args.token:
        writable(args.token, ".safetensors")
    number, things = parse_count(args.prompt)
    check_noises(args.noises)
    vector, metadata = read_token(args.use) if args.use else (None, {})
    if metadata.get("count", str(number)) != str(number):
        raise ValueError(f"{args.use} is the token of {metadata['count']} things: ask for so many")
    pipe = load_diffusion_model(args.model, args.device, load_options(args))
    pipe.set_progress_bar_config(disable=True)
    counter_settings = {} if args.use else counters(args.model, pipe.device, args.clip_count, args.detector)
    token = CountToken(pipe, **counter_settings, **counting(args.model, number, args.steps, args.guidance_scale))
    rate = counting_rate(args.model, args.learning_rate)
    latents, first, best = unit_noise(pipe, torch.Generator().manual_seed(args.seed)), None, None
    if vector is not None:
        before = [token.draw(things, number, latents)] if args.plain else []
        token.use(vector)
        images = [token.draw(things, number, latents), *before]
    else:
        optimisation = {"steps": args.iterations, "learning_rate": rate}
        other_noises = [
            unit_noise(pipe, torch.Generator().manual_seed(args.seed + offset)) for offset in range(1, args.noises)
        ]
        noises = torch.cat([latents, *other_noises])
        for step in tqdm(token.search(things, number, noises, **optimisation), total=args.iterations, desc="count"):
            first, best = first or step, step if step.best else best
        images = [to_pil(step.image[0]) for step in ((best, first) if args.plain else (best,))]
    if args.token:
        token.save(args.token, f"<{number}-things>", count=number, things=things, model=args.model, seed=args.seed)
    settings_used = {
        "prompt": args.prompt,
        "model": args.model,
        "seed": args.seed,
        "noises": args.noises,
        "use": args.use,
    }
    settings_used |= {"iterations": args.iterations, "learning_rate": rate, **token.settings}
    save_made(images[:1], files[:1], "count", settings_used | {"count": best and best.counts[0]}, pipe)
    save_made(images[1:], files[1:], "count", settings_used | {"count": first and first.counts[0], "plain": True}, pipe)
    if args.json:
        counts = {"count": best and best.counts[0], "before": first and first.counts[0]}
        print(json.dumps({"file": str(args.out), "prompt": token.prompt(things, number)} | counts))
    else:
        print(f"{args.out} ({token.prompt(things, number)}{_counted(number, first, best)})")


def _counted(number: int, first: "CountStep | None", best: "CountStep | None") -> str:
    """What the counter found in the image that is written and in the one before, in words; nothing where nothing was optimised."""
    if first is None or best is None:
        return ""
    counted = f", counted {best.counts[0]:.1f}"
    if best.index:
        counted += f" after {number_of(best.index, 'step')}, {first.counts[0]:.1f} before"
    elif best.is_right(number):
        counted += ", right without optimisation"
    return counted if best.is_right(number) else f"{counted}: not {number}, try another --seed"
