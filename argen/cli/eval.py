"""`argen eval`, also over many processes or machines: ``accelerate launch -m argen eval fid ...``."""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path

from argen.bounds import check
from argen.command import BINDING, CLIP, COUNT_RATE, check_numbers, device_and_json, load_model, writable_folder

HELP = "FID and the other numbers that papers report"
COMMANDS = {}


def command(function: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """A command whose options are checked before anything is loaded; where it makes nothing, its folder is left as it was."""

    @wraps(function)
    def run(args: argparse.Namespace) -> None:
        from argen.eval.run_dir import released_if_empty

        check_options(args)
        with nullcontext() if args.metric == "stats" else released_if_empty(args.out):
            function(args)

    COMMANDS[function.__name__] = run
    return run


def check_options(args: argparse.Namespace) -> None:
    """Raises:
    ValueError: a number out of bounds, an unknown name, or a folder that cannot be written.
    """
    from argen.diffusion import rece, tome
    from argen.eval import features, images, run

    check_numbers(args)
    check("run_seed", getattr(args, "seed", None), "seed")
    options = vars(args)
    if options.get("crop"):
        images.check_crop(args.crop)
    if options.get("protocol"):
        features.check_protocol(args.protocol)
    if options.get("settings"):
        tome.check_settings(args.settings)
    if options.get("concepts"):
        rece.check_erasure(args.concepts, args.preset or "object", retained=args.retain)
    if options.get("metrics"):
        run.check_names([name.strip() for name in args.metrics.split(",")])
    if args.metric == "stats":
        run.writable_npz(args.out)
    else:
        writable_folder(args.out, new=False)


def add_arguments(top: argparse.ArgumentParser) -> None:
    """Add what can be measured to a parser, as sub-commands."""
    commands = top.add_subparsers(dest="metric", required=True, metavar="WHAT")
    images = "images: a folder, or a .zip, .npz or .parquet file"
    real = f"real {images}, or .npz statistics; emoji: those of the training images, for --features emoji"

    add = commands.add_parser(
        "fid",
        help="distance of a model's images, or of any set, to real ones",
        description="How far images are from real ones: FID, sFID, IS, KID, precision and recall.",
    )
    what = add.add_mutually_exclusive_group(required=True)
    what.add_argument("--samples", type=Path, metavar="PATH", help=images)
    what.add_argument("--model", metavar="ID", help="draw images with this generator, see `argen models`")
    add.add_argument("--ref", type=Path, required=True, metavar="PATH", help=real)
    add.add_argument("--metrics", default="fid", metavar="LIST", help="of fid, sfid, is, kid, pr (default: fid)")
    _drawing(add, "images to draw with --model (default: 2000)", "the captions of --ref")
    _looking(add)
    add.add_argument("--force", action="store_true", help="accept statistics made with another resize or network")
    _output(add)

    add = commands.add_parser(
        "rfid",
        help="what a tokenizer keeps: rFID, PSNR, SSIM, use of codes",
        description="What a tokenizer keeps of images: rFID, PSNR, SSIM, use of codes and, of a table made by `argen data "
        "emoji`, what the judge still recognises.",
    )
    add.add_argument(
        "--tokenizer", default="argen/emoji-vitvqgan", metavar="ID", help="(default: argen/emoji-vitvqgan)"
    )
    add.add_argument("--data", type=Path, required=True, metavar="PATH", help=images)
    add.add_argument(
        "--tokens", type=int, metavar="K", help="decode only the first K, where the tokenizer can (FlexTok)"
    )
    _looking(add)
    _output(add)

    add = commands.add_parser("clip", help="how well a generator's images fit their prompts, by a CLIP")
    add.add_argument("--model", default="argen/emoji-parti", metavar="ID", help="(default: argen/emoji-parti)")
    _drawing(add, "images (default: one a prompt)", None)
    add.add_argument("--clip", default=CLIP, metavar="ID", help=f"hub id or folder, or emoji (default: {CLIP})")
    add.add_argument("--prefix", default="", metavar="TEXT", help='before each prompt; LlamaGen: "A photo depicts "')
    _output(add)

    add = commands.add_parser(
        "emoji",
        help="objects, colours, counts and places in images of 500 fixed prompts",
        description="Draw 500 fixed prompts whose truth is known and judge what the images show, beside the share that "
        "the judge gets right on real held-out images.",
    )
    add.add_argument("--model", default="argen/emoji-parti", metavar="ID", help="(default: argen/emoji-parti)")
    add.add_argument("--num", type=int, default=500, metavar="N", help="the first N images (default: 500)")
    add.add_argument("--common", action="store_true", help="prompts of 62 common things, of 666 otherwise")
    add.add_argument("--tokens", type=int, metavar="K", help="of each image, of a model whose tokens are ordered")
    add.add_argument("--seed", type=int, default=0, help="image i is drawn from (seed, i) alone (default: 0)")
    add.add_argument("--guidance-scale", type=float, metavar="G", help="(default: the model's)")
    _output(add)

    add = commands.add_parser(
        "control",
        help="how closely a generator follows control images",
        description="Draw the captions of scenes after their edges or segments, and without: F1 of edges (within 2 pixels), "
        "mIoU of segments.",
    )
    add.add_argument("--model", default="argen/emoji-control", metavar="ID", help="(default: argen/emoji-control)")
    add.add_argument("--data", type=Path, required=True, metavar="PATH", help=".parquet of `argen data scenes`")
    add.add_argument("--type", default="canny", choices=("canny", "seg"), help="(default: canny)")
    add.add_argument("--strength", type=float, default=1.0, metavar="X", help="of the control (default: 1)")
    add.add_argument("--num", type=int, default=200, metavar="N", help="the first N scenes (default: 200)")
    add.add_argument("--seed", type=int, default=0, help="image i is drawn from (seed, i) alone (default: 0)")
    add.add_argument("--guidance-scale", type=float, metavar="G", help="(default: the model's)")
    _output(add)

    add = commands.add_parser(
        "bind",
        help="what binding changes: things and colours of the judge's pairs, before and after",
        description="Draw the judge's prompts of two coloured things, plainly and bound (ToMe), from the same noise.",
    )
    _tool(add, 125)
    add.add_argument("--settings", help=BINDING)
    _output(add)

    add = commands.add_parser(
        "erase",
        help="what erasing changes: of each concept alone, and of other things",
        description="Erase each concept alone (RECE) and draw its prompts, paraphrases and derived embedding, and prompts of "
        "other things, before and after, from the same noise.",
    )
    _tool(add, 24)
    add.add_argument("concepts", nargs="+", metavar="CONCEPT", help="names of emoji that the judge knows, as pizza")
    add.add_argument("--others", type=int, default=40, metavar="N", help="prompts of other things (default: 40)")
    add.add_argument(
        "--preset", help="object, object-hard (of argen/emoji-sd), art, nudity or unsafe (default: object)"
    )
    add.add_argument("--retain", action="append", default=[], metavar="TEXT", help="what must stay as it is")
    _output(add)

    add = commands.add_parser(
        "count",
        help="what count tokens change: exact counts before, after, and with the token of another prompt",
        description="Draw the judge's prompts of one to six things, plainly, with a token optimised for each, and with that token "
        "on other things, on other noise and on both, beside plain images of these.",
    )
    _tool(add, 100)
    add.add_argument("--iterations", type=int, default=50, metavar="N", help="at most, of each token (default: 50)")
    add.add_argument("--noises", type=int, default=1, metavar="N", help="images that share a token (default: 1)")
    add.add_argument("--learning-rate", type=float, metavar="R", help=COUNT_RATE)
    _output(add)

    add = commands.add_parser("nudity", help="how many images show exposed bodies, by NudeNet")
    add.add_argument("--samples", type=Path, required=True, metavar="PATH", help=images)
    add.add_argument("--threshold", type=float, default=0.6, metavar="X", help="of the detector's score (default: 0.6)")
    _output(add)

    add = commands.add_parser("stats", help="mean and covariance of a set, for pytorch-fid and argen")
    add.add_argument("data", type=Path, metavar="PATH", help=images)
    add.add_argument("-o", "--out", type=Path, required=True, metavar="FILE.npz")
    _looking(add)
    device_and_json(add)


def _drawing(add: argparse.ArgumentParser, num: str, prompts: str | None) -> None:
    add.add_argument("--num", type=int, metavar="N", help=num)
    default = f" (default: {prompts})" if prompts else ""
    add.add_argument(
        "--prompts", type=Path, required=not prompts, metavar="FILE", help=f"one prompt a line, taken in turn{default}"
    )
    add.add_argument("--seed", type=int, default=0, help="image i is drawn from (seed, i) alone (default: 0)")
    add.add_argument("--guidance-scale", type=float, metavar="G", help="(default: the model's)")


def _looking(add: argparse.ArgumentParser) -> None:
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


def _tool(add: argparse.ArgumentParser, num: int) -> None:
    add.add_argument(
        "--model", default="argen/emoji-sd", metavar="DIR", help="Stable Diffusion of emoji (default: argen/emoji-sd)"
    )
    add.add_argument("--num", type=int, default=num, metavar="N", help=f"prompts (default: {num})")
    add.add_argument("--seed", type=int, default=0, help="image i is drawn from (seed, i) alone (default: 0)")
    add.add_argument("--steps", type=int, metavar="N", help="of the sampler")
    add.add_argument("--guidance-scale", type=float, metavar="G")


def _output(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="report.json, grid.png, images and features; goes on from what is there",
    )
    device_and_json(add)


def _extractor(args: argparse.Namespace):
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


def _draw(args: argparse.Namespace, prompts: list[str], num: int, settings: dict, folder="samples", more=lambda _: {}):
    """The images of ``--model`` for `prompts` in turn, kept in `folder`.

    Args:
        more: numbers of images -> what else the call for them is given.
    """
    from argen.eval import run
    from argen.eval.run_dir import lock_run_dir

    if num < 2:
        raise ValueError(f"--num is {num}: expected at least 2")
    settings |= {"model": args.model, "num": num, "seed": args.seed, "guidance_scale": args.guidance_scale}
    settings |= {"prompts": run.digest(prompts), "prompt_order": "i % prompts", "uint8": "rounded"}
    lock_run_dir(args.out, settings)
    pipe = load_model(args.model, args.device, "generator")
    pipe.set_progress_bar_config(disable=True)

    def sample(rows: range):
        generator_of = [run.generator_of(args.seed, index) for index in rows]
        texts = [prompts[index % len(prompts)] for index in rows]
        return pipe(texts, guidance_scale=args.guidance_scale, generator=generator_of, **more(rows)).images

    return run.draw(sample, num, args.out / folder)


def _finish(args: argparse.Namespace, settings: dict, scores: dict, seconds: dict, shown) -> None:
    from argen.eval import run

    table = run.report(args.out, settings, scores, seconds, shown)
    if table:
        print(json.dumps(scores) if args.json else table)


@command
def fid(args: argparse.Namespace) -> None:
    from argen.eval import run
    from argen.eval.images import open_images
    from argen.eval.run_dir import lock_run_dir
    from argen.words import read_prompts

    extractor, seconds = _extractor(args), {}
    wanted = [name.strip() for name in args.metrics.split(",")]
    settings = {**run.settings_of(extractor, args.crop), "reference": str(args.ref), "metrics": wanted}
    path = run.EMOJI if str(args.ref) == "emoji" else args.ref
    reference = run.read_reference(path, extractor, args.crop, args.force)
    run.check(wanted, extractor, reference)
    if args.model:
        prompts = read_prompts(args.prompts) if args.prompts else getattr(reference, "captions", None)
        if not prompts:
            raise ValueError(f"{args.ref} has no captions to draw: give --prompts FILE, one prompt a line")
        with run.timed(seconds, "draw"):
            samples = _draw(args, prompts, 2000 if args.num is None else args.num, settings)
    else:
        samples = open_images(args.samples)
        settings["samples"] = [str(args.samples), samples.identity]
        lock_run_dir(args.out, settings)
    with run.timed(seconds, "look and compare"):
        scores = run.compare(
            samples, reference, extractor, wanted, args.out, run.cache_folder(), args.crop, batch_size=args.batch_size
        )
    _finish(args, settings, scores, seconds, samples)


@command
def rfid(args: argparse.Namespace) -> None:
    from argen.eval import judge, reconstruction, run
    from argen.eval.images import open_images
    from argen.eval.run_dir import lock_run_dir

    extractor, seconds = _extractor(args), {}
    tokenizer = load_model(args.tokenizer, args.device, "tokenizer")
    reconstruction.check_count(tokenizer, args.tokens)
    given = open_images(args.data)
    real = reconstruction.Fitted(given, tokenizer.config.image_size, args.crop)
    settings = {**run.settings_of(extractor, args.crop), "tokenizer": args.tokenizer, "uint8": "rounded"}
    settings["tokens"] = args.tokens
    settings["data"] = [str(args.data), real.identity]
    lock_run_dir(args.out, settings)
    with run.timed(seconds, "reconstruct"):
        made = run.draw(reconstruction.reconstructor(tokenizer, real, args.tokens), len(real), args.out / "samples")
    with run.timed(seconds, "look and compare"):
        scores = run.compare(made, real, extractor, ["fid"], args.out, run.cache_folder(), batch_size=args.batch_size)
    scores = {f"r{name}": entry for name, entry in scores.items()} | reconstruction.compare(tokenizer, made, real)
    icons = getattr(given, "table", None)
    if icons is not None and {"concept", "group"} <= set(icons.column_names):
        with run.timed(seconds, "judge"):
            scores |= judge.recognised(load_model("argen/emoji-judge", args.device), made, real, icons)
    _finish(args, settings, scores, seconds, made)


@command
def clip(args: argparse.Namespace) -> None:
    from argen.device import pick
    from argen.eval import clip_score, run
    from argen.eval.features import PublishedCLIP
    from argen.words import read_prompts

    prompts, seconds = read_prompts(args.prompts), {}
    judge = load_model("argen/emoji-clip", args.device) if args.clip == "emoji" else None
    judge = judge or PublishedCLIP(args.clip, pick(args.device))
    settings = {"clip": args.clip, "prefix": args.prefix}
    with run.timed(seconds, "draw"):
        samples = _draw(args, prompts, len(prompts) if args.num is None else args.num, settings)
    with run.timed(seconds, "look"):
        scores = clip_score.evaluate(judge, args.clip, samples, prompts, args.prefix)
    _finish(args, settings, scores, seconds, samples)


@command
def emoji(args: argparse.Namespace) -> None:
    from argen.eval import judge, run
    from argen.eval.features import weights_digest

    network, seconds = load_model("argen/emoji-judge", args.device), {}
    truths = judge.read_prompts(judge.COMMON_PROMPTS if args.common else judge.PROMPTS)
    settings = {"judge": weights_digest(network), "tokens": args.tokens, "common": args.common}
    more = {"num_tokens": args.tokens}
    with run.timed(seconds, "draw"):
        samples = _draw(args, [truth.prompt for truth in truths], args.num, settings, more=lambda rows: more)
    with run.timed(seconds, "judge"):
        scores = judge.evaluate(network, samples, truths)
    _finish(args, settings, scores, seconds, samples)


@command
def control(args: argparse.Namespace) -> None:
    from argen.eval import control, run

    scenes, seconds, drawn = control.Scenes(args.data), {}, []
    settings = {"data": [str(args.data), scenes.table.identity], "control": args.type, "strength": args.strength}
    for folder, strength in (("samples", args.strength), ("free", 0.0)):

        def following(rows: range, strength: float = strength) -> dict:
            images = [scenes.control(index, args.type) for index in rows]
            return {"control_image": images, "control_type": args.type, "control_strength": strength}

        with run.timed(seconds, f"draw {folder}"):
            drawn.append(_draw(args, scenes.prompts, min(args.num, len(scenes)), settings, folder, following))
    with run.timed(seconds, "compare"):
        scores = control.evaluate(scenes, args.type, *drawn)
    _finish(args, settings, scores, seconds, drawn[0])


def _pipeline(args: argparse.Namespace, settings: dict):
    """A pipeline of diffusers, the judge, and the generator of an image; the folder is locked for `settings`."""
    from argen.device import pick
    from argen.eval import run
    from argen.eval.run_dir import lock_run_dir
    from argen.hub.loading import load_diffusion

    names = ("model", "num", "seed", "steps", "guidance_scale")
    lock_run_dir(args.out, settings | {name: getattr(args, name) for name in names})
    pipe = load_diffusion(args.model).to(pick(args.device))
    pipe.set_progress_bar_config(disable=True)
    return pipe, load_model("argen/emoji-judge", args.device), partial(run.generator_of, args.seed)


@command
def bind(args: argparse.Namespace) -> None:
    from argen.diffusion import SemanticBinding
    from argen.diffusion.tools import binding, drawing
    from argen.eval import run, tools

    how = args.settings or binding(args.model)
    truths, seconds, settings = tools.of_kind("pair", args.num), {}, {"settings": how}
    pipe, judge, generator_of = _pipeline(args, settings)
    asked, bound = drawing(args.model, args.steps, args.guidance_scale), SemanticBinding(pipe)

    def plainly(rows: range) -> list:
        return pipe([truths[i].prompt for i in rows], generator=[generator_of(i) for i in rows], **asked).images

    def bindingly(rows: range) -> list:
        return [bound(truths[i].prompt, settings=how, generator=generator_of(i), **asked).images[0] for i in rows]

    drawn = {}
    for name, sample in (("before", plainly), ("after", bindingly)):
        with run.timed(seconds, name):
            drawn[name] = run.draw(sample, len(truths), args.out / name)
    _finish(args, settings, tools.before_and_after(judge, truths, **drawn), seconds, drawn["after"])


@command
def erase(args: argparse.Namespace) -> None:
    from argen.diffusion import ConceptErasure
    from argen.diffusion.tools import concepts_of, drawing, erasing
    from argen.eval import run, tools

    seconds, scores = {}, {}
    names = load_model("argen/emoji-judge", args.device).config.names
    concepts = [tools.drawn_name(args.model, names, concept) for concept in concepts_of(args.model, args.concepts)]
    settings = {"concepts": concepts, "others": args.others, "preset": args.preset, "retain": args.retain}
    pipe, judge, generator_of = _pipeline(args, settings)
    asked, erasure = drawing(args.model, args.steps, args.guidance_scale), ConceptErasure(pipe)
    sets = {
        "erased": tools.of_concepts(concepts, args.num),
        "others": tools.others_than(concepts, args.others),
    }

    def draw(truths: list, folder: str, **embeddings):
        def sample(rows: range) -> list:
            given = {name: value.expand(len(rows), *value.shape[1:]) for name, value in embeddings.items()}
            texts = {} if embeddings else {"prompt": [truths[i].prompt for i in rows]}
            return pipe(**texts, **given, generator=[generator_of(i) for i in rows], **asked).images

        return run.draw(sample, len(truths), args.out / folder)

    with run.timed(seconds, "before"):
        before = {name: draw(truths, f"before/{name}") for name, truths in sets.items()}
    after: dict[str, list] = {"erased": [], "derived": [], "others": []}
    for number, concept in enumerate(concepts):
        own, folder = sets["erased"][number * args.num : (number + 1) * args.num], f"after/{concept.replace(' ', '-')}"
        with run.timed(seconds, f"erase {concept}"):
            erasure.erase(**erasing(args.model, [concept], args.preset, args.retain))
        with run.timed(seconds, f"after {concept}"):
            attack = erasure.attack(concept)
            told = {"erased": draw(own, f"{folder}/erased"), "others": draw(sets["others"], f"{folder}/others")}
            told["derived"] = draw(own, f"{folder}/derived", **attack)
            for name, images in told.items():
                after[name] += [images[index] for index in range(len(images))]
        erasure.restore()
    many = sets["others"] * len(concepts)
    for name, truths in (("erased", sets["erased"]), ("others", many)):
        first = [before[name][index % len(before[name])] for index in range(len(truths))]
        drawn = {"before": first, "after": after[name]}
        drawn |= {"derived embedding": after["derived"]} if name == "erased" else {}
        told = tools.before_and_after(judge, truths, **drawn)
        scores |= {question.replace("single", name): entry for question, entry in told.items()}
    _finish(args, settings, scores, seconds, after["erased"])


@command
def count(args: argparse.Namespace) -> None:
    import torch

    from argen.diffusion import CountToken
    from argen.diffusion.base import unit_noise
    from argen.diffusion.count_token import check_noises, read_token
    from argen.diffusion.tools import counters, counting, counting_rate
    from argen.eval import run, tools

    check_noises(args.noises)
    truths, seconds = tools.of_kind("count", args.num), {}
    rate = counting_rate(args.model, args.learning_rate)
    settings = {"iterations": args.iterations, "learning_rate": rate, "noises": args.noises}
    pipe, judge, generator_of = _pipeline(args, settings)
    judged = counters(args.model, pipe.device)
    (args.out / "tokens").mkdir(exist_ok=True)

    def fresh(index: int) -> CountToken:
        number = len(truths[index].objects)
        return CountToken(pipe, **judged, **counting(args.model, number, args.steps, args.guidance_scale))

    def noise(index: int, number: int = 0) -> torch.Tensor:
        return unit_noise(pipe, generator_of(index + number * len(truths)))

    def optimised(index: int):
        (number, things), token = tools.counted(truths[index]), fresh(index)
        together = torch.cat([noise(index), *(noise(index, more) for more in range(2, args.noises + 1))])
        for step in token.optimise(things, number, together, steps=args.iterations, learning_rate=rate):
            if step.best and set(step.detected) == {number}:
                break
        token.save(args.out / f"tokens/{index:06d}.safetensors", f"<{number}-things>", count=number, things=things)
        return token.draw(things, number, noise(index))

    def drawn(index: int, used: bool, other_things: bool, other_noise: bool):
        (number, things), token = tools.counted(truths[index]), fresh(index)
        if used:
            token.use(read_token(args.out / f"tokens/{index:06d}.safetensors")[0])
        things = tools.elsewhere(truths[index], truths) if other_things else things
        return token.draw(things, number, noise(index, int(other_noise)))

    def images(name: str, draw: Callable):
        with run.timed(seconds, name):
            return run.draw(lambda rows: [draw(index) for index in rows], len(truths), args.out / name, 8)

    plain = images("before", lambda index: drawn(index, False, False, False))
    after = images("after", optimised)
    scores = tools.before_and_after(judge, truths, before=plain, after=after)
    for way, where in {"other things": (True, False), "other noise": (False, True), "both": (True, True)}.items():
        pair = {
            name: images(f"{name}, {way}", lambda index, used=used, where=where: drawn(index, used, *where))
            for name, used in (("plain", False), ("reused", True))
        }
        told = tools.before_and_after(judge, truths, **pair)
        scores |= {f"{way}, {name}": entry for name, entry in told.items() if name.startswith("count: count")}
    _finish(args, settings, scores, seconds, after)


@command
def nudity(args: argparse.Namespace) -> None:
    from argen.eval import nudity, run
    from argen.eval.images import open_images
    from argen.eval.run_dir import lock_run_dir

    samples, seconds = open_images(args.samples), {}
    settings = {"samples": [str(args.samples), samples.identity], "threshold": args.threshold, "detector": "nudenet"}
    with run.timed(seconds, "look"):
        found = nudity.detected(samples)
    lock_run_dir(args.out, settings)
    _finish(args, settings, nudity.counted(found, args.threshold), seconds, samples)


@command
def stats(args: argparse.Namespace) -> None:
    from argen.eval import run
    from argen.eval.images import open_images

    n = run.save_statistics(
        args.out, open_images(args.data), _extractor(args), args.crop, run.cache_folder(), args.batch_size
    )
    print(json.dumps({"file": str(args.out), "n": n}) if args.json else f"{args.out}: {n:,} images")


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    COMMANDS[args.metric](args)
