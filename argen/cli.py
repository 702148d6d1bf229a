"""The command `argen`."""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from argen import __version__, evaluate
from argen.bounds import check_size
from argen.command import (
    Parser,
    check_numbers,
    device_and_json,
    guarded,
    load_model,
    writable,
    writable_all,
    writable_folder,
    writable_images,
)

COMMANDS = {}
CONTROLS = (
    "canny, hed, lineart, lineart-inverted, depth, depth-midas, segments, seg or map"  # argen.models.annotators.KINDS
)
PIPELINE = "folder of a Stable Diffusion (XL) pipeline, or OWNER/NAME on the hub (default: argen/emoji-sd)"


def command(function):
    COMMANDS[function.__name__] = function
    return function


def size(text: str) -> tuple[int, int]:
    """ "128x64" -> width and height."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid size: expected WIDTHxHEIGHT in pixels, e.g. 128x128")
    try:
        return check_size((int(width), int(height)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def steps(text: str) -> int | tuple[int, int]:
    """ "40", or "50,15" -> the steps of the first and of the last part."""
    parts = text.split(",")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps: expected N, or FIRST,LAST as 50,15")
    return int(text) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def diffusion(add: argparse.ArgumentParser, steps: int, guidance: float) -> None:
    """What the tools on diffusers' pipelines share; `steps` and `guidance` are those that are usual."""
    own = "of argen/emoji-sd its own"
    add.add_argument("--model", default="argen/emoji-sd", metavar="DIR", help=PIPELINE)
    add.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    add.add_argument("--steps", type=int, metavar="N", help=f"of the sampler (default: {steps}; {own})")
    add.add_argument("--guidance-scale", type=float, metavar="G", help=f"(default: {guidance}; {own})")
    device_and_json(add)


