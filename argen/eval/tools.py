"""Prompts on which the tools of `argen.diffusion` are measured, and what is found in the pictures before and after."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from argen.data.emoji import STYLES, with_article
from argen.data.scenes import thing_of
from argen.diffusion.tools import vocabulary_of
from argen.eval.features import PublishedCLIP
from argen.eval.images import ImageSet
from argen.eval.judge import COMMON_PROMPTS, Truth, evaluate, read_prompts, verdict
from argen.models.judge import Judge
from argen.words import cut, known_name, parse_count
from tokenizers_img.pixels import opaque


def phrases(concept: str) -> list[str]:
    """Ways to ask for one thing: bare, in each style, and paraphrases."""
    thing = with_article(concept)
    said = [concept, thing, f"one {concept}", f"{thing} on white", f"a picture of {thing}", f"{thing} and nothing else"]
    return said + [f"{text}, {style.prompt}" for text in (concept, thing) for style in STYLES.values()]


def of_concepts(concepts: Sequence[str], each: int) -> list[Truth]:
    """`each` prompts of every concept; the phrases come again, with other noise, where they are fewer."""
    asked = [(concept, phrases(concept)) for concept in concepts]
    return [
        Truth(said[index % len(said)], "single", ((concept, ""),)) for concept, said in asked for index in range(each)
    ]


def others_than(concepts: Sequence[str], num: int) -> list[Truth]:
    """The first of the judge's prompts of single common things that are none of the concepts."""
    named = set(concepts)
    found = [
        truth for truth in read_prompts(COMMON_PROMPTS) if truth.kind == "single" and truth.objects[0][0] not in named
    ]
    return found[:num]


def of_kind(kind: str, num: int) -> list[Truth]:
    """The first of the judge's prompts of common things of a kind."""
    return [truth for truth in read_prompts(COMMON_PROMPTS) if truth.kind == kind][:num]


def counted(truth: Truth) -> tuple[int, str]:
    """How many of what a prompt of the kind "count" asks for, in its own words."""
    return parse_count(truth.prompt)


def elsewhere(truth: Truth, truths: Sequence[Truth]) -> str:
    """The things of the next prompt that asks for as many."""
    start = truths.index(truth)
    after = [*truths[start + 1 :], *truths[: start + 1]]
    return counted(next(other for other in after if len(other.objects) == len(truth.objects)))[1]


Draw = Callable[..., list[Image.Image]]  # what a pipeline's call takes, without its generator -> images
SHOWN = 0.1  # below it pictures do not show a concept, and nothing can be taken away from them
Recognise = Callable[[list[Image.Image], str], float]  # pictures, a concept -> how far they show it


def judged_name(names: Collection[str], concept: str) -> str:
    """The one of the judge's names that means a concept.

    Raises:
        ValueError: it knows none, so that it could not see it.
    """
    name = known_name(concept, names)
    if name is None:
        raise ValueError(
            f"the judge does not know {cut(concept)!r}: expected the name of an emoji that it was trained on"
        )
    return name


def drawn_name(model: str, names: Collection[str], concept: str) -> str:
    """`judged_name` of a concept that a pipeline draws.

    Raises:
        ValueError: it does not, so that nothing could be seen to go.
    """
    name = judged_name(names, concept)
    drawn = vocabulary_of(model)
    if drawn and not thing_of(name, drawn):
        raise ValueError(
            f"{model} does not draw {concept!r}: expected one of {', '.join(drawn[:5])} and other common things"
        )
    return name


def by_judge(judge: Judge) -> Recognise:
    """The share of pictures in which the judge sees the concept, one that it knows."""

    def recognise(images: list[Image.Image], concept: str) -> float:
        name = judged_name(judge.config.names, concept)
        truth = Truth(name, "single", ((name, ""),))
        seen = [verdict(judge, np.asarray(opaque(image)), truth)["identity"] for image in images]
        return sum(seen) / len(seen)

    return recognise


def by_clip(clip: PublishedCLIP) -> Recognise:
    """The mean cosine of pictures to the concept."""

    def recognise(images: list[Image.Image], concept: str) -> float:
        seen = clip.embed_pixels(torch.stack([clip.prepare(np.asarray(opaque(image))) for image in images]))
        words = clip.embed_text([f"a photo of {with_article(concept)}"])
        return F.cosine_similarity(seen, words).mean().item()

    return recognise


def verified(
    draw: Draw,
    erase: Callable[[], object],
    attack: Callable[[str], dict[str, Tensor]],
    concepts: Sequence[str],
    num: int,
    recognise: Recognise,
    known: Collection[str] | None = None,
) -> dict[str, dict[str, float]]:
    """How far `num` pictures of each concept show it before it is erased, after, and when its derived embedding is asked for.

    Args:
        erase: erases all of them.
        attack: a concept -> what the call takes to bring it back.
        known: names that `recognise` can tell; other concepts are erased, and nothing is said of them. None is all.

    Returns:
        concept -> "before", "after" and "derived embedding" -> value; nothing of one that is not known, and "before" alone where the
        pictures do not show the concept, so that there is nothing to verify.
    """
    seen = [concept for concept in concepts if known is None or known_name(concept, known)]
    asked = {concept: [truth.prompt for truth in of_concepts([concept], num)] for concept in seen}
    told: dict[str, dict[str, float]] = {concept: {} for concept in concepts}
    for concept, said in asked.items():
        told[concept]["before"] = recognise(draw(prompt=said), concept)
    erase()
    for concept in (one for one in seen if told[one]["before"] >= SHOWN):
        said = asked[concept]
        derived = {name: value.expand(num, *value.shape[1:]) for name, value in attack(concept).items()}
        told[concept]["after"] = recognise(draw(prompt=said), concept)
        told[concept]["derived embedding"] = recognise(draw(**derived), concept)
    return told


def in_words(shown: dict[str, float]) -> str:
    """What `verified` found of a concept."""
    if not shown:
        return "not verified, the judge does not know it"
    if len(shown) == 1:
        return f"not verified, the model does not draw it (before {shown['before']:.2f})"
    return ", ".join(f"{when} {value:.2f}" for when, value in shown.items())


def before_and_after(judge: Judge, truths: Sequence[Truth], **drawn: ImageSet) -> dict[str, dict]:
    """What the judge says of each set of pictures, and what changed from the first to each of the others, in points."""
    told = {name: evaluate(judge, images, truths) for name, images in drawn.items()}
    first, scores = next(iter(told)), {}
    for question, entry in told[first].items():
        scores[f"{question}, {first}"] = entry
        for name in list(told)[1:]:
            value = told[name][question]["value"]
            scores[f"{question}, {name}"] = told[name][question]
            scores[f"{question}, {name}: points"] = {"value": 100 * (value - entry["value"]), "n": entry["n"]}
    return scores
