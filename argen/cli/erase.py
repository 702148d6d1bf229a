"""`argen erase`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from argen.command import (
    CLIP,
    diffusion_arguments,
    load_diffusion_model,
    load_model,
    load_options,
    writable_folder,
)

HELP = "save a pipeline with concepts erased (RECE)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concepts", nargs="+", metavar="CONCEPT", help='for example "pizza", or "pizza, taxi"')
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder of the new pipeline")
    parser.add_argument(
        "--preset", help="object, object-hard (of argen/emoji-sd), art, nudity or unsafe (default: object)"
    )
    parser.add_argument("--target", action="append", metavar="TEXT", help="what takes the place of each concept")
    parser.add_argument("--retain", action="append", default=[], metavar="TEXT", help="what must stay as it is")
    parser.add_argument("--epochs", type=int, metavar="N", help="of deriving and erasing (default: the preset's)")
    parser.add_argument(
        "--verify",
        type=int,
        metavar="N",
        help="also draw N images of each concept before and after, by its paraphrases and by its derived embedding, and say "
        "how far they show it: argen/emoji-sd's by the judge, others' by a CLIP",
    )
    parser.add_argument("--clip", default=CLIP, metavar="ID", help=f"hub id or folder (default: {CLIP})")
    diffusion_arguments(parser, 50, 7.5)


def run(args: argparse.Namespace) -> None:
    import torch

    from argen.diffusion import ConceptErasure
    from argen.diffusion.model_settings import card_of, concepts_of, drawing, erasing
    from argen.diffusion.rece import check_erasure
    from argen.eval import features, tools

    writable_folder(args.out)
    concepts = concepts_of(args.model, args.concepts)
    erasure_settings = erasing(args.model, concepts, args.preset, args.retain, args.target)
    check_erasure(**erasure_settings)
    pipe, stages, verification = load_diffusion_model(args.model, args.device, load_options(args)), [], {}
    erasure, sampling = ConceptErasure(pipe), drawing(args.model, args.steps, args.guidance_scale)

    def run() -> None:
        stages.extend(erasure.erase(**erasure_settings, epochs=args.epochs))

    def draw(**prompt_inputs) -> list:
        generator = [torch.Generator().manual_seed(args.seed + index) for index in range(args.verify)]
        return pipe(**prompt_inputs, **sampling, generator=generator).images

    if args.verify:
        names = None
        if name := card_of(args.model).tool("erase").get("judge"):
            judge = load_model(name, args.device)
            classify, names = tools.by_judge(judge), judge.config.names
        else:
            classify = tools.by_clip(features.PublishedCLIP(args.clip, pipe.device))
        verification = tools.verified(draw, run, erasure.attack, concepts, args.verify, classify, names)
    else:
        run()
    erasure.save(args.out, card_of(args.model))
    if args.json:
        result = {"folder": str(args.out), **erasure.record, "stages": [asdict(stage) for stage in stages]}
        print(json.dumps(result | {"shown": verification}))
        return
    print(f"{args.out} (without {', '.join(concepts)}; text matrices changed by {stages[-1].change:.2f} of their norm)")
    for concept, scores in verification.items():
        print(f"  {concept}: {tools.in_words(scores)}")