def parser() -> Parser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    top = Parser(prog="argen", description="Autoregressive image generation: pictures from words, offline.")
    top.add_argument("--version", action="version", version=f"argen {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = commands.add_parser("generate", help="make pictures from a prompt")
    add.add_argument("prompt", nargs="?", help='what to draw, for example "a red apple, noto style"')
    add.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help="PNG file; with -n 2 or more FILE-1.png, ..."
    )
    add.add_argument("-n", "--num", type=int, dest="num_images", metavar="N", help="number of pictures (default: 1)")
    add.add_argument("--seed", type=int, metavar="S", help="picture i is drawn with seed S + i (default: 0)")
    add.add_argument(
        "--model", metavar="ID", help="see `argen models`, or a saved pipeline's folder (default: argen/emoji-parti)"
    )
    add.add_argument(
        "--guidance-scale",
        type=float,
        metavar="G",
        help="how closely to follow the prompt, 1: no guidance (default: the model's)",
    )
    add.add_argument(
        "--temperature", type=float, metavar="T", help="0: always the likeliest token (default: the model's)"
    )
    add.add_argument(
        "--top-k", type=int, metavar="K", help="draw among the K likeliest tokens, 0: all (default: the model's)"
    )
    add.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw among the likeliest tokens of joint probability P (default: the model's)",
    )
    add.add_argument(
        "--sampler",
        metavar="NAME",
        help="how the tokens are written: sequential; jacobi, the same pictures in fewer passes; auto, the faster of the two; sjd "
        "and recycling, other pictures of the same law; speculative, the same with the model's drafter; gsd, "
        "lantern and zipar, relaxed; of a model of continuous latents: sde, euler or heun (default: auto)",
    )
    add.add_argument("--lantern-k", type=int, metavar="K", help="neighbours that lend their probability (default: 10)")
    add.add_argument("--lantern-delta", type=float, metavar="D", help="they lend at most D, 0 to 1 (default: 0.2)")
    add.add_argument(
        "--lantern-lambda", type=float, metavar="L", help="or so much that a token's own is multiplied by L, at most"
    )
    add.add_argument(
        "--steps",
        type=steps,
        metavar="N[,LAST]",
        help="of the flow of a model of continuous latents; two numbers: of its first and of its last part",
    )
    add.add_argument(
        "--tokens",
        dest="num_tokens",
        type=int,
        metavar="K",
        help="of a picture, for a model whose pictures may have any number (default: the model's)",
    )
    add.add_argument(
        "--num-candidates", type=int, metavar="C", help="draw C pictures and keep the -n that fit the prompt best"
    )
    add.add_argument(
        "--num-beams",
        type=int,
        metavar="B",
        help="search: of the candidates with 1, 2, 4 ... tokens go on with the B that fit best, for a model of ordered tokens",
    )
    add.add_argument("--control", type=Path, metavar="PNG", help="picture to follow, for a model that takes one")
    add.add_argument("--control-type", metavar="TYPE", help=f"how it is read: {CONTROLS} (default: canny)")
    add.add_argument("--control-strength", type=float, metavar="X", help="0: not at all (default: 1)")
    add.add_argument(
        "--size",
        type=size,
        metavar="WxH",
        help="of the picture, under a control or of a checkpoint that does not say it (default: the model's)",
    )
    add.add_argument("--tokenizer", metavar="FILE", help="image tokenizer of a LlamaGen that --model FILE names")
    add.add_argument(
        "--from",
        type=Path,
        dest="origin",
        metavar="PNG",
        help="take prompt and settings from a picture that argen made; other options win",
    )
    device_and_json(add)

    add = commands.add_parser("reconstruct", help="turn a picture into tokens and back", formatter_class=formatter)
    add.add_argument("image", type=Path, metavar="IMG")
    add.add_argument("--tokenizer", default="argen/emoji-vitvqgan", metavar="ID", help="see `argen models`")
    add.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="PNG file (default: IMG's name with -reconstructed.png)"
    )
    device_and_json(add)

    add = commands.add_parser("tokenize", help="turn a picture into a file of tokens", formatter_class=formatter)
    add.add_argument("image", type=Path, metavar="IMG")
    add.add_argument("--tokenizer", default="argen/emoji-vitvqgan", metavar="ID", help="see `argen models`")
    add.add_argument("-o", "--out", type=Path, metavar="FILE", help="NPZ file (default: IMG's name with .npz)")
    device_and_json(add)

    add = commands.add_parser("detokenize", help="turn a file of tokens into a picture")
    add.add_argument("file", type=Path, metavar="NPZ", help="made by `argen tokenize`")
    add.add_argument("--tokenizer", metavar="ID", help="refuse files of another one")
    add.add_argument("--tokens", type=int, metavar="K", help="only the first K, where the tokenizer can (FlexTok)")
    add.add_argument("-o", "--out", type=Path, metavar="FILE", help="PNG file (default: the file's name with .png)")
    device_and_json(add)

    add = commands.add_parser(
        "batch", help="draw a table of prompts and settings; asked again, it goes on where it was"
    )
    add.add_argument("table", type=Path, metavar="FILE", help="CSV with the settings' names first, or JSON lines")
    add.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="for ROW-NUMBER.png and pictures.csv")
    add.add_argument("--model", metavar="ID", help="of rows that name none (default: argen/emoji-parti)")
    device_and_json(add)

    add = commands.add_parser("grid", help="one prompt under several settings: a labelled picture and a CSV")
    add.add_argument("prompt")
    add.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="PNG file; the CSV lies beside it")
    for name, what in (("x", "columns"), ("y", "rows"), ("z", "tables below each other")):
        how = f"the {what}, as guidance_scale=1,3,5 or prompt=a cat|a dog"
        add.add_argument(f"--{name}", required=name == "x", metavar="SETTING=VALUES", help=how)
    add.add_argument("--model", default="argen/emoji-parti", metavar="ID", help="(default: argen/emoji-parti)")
    add.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    device_and_json(add)

    add = commands.add_parser("describe", help="say what a picture shows, with a model that reads pictures")
    add.add_argument("image", type=Path, metavar="IMG")
    add.add_argument("question", nargs="?", default="", help="about the picture (default: none, it is described)")
    add.add_argument("--model", default="argen/emoji-seed-lm", metavar="ID", help="(default: argen/emoji-seed-lm)")
    add.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: the likeliest words (default: 1)")
    add.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    device_and_json(add)

    add = commands.add_parser("control", help="make a control picture: edges, depth, a line drawing")
    add.add_argument("image", type=Path, metavar="IMG")
    add.add_argument("--type", default="canny", metavar="TYPE", help=f"{CONTROLS} (default: canny)")
    add.add_argument("--size", type=size, metavar="WxH", help="of the control picture (default: the picture's own)")
    add.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="PNG file")

    add = commands.add_parser("bind", help="draw a prompt so that colours and things stay with their objects (ToMe)")
    add.add_argument("prompt", help='for example "a blue robot and a green pizza"')
    add.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="PNG file")
    add.add_argument("--plain", type=Path, metavar="FILE", help="also the picture without binding, from the same noise")
    add.add_argument(
        "--bind",
        action="append",
        metavar="OBJECT=WORDS",
        help="what belongs to an object, both as in the prompt, as robot=blue; again for each (default: found by rules)",
    )
    add.add_argument("--settings", help=evaluate.BINDING)
    diffusion(add, 50, 7.5)

    add = commands.add_parser("erase", help="write a pipeline that cannot draw some concepts any more (RECE)")
    add.add_argument("concepts", nargs="+", metavar="CONCEPT", help='for example "pizza", or "pizza, taxi"')
    add.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder of the new pipeline")
    add.add_argument(
        "--preset", help="object, object-hard (of argen/emoji-sd), art, nudity or unsafe (default: object)"
    )
    add.add_argument("--target", action="append", metavar="TEXT", help="what takes the place of each concept")
    add.add_argument("--retain", action="append", default=[], metavar="TEXT", help="what must stay as it is")
    add.add_argument("--epochs", type=int, metavar="N", help="of deriving and erasing (default: the preset's)")
    add.add_argument(
        "--verify",
        type=int,
        metavar="N",
        help="also draw N pictures of each concept before and after, by its paraphrases and by its derived embedding, and say "
        "how far they show it: argen/emoji-sd's by the judge, others' by a CLIP",
    )
    add.add_argument("--clip", default=evaluate.CLIP, metavar="ID", help=f"hub id or folder (default: {evaluate.CLIP})")
    diffusion(add, 50, 7.5)

    add = commands.add_parser("count", help="draw so many things, by optimising the token of their number")
    add.add_argument(
        "prompt", help='a number from 1 to 25 and what is counted, for example "five apples" or "two dozen eggs"'
    )
    add.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="PNG file")
    add.add_argument("--plain", type=Path, metavar="FILE", help="also the picture before, from the same noise")
    add.add_argument("--token", type=Path, metavar="FILE", help="also the token, a textual inversion in .safetensors")
    add.add_argument(
        "--use", type=Path, metavar="FILE", help="draw with a token that was made before, optimise nothing"
    )
    add.add_argument("--iterations", type=int, default=50, metavar="N", help="at most (default: 50)")
    add.add_argument("--learning-rate", type=float, metavar="R", help=evaluate.COUNT_RATE)
    add.add_argument(
        "--noises",
        type=int,
        default=1,
        metavar="N",
        help="pictures that share the token, so that others can (default: 1)",
    )
    add.add_argument(
        "--clip-count", type=Path, metavar="FILE", help="clipcount_pretrained.ckpt; argen/emoji-sd needs none"
    )
    add.add_argument(
        "--detector", metavar="DIR", help="of objects, on the hub or in a folder, as hustvl/yolos-tiny (default: none)"
    )
    diffusion(add, 1, 0)

    add = commands.add_parser("models", help="list what ships and which published weights can be loaded")
    what = add.add_mutually_exclusive_group()
    what.add_argument("--verify", metavar="ID", help="whether the files of a model are whole")
    what.add_argument("--delete", metavar="ID", help="delete what was downloaded of a model")
    add.add_argument("--json", action="store_true", help="print JSON")

    data = commands.add_parser("data", help="build the picture sets")
    sets = data.add_subparsers(dest="set", required=True, metavar="SET")
    add = sets.add_parser(
        "emoji", help="single pictures with names, about 14,000 in 4 styles", formatter_class=formatter
    )
    add.add_argument("--out", type=Path, required=True, metavar="DIR")
    add.add_argument(
        "--icons", type=Path, metavar="DIR", help="folder for the icon packages; missing ones are fetched with npm"
    )
    add.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    add = sets.add_parser("scenes", help="composed pictures with exact truth", formatter_class=formatter)
    add.add_argument("--emoji", type=Path, required=True, metavar="DIR", help="made by `argen data emoji`")
    add.add_argument("--out", type=Path, required=True, metavar="DIR")
    add.add_argument(
        "--num", type=int, default=12000, help="training scenes; the other splits have a tenth of that each"
    )
    add.add_argument("--common", action="store_true", help="of 65 common things alone, as argen/emoji-sd draws")
    add.add_argument("--seed", type=int, default=0)
    add = sets.add_parser(
        "sample", help="a small set out of a large one, as it ships for the tests", formatter_class=formatter
    )
    add.add_argument("--emoji", type=Path, required=True, metavar="DIR", help="made by `argen data emoji`")
    add.add_argument("--out", type=Path, required=True, metavar="DIR")
    add.add_argument("--num", type=int, default=64, help="pictures")

    add = commands.add_parser("train", help="train a shipped model anew", formatter_class=formatter)
    add.add_argument(
        "recipe",
        metavar="RECIPE",
        help="emoji-clip, emoji-vitvqgan, emoji-vitvqgan-decoder, emoji-vae, emoji-vae-decoder, emoji-parti, emoji-parti-second, emoji-llamagen, emoji-llamagen-second, emoji-control, emoji-drafter, emoji-xar, emoji-flextok, emoji-flextok-ar, emoji-sd, emoji-sd-second, emoji-sd-third, emoji-counter, emoji-seed-encoder, emoji-seed-contrastive, emoji-seed, emoji-seed-decoder, emoji-seed-lm, emoji-seed-lm-second or emoji-judge",
    )
    add.add_argument("--data", type=Path, required=True, metavar="DIR", help="made by `argen data emoji`")
    add.add_argument("--scenes", type=Path, metavar="DIR", help="made by `argen data scenes`")
    add.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoints, log, sample grids; goes on from what is there",
    )
    add.add_argument("--clip", type=Path, metavar="DIR", help="trained emoji-clip (default: the shipped one)")
    add.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="trained emoji-vitvqgan or emoji-flextok (default: the shipped one)",
    )
    add.add_argument("--vae", type=Path, metavar="DIR", help="trained emoji-vae (default: the shipped one)")
    add.add_argument(
        "--generator",
        type=Path,
        metavar="DIR",
        help="trained generator that a second stage, emoji-control or emoji-drafter starts from (default: the shipped one)",
    )
    add.add_argument(
        "--x",
        metavar="KIND-SIZE",
        help="what emoji-xar predicts at a time: cell-4 (default), cell-1, a token, cell-8, the whole image, subsample-2, scale-2",
    )
    add.add_argument("--setting", choices=("cpu", "gpu"), default="cpu", help="length and batch size")
    add.add_argument("--steps", type=int, metavar="N", help="stop after step N of the schedule")
    add.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks first: faster steps; on a CPU this needs a C++ compiler",
    )
    add.add_argument("--seed", type=int, default=0)

    add = commands.add_parser(
        "score",
        help="measure a model on held-out data",
        description="Measure a model on held-out data: a generator by the ranks of its prompts, a tokenizer by what it keeps, an encoder by what it finds.",
        formatter_class=formatter,
    )
    add.add_argument("--data", type=Path, required=True, metavar="DIR", help="made by `argen data emoji`")
    add.add_argument("--model", default="argen/emoji-parti", metavar="ID")
    add.add_argument("--num-candidates", type=int, default=16, metavar="C", help="for the scores with re-ranking")
    add.add_argument("--grid", type=Path, metavar="PNG", help="also write a labelled grid of 32 pictures")
    add.add_argument("--seed", type=int, default=0)
    device_and_json(add)

    add = commands.add_parser("eval", help="FID and the other numbers that papers report")
    evaluate.add_commands(add)

    add = commands.add_parser(
        "ui", help="open the web page, and the APIs of OpenAI and A1111", formatter_class=formatter
    )
    add.add_argument("--port", type=int, default=7860)
    add.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to let other machines in, which needs a --key")
    add.add_argument(
        "--data-dir", type=Path, default=Path("pictures"), metavar="DIR", help="where finished pictures are kept"
    )
    add.add_argument(
        "--key", action="append", default=[], help="which clients must show; again for each user, or ARGEN_KEYS"
    )
    add.add_argument("--no-metadata", action="store_true", help="write no settings into the pictures' files")
    add.add_argument(
        "--model-dir",
        type=Path,
        action="append",
        metavar="DIR",
        help="where the page may load saved pipelines from; again for each (default: the current folder, none with a --key)",
    )
    add.add_argument(
        "--model-memory",
        type=float,
        metavar="GB",
        help="of models that stay loaded; the least recently used ones are released (default: half of the memory)",
    )
    add.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    return top


