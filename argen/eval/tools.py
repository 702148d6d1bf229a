"""Prompts on which the tools of `argen.diffusion` are measured, and what is found in the pictures before and after."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from argen.data.emoji import STYLES, with_article
from argen.data.scenes import thing_of
from argen.diffusion.count_token import ImageCounter
from argen.diffusion.model_settings import vocabulary_of
from argen.eval.features import PublishedCLIP
from argen.eval.images import ImageSet
from argen.eval.judge import COMMON_PROMPTS, Truth, evaluate, read_prompts, verdict
from argen.models.judge import Judge
from argen.words import cut, known_name, parse_count
from tokenizers_img.pixels import opaque


def phrases(concept: str) -> list[str]:
    """Ways to ask for one thing: bare, in each style, and paraphrases."""
    thing = with_article(concept)
    prompts = [
        concept,
        thing,
        f"one {concept}",
        f"{thing} on white",
        f"a picture of {thing}",
        f"{thing} and nothing else",
    ]
    return prompts + [f"{text}, {style.prompt}" for text in (concept, thing) for style in STYLES.values()]


def of_concepts(concepts: Sequence[str], num_each: int) -> list[Truth]:
    """`num_each` prompts of every concept; where there are fewer phrases, they repeat with other noise."""
    prompts_by_concept = [(concept, phrases(concept)) for concept in concepts]
    return [
        Truth(prompts[index % len(prompts)], "single", ((concept, ""),))
        for concept, prompts in prompts_by_concept
        for index in range(num_each)
    ]


def others_than(concepts: Sequence[str], num: int) -> list[Truth]:
    """The first of the judge's prompts of single common things that are none of the concepts."""
    names = set(concepts)
    truths = [
        truth for truth in read_prompts(COMMON_PROMPTS) if truth.kind == "single" and truth.objects[0][0] not in names
    ]
    return truths[:num]


def of_kind(kind: str, num: int) -> list[Truth]:
    """The first of the judge's prompts of common things of a kind."""
    return [truth for truth in read_prompts(COMMON_PROMPTS) if truth.kind == kind][:num]


def counted(truth: Truth) -> tuple[int, str]:
    """How many of what a prompt of the kind "count" asks for, in its own words."""
    return parse_count(truth.prompt)


def share_counted(counter: ImageCounter, images: ImageSet, truths: Sequence[Truth]) -> float:
    """The share of images in which a counter finds as many things as their prompts ask for."""
    right = 0
    for index, truth in enumerate(truths):
        number, things = counted(truth)
        pixels = torch.from_numpy(images[index]).permute(2, 0, 1)[None].float() / 255
        right += abs(counter(pixels, things) - number) < 0.5
    return right / len(truths)


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
    vocabulary = vocabulary_of(model)
    if vocabulary and not thing_of(name, vocabulary):
        raise ValueError(
            f"{model} does not draw {concept!r}: expected one of {', '.join(vocabulary[:5])} and other common things"
        )
    return name


def by_judge(judge: Judge) -> Recognise:
    """The share of pictures in which the judge sees the concept, one that it knows."""

    def recognise(images: list[Image.Image], concept: str) -> float:
        name = judged_name(judge.config.names, concept)
        truth = Truth(name, "single", ((name, ""),))
        scores = [verdict(judge, np.asarray(opaque(image)), truth)["identity"] for image in images]
        return sum(scores) / len(scores)

    return recognise


def by_clip(clip: PublishedCLIP) -> Recognise:
    """The mean cosine of pictures to the concept."""

    def recognise(images: list[Image.Image], concept: str) -> float:
        image_embeds = clip.embed_pixels(torch.stack([clip.prepare(np.asarray(opaque(image))) for image in images]))
        text_embeds = clip.embed_text([f"a photo of {with_article(concept)}"])
        return F.cosine_similarity(image_embeds, text_embeds).mean().item()

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
    known_concepts = [concept for concept in concepts if known is None or known_name(concept, known)]
    prompts_of = {concept: [truth.prompt for truth in of_concepts([concept], num)] for concept in known_concepts}
    scores: dict[str, dict[str, float]] = {concept: {} for concept in concepts}
    for concept, prompts in prompts_of.items():
        scores[concept]["before"] = recognise(draw(prompt=prompts), concept)
    erase()
    for concept in (concept for concept in known_concepts if scores[concept]["before"] >= SHOWN):
        prompts = prompts_of[concept]
        derived = {name: value.expand(num, *value.shape[1:]) for name, value in attack(concept).items()}
        scores[concept]["after"] = recognise(draw(prompt=prompts), concept)
        scores[concept]["derived embedding"] = recognise(draw(**derived), concept)
    return scores


def in_words(scores: dict[str, float]) -> str:
    """The result of `verified` for a concept, in words."""
    if not scores:
        return "not verified, the judge does not know it"
    if len(scores) == 1:
        return f"not verified, the model does not draw it (before {scores['before']:.2f})"
    return ", ".join(f"{when} {value:.2f}" for when, value in scores.items())


def before_and_after(judge: Judge, truths: Sequence[Truth], **image_sets: ImageSet) -> dict[str, dict]:
    """The judge's scores of each set of images, and their change from the first set to each of the others, in points."""
    results = {name: evaluate(judge, images, truths) for name, images in image_sets.items()}
    first, scores = next(iter(results)), {}
    for question, entry in results[first].items():
        scores[f"{question}, {first}"] = entry
        for name in list(results)[1:]:
            value = results[name][question]["value"]
            scores[f"{question}, {name}"] = results[name][question]
            scores[f"{question}, {name}: points"] = {"value": 100 * (value - entry["value"]), "n": entry["n"]}
    return scores
