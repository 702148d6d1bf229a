"""`argen eval erase`."""

import argparse

from argen.cli.measures.common import (
    finish,
    output_arguments,
    pipeline_of,
    tool_arguments,
)
from argen.command import load_model

HELP = "what erasing changes: of each concept alone, and of other things"
DESCRIPTION = "Erase each concept alone (RECE) and draw its prompts, paraphrases and derived embedding, and prompts of other things, before and after, from the same noise."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tool_arguments(parser, 24)
    parser.add_argument("concepts", nargs="+", metavar="CONCEPT", help="names of emoji that the judge knows, as pizza")
    parser.add_argument("--others", type=int, default=40, metavar="N", help="prompts of other things (default: 40)")
    parser.add_argument(
        "--preset", help="object, object-hard (of argen/emoji-sd), art, nudity or unsafe (default: object)"
    )
    parser.add_argument("--retain", action="append", default=[], metavar="TEXT", help="what must stay as it is")
    output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from argen.diffusion import ConceptErasure
    from argen.diffusion.model_settings import concepts_of, drawing, erasing
    from argen.eval import run as runs
    from argen.eval import tools

    seconds, scores = {}, {}
    names = load_model("argen/emoji-judge", args.device).config.names
    concepts = [tools.drawn_name(args.model, names, concept) for concept in concepts_of(args.model, args.concepts)]
    settings = {"concepts": concepts, "others": args.others, "preset": args.preset, "retain": args.retain}
    pipe, judge, generator_of = pipeline_of(args, settings)
    sampling, erasure = drawing(args.model, args.steps, args.guidance_scale), ConceptErasure(pipe)
    sets = {
        "erased": tools.of_concepts(concepts, args.num),
        "others": tools.others_than(concepts, args.others),
    }

    def draw(truths: list, folder: str, **embeddings):
        def sample(rows: range) -> list:
            batch = {name: value.expand(len(rows), *value.shape[1:]) for name, value in embeddings.items()}
            texts = {} if embeddings else {"prompt": [truths[i].prompt for i in rows]}
            return pipe(**texts, **batch, generator=[generator_of(i) for i in rows], **sampling).images

        return runs.draw(sample, len(truths), args.out / folder)

    with runs.timed(seconds, "before"):
        before = {name: draw(truths, f"before/{name}") for name, truths in sets.items()}
    after: dict[str, list] = {"erased": [], "derived": [], "others": []}
    for number, concept in enumerate(concepts):
        truths_of_concept, folder = (
            sets["erased"][number * args.num : (number + 1) * args.num],
            f"after/{concept.replace(' ', '-')}",
        )
        with runs.timed(seconds, f"erase {concept}"):
            erasure.erase(**erasing(args.model, [concept], args.preset, args.retain))
        with runs.timed(seconds, f"after {concept}"):
            attack = erasure.attack(concept)
            images_by_set = {
                "erased": draw(truths_of_concept, f"{folder}/erased"),
                "others": draw(sets["others"], f"{folder}/others"),
            }
            images_by_set["derived"] = draw(truths_of_concept, f"{folder}/derived", **attack)
            for name, images in images_by_set.items():
                after[name] += [images[index] for index in range(len(images))]
        erasure.restore()
    others = sets["others"] * len(concepts)
    for name, truths in (("erased", sets["erased"]), ("others", others)):
        before_images = [before[name][index % len(before[name])] for index in range(len(truths))]
        compared = {"before": before_images, "after": after[name]}
        compared |= {"derived embedding": after["derived"]} if name == "erased" else {}
        entries = tools.before_and_after(judge, truths, **compared)
        scores |= {question.replace("single", name): entry for question, entry in entries.items()}
    finish(args, settings, scores, seconds, after["erased"])