def controlled(args, given: dict, own_file: bool) -> dict:
    """What the options say of a control image, beside those of `given`; with the checkpoint of one's own --size is the model's."""
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
    if control and "control" not in given:
        raise ValueError("--control-type, --control-strength and --size need --control, the picture to follow")
    return {"control": replace(given["control"], **control)} if control else {}


@command
def generate(args) -> None:
    from argen.metadata import differences, read_request, save_images
    from argen.request import Request

    writable(args.out)
    names = ("prompt", "num_images", "seed", "model", "guidance_scale", "temperature", "top_k", "top_p", "sampler")
    names += ("lantern_k", "lantern_delta", "lantern_lambda", "steps", "num_tokens")
    names += ("num_candidates", "num_beams")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.origin:
        given = read_request(args.origin).given() | given
    path = Path(args.model or "")  # of a checkpoint, which --size may concern
    own_file = args.model is not None and os.path.exists(path) and not (path / "model_index.json").is_file()
    given |= controlled(args, given, own_file)
    if "prompt" not in given:
        raise ValueError('no prompt: say what to draw, for example argen generate "a red apple" -o apple.png')
    request = Request(**given)
    paths = writable_images(args.out, request.num_images)

    own = {"tokenizer": args.tokenizer, "image_size": args.size[0] if args.size and own_file else None}
    pipe = load_model(request.model, args.device, "generator", **own)
    if args.origin and (other := differences(args.origin, pipe)):
        print(f"argen generate: {other}", file=sys.stderr)
    started = time.perf_counter()
    with pipe.progress_bar(total=100) as bar:
        for job in pipe.run(request):
            bar.update(round(100 * job.progress) - bar.n)
    seconds = time.perf_counter() - started
    save_images(list(zip(job.images, job.requests, strict=True)), paths)
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
        }
        print(json.dumps(run | {"tokens_per_step": round(job.tokens_per_step, 3), "images": images}))
    else:
        how = f"{request.sampler}, {'lossless' if job.lossless else 'relaxed'}, {job.tokens_per_step:.1f} tokens per step"
        print(f"{', '.join(map(str, paths))} ({seconds:.1f} s, {how})")


