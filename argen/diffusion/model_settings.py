"""What the tools are asked with on a pipeline: what its card says (``[tools.*]``), else what the authors of each method used."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from argen.data.emoji import STYLES, with_article
from argen.data.scenes import NUMBERS
from argen.diffusion.count_token import ONE_STEP
from argen.diffusion.counters import (
    CLIPCountDensity,
    CLIPRelevance,
    Detected,
    EmojiCount,
    EmojiDensity,
    EmojiRelevance,
    components,
)
from argen.files import WEIGHTS
from argen.hub.cards import CARD_FILE, Card, all_cards, read_folder_card
from argen.hub.loading import load
from argen.registry import resolve
from argen.words import caption_names, mentions, split_names

USUAL = {"num_inference_steps": 50, "guidance_scale": 7.5}  # of Stable Diffusion


def card_of(model: str | Path) -> Card:
    """The card of a pipeline for the tools: of an id, of a saved folder, or one without settings for any other pipeline."""
    if str(model) in all_cards():
        return all_cards()[str(model)]
    path = Path(model) / CARD_FILE
    return (
        read_folder_card(path)
        if os.path.lexists(path)
        else Card(str(model), "diffusion", "a pipeline of diffusers", "")
    )


def drawing(model: str, steps: int | None = None, guidance_scale: float | None = None) -> dict:
    """Arguments of the pipeline's call: what is asked for, else the card's."""
    return (card_of(model).tool("draw") or USUAL) | _overrides(steps, guidance_scale)


def binding(model: str) -> str:
    """The settings of `SemanticBinding` where none are asked for: the authors', or the card's where those throw the model off."""
    return card_of(model).tool("bind").get("settings", "attribute")


def counting(model: str, count: int, steps: int | None = None, guidance_scale: float | None = None) -> dict:
    """Arguments of `CountToken` beside its counters. Where the card says ``optimise = "number"``, the word of the number is optimised, for
    models whose few words have no other that means nothing."""
    card, overrides = card_of(model), _overrides(steps, guidance_scale)
    if card.tool("count").get("optimise") != "number":
        return {"settings": ONE_STEP | overrides}
    word = NUMBERS[min(count, len(NUMBERS) - 1)]
    settings = card.tool("draw") | {"num_inference_steps": card.tool("count")["num_inference_steps"]} | overrides
    return {"placeholder": word, "template": "{placeholder} {things}", "settings": settings}


def counting_rate(model: str, rate: float | None = None) -> float:
    """Learning rate of a count token: what is asked for, else the card's, else the authors'."""
    return card_of(model).tool("count").get("learning_rate", 0.01) if rate is None else rate


def concepts_of(model: str, texts: Sequence[str]) -> list[str]:
    """The concepts that texts name, each once; several may stand in one text with commas between. For a model whose card has a vocabulary
    they are named as its captions name them ("The Pizzas!" is "pizza")."""
    names, vocabulary = split_names(texts), vocabulary_of(model)
    if vocabulary:
        styles = {style.prompt for style in STYLES.values()}  # which a caption names, too, and which are no concepts
        judged = json.loads((WEIGHTS / "emoji-judge/config.json").read_text(encoding="utf-8"))["names"]
        names = [
            concept
            for name in names
            for concept in caption_names(name, [*vocabulary, *judged])
            if concept not in styles
        ]
    return list(dict.fromkeys(names))


def vocabulary_of(model: str) -> Sequence[str]:
    """Names of all things that a model knows, where its card says them."""
    target = card_of(model).tool("erase").get("vocabulary")
    return resolve(target) if target else ()


def erasing(
    model: str,
    concepts: Sequence[str],
    preset: str | None = None,
    retained: Sequence[str] = (),
    targets: Sequence[str] | None = None,
) -> dict[str, str | list[str] | None]:
    """Arguments of `ConceptErasure.erase`. From a model whose card has a vocabulary: concepts as its captions have them, and with all others
    retained that it knows; from others as published.

    Raises:
        ValueError: targets that do not fit.
    """
    vocabulary, usual = vocabulary_of(model), card_of(model).tool("erase").get("preset", "object")
    if not vocabulary:
        return {
            "concepts": list(concepts),
            "targets": targets,
            "preset": preset or usual,
            "retained": list(retained),
        }
    if targets and len(targets) != len(concepts):
        raise ValueError(f"{len(targets)} targets for {len(concepts)} concepts: give one for each, or none")
    names = concepts_of(model, concepts)
    styles = ["", *(f", {style.prompt}" for style in STYLES.values())]
    others = [name for name in vocabulary if not any(mentions(text, name) for text in names)]
    retained_texts = [f"{words}{style}" for name in others for words in (name, with_article(name)) for style in styles]
    return {
        "concepts": [words for name in names for words in (name, with_article(name))],
        "targets": [target for target in targets for _ in range(2)] if targets else None,
        "preset": preset or usual,
        "retained": [*retained_texts, *retained],
    }


def _overrides(steps: int | None, guidance_scale: float | None) -> dict:
    settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    return {name: value for name, value in settings.items() if value is not None}


def counters(
    model: str, device: torch.device | str, clip_count: Path | None = None, detector: str | None = None
) -> dict:
    """Counters of `CountToken`.

    Args:
        model: one whose card names a counter and an encoder has counters that ship.
        clip_count: released file of CLIP-Count, for all others.
        detector: folder or "owner/name" of an object detector, which the density is scaled by.

    Raises:
        ValueError, FileNotFoundError: CLIP-Count is not given.
        ConnectionError: a part is not here and cannot be fetched.
    """
    settings = card_of(model).tool("count")
    if "counter" in settings:
        if clip_count or detector:
            raise ValueError(f"{model} has a counter of its own: leave --clip-count and --detector out")
        counter, relevance = (
            load(settings["counter"]).to(device),
            EmojiRelevance(load(settings["relevance"]).to(device)),
        )
        density, count = EmojiDensity(counter), EmojiCount(counter)
        return {"density": density, "detector": components, "relevance": relevance, "counter": count}
    if clip_count is None:
        raise ValueError(
            f"{model} needs a counter: give --clip-count the file clipcount_pretrained.ckpt, linked in the README of "
            "songrise/CLIP-Count"
        )
    parts = {"density": CLIPCountDensity.from_original(clip_count), "relevance": CLIPRelevance.from_hub()}
    if detector:
        parts["detector"] = Detected.from_hub(detector)
    for part in parts.values():
        part.model.to(device)
    return parts
