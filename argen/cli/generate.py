"""`argen generate`."""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from argen.command import (
    CONTROLS,
    add_settings,
    device_and_json,
    load_arguments,
    load_model,
    load_options,
    size,
    writable,
    writable_images,
)

HELP = "generate images from a prompt"

FLAGS = (  # settings of a request
    "num_images",
    "seed",
    "model",
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
    "sampler",
    "steps",
    "num_tokens",
    "num_candidates",
    "num_beams",
    "literal",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from argen.request import Request

    parser.add_argument("prompt", nargs="?", help='what to draw, for example "a red apple, noto style"')
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help="PNG file; with -n 2 or more FILE-1.png, ..."
    )
    add_settings(parser, Request, FLAGS, "the model's")
    parser.add_argument("--control", type=Path, metavar="PNG", help="image to follow, for a model that takes one")
    parser.add_argument("--control-type", metavar="TYPE", help=f"how it is read: {CONTROLS} (default: canny)")
    parser.add_argument("--control-strength", type=float, metavar="X", help="0: not at all (default: 1)")
    parser.add_argument(
        "--size",
        type=size,
        metavar="WxH",
        help="of the image (default: the model's): of what is drawn under a control, or by a checkpoint that does not say it; other images are scaled",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="image tokenizer of a LlamaGen that --model FILE names")
    parser.add_argument(
        "--from",
        type=Path,
        dest="origin",
        metavar="PNG",
        help="take prompt and settings from an image that argen made; other options win",
    )
    device_and_json(parser)
    load_arguments(parser)


def controlled(args, overrides: dict, own_file: bool) -> dict:
    """Return the control that the options set, on top of `overrides`; for a checkpoint file of one's own, --size is the model's."""
    control = {"kind": args.control_type, "strength": args.control_strength, "size": args.size}
    control = {name: value for name, value in control.items() if value is not None}
    if args.tokenizer and not own_file:
        raise ValueError("--tokenizer goes with --model FILE, the checkpoint of a LlamaGen")
    if own_file and args.size and not args.control:
        if args.size[0] != args.size[1]:
            raise ValueError(f"--size is {args.size[0]}x{args.size[1]}: expected a square, e.g. 256x256")
        control.pop("size")
    if args.control:
        from argen.images import open_image
        from argen.request import Control

        return {"control": Control(open_image(args.control), **control)}
    if "control" not in overrides:
        if control.keys() - {"size"}:
            raise ValueError("--control-type and --control-strength need --control, the image to follow")
        return {}
    return {"control": replace(overrides["control"], **control)} if control else {}


def run(args: argparse.Namespace) -> None:
    from argen.metadata import differences, read_request, save_images
    from argen.request import Request

    writable(args.out)
    overrides = {name: getattr(args, name) for name in ("prompt", *FLAGS) if getattr(args, name) is not None}
    if args.origin:
        origin = read_request(args.origin).explicit_settings()
        overrides = origin | ({"sampler_args": {}} if "sampler" in overrides else {}) | overrides
    path = Path(args.model or "")  # of a checkpoint, which --size may concern
    own_file = args.model is not None and os.path.exists(path) and not (path / "model_index.json").is_file()
    overrides |= controlled(args, overrides, own_file)
    if "prompt" not in overrides:
        raise ValueError('no prompt: say what to draw, for example argen generate "a red apple" -o apple.png')
    request = Request(**overrides)
    paths = writable_images(args.out, request.num_images)

    checkpoint_settings = {"tokenizer": args.tokenizer, "image_size": args.size[0] if args.size and own_file else None}
    pipe = load_model(request.model, args.device, "generator", load_options(args), **checkpoint_settings)
    if args.origin and (difference := differences(args.origin, pipe)):
        print(f"argen generate: {difference}", file=sys.stderr)
    reading = pipe.read_prompt(request.prompt, request.literal)
    for note in reading.notes:
        print(f"argen generate: {note}", file=sys.stderr)
    started = time.perf_counter()
    with pipe.progress_bar(total=100) as bar:
        for job in pipe.run(request):
            bar.update(round(100 * job.progress) - bar.n)
    seconds = time.perf_counter() - started
    save_images(list(zip(job.images, job.requests, strict=True)), paths, size=None if request.control else args.size)
    if args.json:
        scores = job.scores or [None] * len(paths)
        images = [
            {"file": str(path), **request.to_dict(), "score": score, "tokens": tokens}
            for path, request, score, tokens in zip(
                paths, job.requests, scores, job.tokens.flatten(1).tolist(), strict=True
            )
        ]
        run = {
            "seconds": round(seconds, 3),
            "sampler": request.sampler,
            "lossless": job.lossless,
            "passes": job.forward_passes,
            "revised_prompt": reading.text,
        }
        print(json.dumps(run | {"tokens_per_step": round(job.tokens_per_step, 3), "images": images}))
    else:
        sampler_note = (
            f"{request.sampler}, {'lossless' if job.lossless else 'relaxed'}, {job.tokens_per_step:.1f} tokens per step"
        )
        print(f"{', '.join(map(str, paths))} ({seconds:.1f} s, {sampler_note})")