def described(tokens) -> str:
    """What one picture became, ids [N] or latents [C, h, w], in words."""
    return f"{len(tokens)} tokens" if tokens.ndim == 1 else f"{tokens[0].size} latents of {len(tokens)} numbers"


@command
def tokenize(args) -> None:
    from argen.eval.reconstruction import encoded
    from argen.images import open_image
    from argen.metadata import save_tokens

    out = writable(args.out or args.image.with_suffix(".npz"), ".npz")
    image = open_image(args.image)
    tokenizer = load_model(args.tokenizer, args.device, "tokenizer")
    tokens = encoded(tokenizer, image)[1][0].cpu().numpy()
    save_tokens(out, args.tokenizer, tokens)
    if args.json:
        print(json.dumps({"file": str(out), "tokenizer": args.tokenizer, "tokens": tokens.tolist()}))
    else:
        print(f"{out} ({described(tokens)} of {args.tokenizer})")


@command
def detokenize(args) -> None:
    import torch

    from argen.eval.reconstruction import check_count, decoded
    from argen.metadata import read_tokens, save_images
    from tokenizers_img.pixels import to_pil

    out = writable(args.out or args.file.with_suffix(".png"))
    made_by, tokens = read_tokens(args.file)
    if args.tokenizer not in (None, made_by):
        raise ValueError(f"{args.file} was made by {made_by}, not by {args.tokenizer}: leave --tokenizer out")
    tokenizer = load_model(made_by, args.device, "tokenizer")
    check_count(tokenizer, args.tokens, len(tokens))
    tokens = tokens[: args.tokens]
    made = decoded(tokenizer, torch.from_numpy(tokens)[None].to(tokenizer.device))
    save_images([(to_pil(made[0]), None)], [out])
    if args.json:
        print(json.dumps({"file": str(out), "tokenizer": made_by, "tokens": len(tokens)}))
    else:
        print(f"{out} ({described(tokens)} of {made_by})")


