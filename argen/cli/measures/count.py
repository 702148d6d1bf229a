"""`argen eval count`."""

import argparse
from collections.abc import Callable

from argen.cli.measures.common import (
    finish,
    output_arguments,
    pipeline_of,
    tool_arguments,
)
from argen.command import COUNT_RATE

HELP = "what count tokens change: exact counts before, after, and with the token of another prompt"
DESCRIPTION = "Draw the judge's prompts of one to six things, plainly, with a token optimised for each, and with that token on other things, on other noise and on both, beside plain images of these."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tool_arguments(parser, 100)
    parser.add_argument("--iterations", type=int, default=50, metavar="N", help="at most, of each token (default: 50)")
    parser.add_argument("--noises", type=int, default=1, metavar="N", help="images that share a token (default: 1)")
    parser.add_argument("--learning-rate", type=float, metavar="R", help=COUNT_RATE)
    output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    import torch

    from argen.diffusion import CountToken
    from argen.diffusion.base import unit_noise
    from argen.diffusion.count_token import check_noises, read_token
    from argen.diffusion.model_settings import counters, counting, counting_rate
    from argen.eval import run as runs
    from argen.eval import tools
    from tokenizers_img.pixels import to_pil

    check_noises(args.noises)
    truths, seconds = tools.of_kind("count", args.num), {}
    rate = counting_rate(args.model, args.learning_rate)
    settings = {"iterations": args.iterations, "learning_rate": rate, "noises": args.noises}
    pipe, judge, generator_of = pipeline_of(args, settings)
    counter_settings = counters(args.model, pipe.device)
    (args.out / "tokens").mkdir(exist_ok=True)

    def new_token(index: int) -> CountToken:
        number = len(truths[index].objects)
        return CountToken(pipe, **counter_settings, **counting(args.model, number, args.steps, args.guidance_scale))

    def noise(index: int, offset: int = 0) -> torch.Tensor:
        return unit_noise(pipe, generator_of(index + offset * len(truths)))

    def draw_optimised(index: int):
        (number, things), token = tools.counted(truths[index]), new_token(index)
        noises = torch.cat([noise(index), *(noise(index, offset) for offset in range(2, args.noises + 1))])
        steps = token.search(things, number, noises, steps=args.iterations, learning_rate=rate)
        best = [step for step in steps if step.best][-1]
        token.save(args.out / f"tokens/{index:06d}.safetensors", f"<{number}-things>", count=number, things=things)
        return to_pil(best.image[0])

    def draw_with(index: int, use_token: bool, other_things: bool, other_noise: bool):
        (number, things), token = tools.counted(truths[index]), new_token(index)
        if use_token:
            token.use(read_token(args.out / f"tokens/{index:06d}.safetensors")[0])
        things = tools.elsewhere(truths[index], truths) if other_things else things
        return token.draw(things, number, noise(index, int(other_noise)))

    def images(name: str, draw: Callable):
        with runs.timed(seconds, name):
            return runs.draw(lambda rows: [draw(index) for index in rows], len(truths), args.out / name, 8)

    before = images("before", lambda index: draw_with(index, False, False, False))
    after = images("after", draw_optimised)
    scores = tools.before_and_after(judge, truths, before=before, after=after)
    for name, images_of in {"before": before, "after": after}.items():
        share = tools.share_counted(counter_settings["counter"], images_of, truths)
        scores[f"count: the pipeline's own counter, {name}"] = {"value": share, "n": len(truths)}
    for variant, changes in {"other things": (True, False), "other noise": (False, True), "both": (True, True)}.items():
        compared = {
            name: images(
                f"{name}, {variant}",
                lambda index, use_token=use_token, changes=changes: draw_with(index, use_token, *changes),
            )
            for name, use_token in (("plain", False), ("reused", True))
        }
        entries = tools.before_and_after(judge, truths, **compared)
        scores |= {f"{variant}, {name}": entry for name, entry in entries.items() if name.startswith("count: count")}
    finish(args, settings, scores, seconds, after)
