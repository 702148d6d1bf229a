"""`argen bind`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from argen.command import (
    BINDING,
    diffusion_arguments,
    load_diffusion_model,
    load_options,
    writable_all,
)

HELP = "draw a prompt so that colours and things stay with their objects (ToMe)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help='for example "a blue robot and a green pizza"')
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="PNG file")
    parser.add_argument(
        "--plain", type=Path, metavar="FILE", help="also the image without binding, from the same noise"
    )
    parser.add_argument(
        "--bind",
        action="append",
        metavar="OBJECT=WORDS",
        help="what belongs to an object, both as in the prompt, e.g. robot=blue; again for each (default: found by rules)",
    )
    parser.add_argument("--settings", help=BINDING)
    diffusion_arguments(parser, 50, 7.5)


def run(args: argparse.Namespace) -> None:
    import torch

    from argen.diffusion import SemanticBinding, model_settings
    from argen.diffusion.prompts import parse
    from argen.diffusion.tome import check_settings
    from argen.metadata import save_made

    files = writable_all(args.out, args.plain)
    bindings = None
    if args.bind:
        if not all(part.partition("=")[1] for part in args.bind):
            raise ValueError(f"--bind {' '.join(args.bind)}: expected OBJECT=WORDS, e.g. robot=blue")
        bindings = {noun: words for noun, _, words in (part.partition("=") for part in args.bind)}
    binding = parse(args.prompt, bindings)
    settings = check_settings(args.settings or model_settings.binding(args.model))
    bound = SemanticBinding(load_diffusion_model(args.model, args.device, load_options(args)))
    sampling = model_settings.drawing(args.model, args.steps, args.guidance_scale)
    generator = torch.Generator().manual_seed
    images = [bound(binding, settings=settings, generator=generator(args.seed), **sampling).images[0]]
    if args.plain:
        images += bound.pipe(args.prompt, generator=generator(args.seed), **sampling).images
    settings_used = {"prompt": args.prompt, "model": args.model, "seed": args.seed, **sampling, "bind": args.bind}
    save_made(images[:1], files[:1], "bind", settings_used | {"settings": settings}, bound.pipe)
    save_made(images[1:], files[1:], "bind", settings_used | {"plain": True}, bound.pipe)
    if args.json:
        print(
            json.dumps({"file": str(args.out), "binding": asdict(binding), "steps": [asdict(s) for s in bound.history]})
        )
    else:
        print(f"{args.out} ({binding})")