@command
def reconstruct(args) -> None:
    from argen.eval.reconstruction import decoded, encoded
    from argen.images import open_image
    from argen.metadata import save_images
    from tokenizers_img.pixels import to_pil

    out = writable(args.out or args.image.with_name(f"{args.image.stem}-reconstructed.png"))
    image = open_image(args.image)
    tokenizer = load_model(args.tokenizer, args.device, "tokenizer")
    pixels, tokens = encoded(tokenizer, image)
    made = decoded(tokenizer, tokens, pixels)
    psnr = -10 * (made - pixels).square().mean().log10().item()
    save_images([(to_pil(made[0]), None)], [out])
    if args.json:
        print(json.dumps({"file": str(out), "tokenizer": args.tokenizer, "psnr": psnr, "tokens": tokens[0].tolist()}))
    else:
        print(f"{out} ({described(tokens[0].cpu().numpy())}, PSNR {psnr:.1f} dB)")


@command
def batch(args) -> None:
    from tqdm import tqdm

    from argen.metadata import replacing
    from argen.studio.many import check_requests, draw_table, listed, read_table

    writable_folder(args.out, new=False)
    requests = read_table(args.table, **({"model": args.model} if args.model is not None else {}))
    models = cache(lambda name: load_model(name, args.device, "generator"))
    check_requests(requests, models)
    drawn = tqdm(draw_table(requests, args.out, models), total=len(requests), desc="batch", disable=args.json)
    files, made = zip(*(pair for row in drawn for pair in row), strict=True)
    with replacing(args.out / "pictures.csv") as file:
        file.write(listed(made, [path.name for path in files]).encode())
    print(json.dumps({"files": list(map(str, files))}) if args.json else f"{args.out}: {len(files)} pictures")


@command
def grid(args) -> None:
    from tqdm import tqdm

    from argen.metadata import replacing
    from argen.request import Request
    from argen.studio.many import Axis, check_requests, listed, sheet, varied

    table = writable(writable(args.out).with_suffix(".csv"), ".csv")
    axes = [Axis.parse(text) for text in (args.x, args.y, args.z) if text]
    requests = varied(Request(args.prompt, model=args.model, seed=args.seed), axes)
    models = cache(lambda name: load_model(name, args.device, "generator"))
    check_requests(requests, models, "cell")
    images = []
    for request in tqdm(requests, desc="grid", disable=args.json):
        *_, job = models(request.model).run(request)
        images += job.images
    with replacing(args.out) as file:
        sheet(images, axes).save(file, "PNG")
    with replacing(table) as file:
        file.write(listed(requests, [f"{args.out.name} {number}" for number in range(1, len(requests) + 1)]).encode())
    print(json.dumps({"file": str(args.out), "table": str(table)}) if args.json else f"{args.out}, {table}")


@command
def describe(args) -> None:
    from argen.images import open_image

    image = open_image(args.image)
    pipe = load_model(args.model, args.device, "generator")
    if not hasattr(pipe, "describe"):
        raise ValueError(f"{args.model} only draws: choose a model that reads pictures, as AILab-CVC/seed-llama-8b-sft")
    said = pipe.describe(image, args.question, temperature=args.temperature, seed=args.seed)
    print(json.dumps({"image": str(args.image), "text": said}) if args.json else said)


@command
def control(args) -> None:
    from argen.images import open_image
    from argen.metadata import save_images
    from argen.models.annotators import annotate, as_image, resized

    writable(args.out)
    image = open_image(args.image)
    flat = resized(image, args.type, args.size or image.size)
    save_images([(as_image(annotate(flat, args.type)), None)], [args.out])
    print(f"{args.out} ({args.type}, {flat.width} x {flat.height})")


@command
def bind(args) -> None:
    import torch

    from argen import registry
    from argen.device import pick
    from argen.diffusion import SemanticBinding
    from argen.diffusion.prompts import parse
    from argen.diffusion.tome import check_settings
    from argen.metadata import save_images

    files = writable_all(args.out, args.plain)
    given = None
    if args.bind:
        if not all(part.partition("=")[1] for part in args.bind):
            raise ValueError(f"--bind {' '.join(args.bind)}: expected OBJECT=WORDS, as robot=blue")
        given = {noun: words for noun, _, words in (part.partition("=") for part in args.bind)}
    binding = parse(args.prompt, given)
    settings = check_settings(args.settings or registry.binding(args.model))
    bound = SemanticBinding(registry.load_diffusion(args.model).to(pick(args.device)))
    asked = registry.drawing(args.model, args.steps, args.guidance_scale)
    generator = torch.Generator().manual_seed
    images = [bound(binding, settings=settings, generator=generator(args.seed), **asked).images[0]]
    if args.plain:
        images += bound.pipe(args.prompt, generator=generator(args.seed), **asked).images
    save_images([(image, None) for image in images], files)
    if args.json:
        print(
            json.dumps({"file": str(args.out), "binding": asdict(binding), "steps": [asdict(s) for s in bound.history]})
        )
    else:
        print(f"{args.out} ({binding})")


@command
def erase(args) -> None:
    import torch

    from argen.device import pick
    from argen.diffusion import ConceptErasure
    from argen.diffusion.rece import check_erasure
    from argen.eval import features, tools
    from argen.registry import concepts_of, drawing, erasing, load_diffusion

    writable_folder(args.out)
    concepts = concepts_of(args.model, args.concepts)
    how = erasing(args.model, concepts, args.preset, args.retain, args.target)
    check_erasure(**how)
    pipe, stages, told = load_diffusion(args.model).to(pick(args.device)), [], {}
    erasure, asked = ConceptErasure(pipe), drawing(args.model, args.steps, args.guidance_scale)

    def run() -> None:
        stages.extend(erasure.erase(**how, epochs=args.epochs))

    def draw(**given) -> list:
        generator = [torch.Generator().manual_seed(args.seed + index) for index in range(args.verify)]
        return pipe(**given, **asked, generator=generator).images

    if args.verify:
        known = None
        if args.model == "argen/emoji-sd":
            judge = load_model("argen/emoji-judge", args.device)
            look, known = tools.by_judge(judge), judge.config.names
        else:
            look = tools.by_clip(features.PublishedCLIP(args.clip, pipe.device))
        told = tools.verified(draw, run, erasure.attack, concepts, args.verify, look, known)
    else:
        run()
    erasure.save(args.out)
    if args.json:
        found = {"folder": str(args.out), **erasure.record, "stages": [asdict(stage) for stage in stages]}
        print(json.dumps(found | {"shown": told}))
        return
    print(f"{args.out} (without {', '.join(concepts)}; {stages[-1].change:.1%} of its text matrices changed)")
    for concept, shown in told.items():
        print(f"  {concept}: {tools.in_words(shown)}")


@command
def count(args) -> None:
    import torch
    from tqdm import tqdm

    from argen.device import pick
    from argen.diffusion import CountToken
    from argen.diffusion.base import unit_noise
    from argen.diffusion.count_token import check_noises, read_token
    from argen.metadata import save_images
    from argen.registry import counters, counting, counting_rate, load_diffusion
    from argen.words import parse_count

    files = writable_all(args.out, args.plain)
    if args.token:
        writable(args.token, ".safetensors")
    number, things = parse_count(args.prompt)
    check_noises(args.noises)
    vector, notes = read_token(args.use) if args.use else (None, {})
    if notes.get("count", str(number)) != str(number):
        raise ValueError(f"{args.use} is the token of {notes['count']} things: ask for so many")
    pipe = load_diffusion(args.model).to(pick(args.device))
    pipe.set_progress_bar_config(disable=True)
    judged = {} if args.use else counters(args.model, pipe.device, args.clip_count, args.detector)
    token = CountToken(pipe, **judged, **counting(args.model, number, args.steps, args.guidance_scale))
    latents, best = unit_noise(pipe, torch.Generator().manual_seed(args.seed)), None
    plain = [token.draw(things, number, latents)] if args.plain else []
    if vector is not None:
        token.use(vector)
    else:
        how = {"steps": args.iterations, "learning_rate": counting_rate(args.model, args.learning_rate)}
        others = [unit_noise(pipe, torch.Generator().manual_seed(args.seed + more)) for more in range(1, args.noises)]
        together = torch.cat([latents, *others])
        for step in tqdm(token.optimise(things, number, together, **how), total=args.iterations, desc="count"):
            best = step if step.best else best
    images = [token.draw(things, number, latents), *plain]
    if args.token:
        token.save(args.token, f"<{number}-things>", count=number, things=things, model=args.model, seed=args.seed)
    save_images([(image, None) for image in images], files)
    counted = best.count if best else None
    if args.json:
        print(json.dumps({"file": str(args.out), "prompt": token.prompt(things, number), "count": counted}))
    else:
        found = "" if counted is None else f", counted {counted:.1f}"
        print(f"{args.out} ({token.prompt(things, number)}{found})")


@command
def models(args) -> None:
    from argen.registry import MODELS
    from argen.studio import local_cache

    if args.verify is not None:
        files = local_cache.verify(args.verify)
        if broken := [name for name, whole in files.items() if not whole]:
            raise ValueError(
                f"{', '.join(broken)} of {args.verify} is missing or broken: install argen or fetch it again"
            )
        print(json.dumps(files) if args.json else f"{args.verify}: {len(files)} files, all whole")
        return
    if args.delete is not None:
        gone = local_cache.delete(args.delete)
        print(json.dumps({"deleted": gone}) if args.json else f"deleted: {', '.join(gone)}")
        return
    rows = []
    for one in local_cache.local_cache():
        model = MODELS[one.id]
        row = {"id": one.id, "kind": model.kind, "ships": one.ships, "parameters_in_millions": model.parameters}
        row |= {"bytes": one.bytes if one.folder else None, "folder": one.folder and str(one.folder)}
        rows.append(row | {"licence": model.licence, "about": model.about, "repo": model.repo})
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for title, ships in (("Ships with argen", True), ("Published, fetched from the hub when first used", False)):
        print(f"{title}:")
        for row in (row for row in rows if row["ships"] is ships):
            size = f"{row['bytes'] / 1e6:.1f} MB" if ships else f"{row['parameters_in_millions']:,.0f}M parameters"
            here = ", here" if row["folder"] and not ships else ""
            print(f"  {row['id']:34} {row['kind']:10} {size:>17}  {row['about']} ({row['licence']}{here})")


@command
def data(args) -> None:
    from argen.data import emoji, scenes

    if args.set == "emoji":
        counts = emoji.build(args.out, args.icons, args.size)
    elif args.set == "scenes":
        counts = scenes.build(args.emoji, args.out, args.num, args.seed, args.common)
    else:
        counts = emoji.sample(args.emoji, args.out, args.num)
    print(f"{args.out}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()))


@command
def train(args) -> None:
    from argen.registry import WEIGHTS
    from argen.train.recipes import run

    parts = {"clip": args.clip, "tokenizer": args.tokenizer, "vae": args.vae, "generator": args.generator}
    chosen = {"data": args.data, "scenes": args.scenes, "out": args.out, "seed": args.seed, "steps": args.steps}
    chosen |= {"compile": args.compile, "x": args.x, "shipped": WEIGHTS}
    scores = run(args.recipe, args.setting, **parts, **chosen)
    print(f"{args.out}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))


@command
def score(args) -> None:
    import torch

    from argen.data.tables import pixels, read_split
    from argen.eval import prompts, reconstruction, retrieval

    model = load_model(args.model, args.device)
    if args.grid:
        writable(args.grid)
    if hasattr(model, "likelihoods"):
        scores = retrieval.of_captions(model.likelihoods, args.data)
    elif hasattr(model, "run"):
        scores = prompts.evaluate(model, args.data, args.num_candidates, args.seed, args.grid)
    elif hasattr(model, "embed"):
        scores = retrieval.evaluate(model.embed, args.data)
    elif args.model == "argen/emoji-seed":
        scores = retrieval.of_tokens(model, load_model("argen/emoji-clip", args.device).embed, args.data)
    else:
        scores = reconstruction.evaluate(model, torch.from_numpy(pixels(read_split(args.data, "test"))))
    print(json.dumps(scores) if args.json else "\n".join(f"{name:55} {value:.3f}" for name, value in scores.items()))


@command
def eval(args) -> None:
    evaluate.COMMANDS[args.metric](args)


@command
def ui(args) -> None:
    from argen.device import pick
    from argen.registry import ModelCache
    from argen.server.app import create, serve
    from argen.server.guard import HERE, owner_of
    from argen.studio.queue import Studio
    from argen.ui.build import build
    from argen.ui.jobs import AppContext

    keys = [key for key in [*args.key, *os.environ.get("ARGEN_KEYS", "").split(",")] if key]
    if args.host not in HERE and not keys:
        raise ValueError(f"--host {args.host} lets other machines in: give --key KEY too, which they must show")
    if any(len(key) < 8 for key in keys):
        raise ValueError("a key is shorter than 8 characters: choose a longer one")
    if args.model_memory is not None and not 0 < args.model_memory < 1e6:
        raise ValueError(f"--model-memory is {args.model_memory}: expected a number of gigabytes above 0")
    limit = None if args.model_memory is None else int(args.model_memory * 1e9)
    folders = args.model_dir or ([] if keys else [Path()])
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--model-dir {folder} is not a folder: expected one that exists")
    os.umask(0o077)  # what is kept is for its owner's eyes alone
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the queue is closed, as at Ctrl-C
    device, owners = pick(args.device), {}
    studio = Studio(args.data_dir, ModelCache(device, limit=limit), metadata=not args.no_metadata)
    try:
        page = build(AppContext(studio, owners, owner_of(keys[0]) if keys else None, folders), device, limit)
        serve(create(studio, page, keys, args.host in HERE, owners), args.host, args.port)
    finally:
        studio.close()


def main(argv: list[str] | None = None) -> int:
    """Run a command; bad input is one line on stderr and the exit code 2."""
    args = parser().parse_args(argv)

    def run(args) -> None:
        if args.command != "train":  # its steps are those of a schedule
            check_numbers(args)
        COMMANDS[args.command](args)

    return guarded(f"argen {args.command}", run, args)


if __name__ == "__main__":
    sys.exit(main())
