"""The recipes by name: which task and schedule `argen train RECIPE` runs, and what it needs."""

import re
from dataclasses import replace
from pathlib import Path

from argen.hub.cards import all_cards, write_card
from argen.train import clip as clip_recipe
from argen.train import (
    controlar,
    counter,
    draft,
    flexar,
    flextok,
    judge,
    kl_vae,
    llamagen,
    parti,
    sd,
    seed,
    seed_encoder,
    seed_lm,
    unclip,
    vit_vqgan,
    xar,
)
from argen.train.loop import train

SCHEDULES = {
    "emoji-clip": clip_recipe.SCHEDULES,
    "emoji-vitvqgan": vit_vqgan.SCHEDULES,
    "emoji-vitvqgan-decoder": vit_vqgan.DECODER_SCHEDULES,
    "emoji-vae": kl_vae.SCHEDULES,
    "emoji-vae-decoder": kl_vae.DECODER_SCHEDULES,
    "emoji-parti": parti.SCHEDULES,
    "emoji-parti-second": parti.SECOND_SCHEDULES,
    "emoji-llamagen": llamagen.SCHEDULES,
    "emoji-llamagen-second": llamagen.SECOND_SCHEDULES,
    "emoji-control": controlar.SCHEDULES,
    "emoji-drafter": draft.SCHEDULES,
    "emoji-xar": xar.SCHEDULES,
    "emoji-flextok": flextok.SCHEDULES,
    "emoji-flextok-ar": flexar.SCHEDULES,
    "emoji-sd": sd.SCHEDULES,
    "emoji-sd-second": sd.SECOND_SCHEDULES,
    "emoji-sd-third": sd.THIRD_SCHEDULES,
    "emoji-counter": counter.SCHEDULES,
    "emoji-seed-encoder": seed_encoder.SCHEDULES,
    "emoji-seed-contrastive": seed.CONTRASTIVE_SCHEDULES,
    "emoji-seed": seed.SCHEDULES,
    "emoji-seed-decoder": unclip.SCHEDULES,
    "emoji-seed-lm": seed_lm.SCHEDULES,
    "emoji-seed-lm-second": seed_lm.SECOND_SCHEDULES,
    "emoji-judge": judge.SCHEDULES,
}
TASKS = {  # recipe -> its task, and what that takes beside the pictures
    "emoji-clip": (clip_recipe.CLIPTask, ("scenes",)),
    "emoji-vitvqgan": (vit_vqgan.ViTVQGANTask, ("total",)),
    "emoji-vitvqgan-decoder": (vit_vqgan.DecoderTask, ("tokenizer", "clip", "total")),
    "emoji-vae": (kl_vae.KLVAETask, ("total",)),
    "emoji-vae-decoder": (kl_vae.KLDecoderTask, ("vae", "clip", "total")),
    "emoji-parti": (parti.PartiTask, ("scenes", "tokenizer", "clip")),
    "emoji-parti-second": (parti.PartiTask, ("scenes", "tokenizer", "clip", "generator")),
    "emoji-llamagen": (llamagen.LlamaGenTask, ("scenes", "tokenizer", "clip")),
    "emoji-llamagen-second": (llamagen.LlamaGenTask, ("scenes", "tokenizer", "clip", "generator")),
    "emoji-control": (controlar.ControlTask, ("scenes", "tokenizer", "clip", "generator")),
    "emoji-drafter": (draft.DraftTask, ("scenes", "tokenizer", "clip", "generator")),
    "emoji-xar": (xar.XARTask, ("scenes", "vae", "clip", "x")),
    "emoji-flextok": (flextok.FlexTokTask, ("scenes", "vae", "clip")),
    "emoji-flextok-ar": (flexar.FlexARTask, ("scenes", "vae", "tokenizer", "clip")),
    "emoji-sd": (sd.StableDiffusionTask, ("scenes", "vae", "clip")),
    "emoji-sd-second": (sd.StableDiffusionTask, ("scenes", "vae", "clip", "generator")),
    "emoji-sd-third": (sd.ThirdStableDiffusionTask, ("scenes", "vae", "clip", "generator")),
    "emoji-seed-encoder": (seed_encoder.EncoderTask, ()),
    "emoji-seed-contrastive": (seed.SeedContrastiveTask, ("scenes", "tokenizer", "clip")),
    "emoji-seed": (seed.SeedTask, ("scenes", "tokenizer", "clip", "total")),
    "emoji-seed-decoder": (unclip.UnCLIPTask, ("scenes", "tokenizer", "vae", "clip")),
    "emoji-seed-lm": (seed_lm.SeedLMTask, ("scenes", "tokenizer", "clip")),
    "emoji-seed-lm-second": (seed_lm.SeedLMTask, ("scenes", "tokenizer", "clip", "generator")),
    "emoji-counter": (counter.CounterTask, ("scenes",)),
    "emoji-judge": (judge.JudgeTask, ("scenes", "tokenizer")),
}
STARTS = {  # recipe -> model it goes on from
    "emoji-parti-second": "emoji-parti",
    "emoji-llamagen-second": "emoji-llamagen",
    "emoji-control": "emoji-llamagen",
    "emoji-drafter": "emoji-llamagen",
    "emoji-sd-second": "emoji-sd",
    "emoji-sd-third": "emoji-sd",
    "emoji-seed-lm-second": "emoji-seed-lm",
}
TOKENIZERS = {  # recipe -> tokenizer it builds on; the others on emoji-vitvqgan
    "emoji-flextok-ar": "emoji-flextok",
    "emoji-seed-contrastive": "emoji-seed-encoder",
    "emoji-seed": "emoji-seed-contrastive",
    "emoji-seed-decoder": "emoji-seed",
    "emoji-seed-lm": "emoji-seed",
    "emoji-seed-lm-second": "emoji-seed",
}


def trained(recipe: str, part: str, folder: Path | None, shipped: Path) -> Path:
    """The folder of a trained part ("clip", "tokenizer", "vae" or "generator"); None is that in `shipped`.

    Raises:
        ValueError: it holds none.
    """
    models = {"clip": "emoji-clip", "vae": "emoji-vae", "tokenizer": TOKENIZERS.get(recipe, "emoji-vitvqgan")}
    model = STARTS[recipe] if part == "generator" else models[part]
    folder = folder or shipped / model
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no trained {model} in {folder}: give --{part} the folder `final` that `argen train {model}` has written"
        )
    return folder


def run(
    recipe: str,
    setting: str,
    data: Path,
    scenes: Path | None,
    out: Path,
    shipped: Path,
    seed: int = 0,
    steps: int | None = None,
    compile: bool = False,
    x: str | None = None,
    **parts: Path | None,
) -> dict[str, float]:
    """Train `recipe` in `out`, from its last checkpoint if there is one; returns the scores on held-out data.

    Args:
        setting: "cpu" or "gpu", the schedule.
        data, scenes: folders made by ``argen data emoji`` and ``argen data scenes``.
        shipped: where the models lie that argen brings.
        steps: stop there; the schedule stays as long as it is.
        compile: the networks go through ``torch.compile`` first.
        x: of `emoji-xar`, see `argen.train.xar.XARTask`; None for that of the shipped model.
        parts: clip, tokenizer, vae, generator, see `trained`.
    """
    if recipe not in SCHEDULES:
        raise ValueError(f"unknown recipe {recipe!r}: expected one of {', '.join(SCHEDULES)}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}: expected at least 1")
    if x is not None and recipe != "emoji-xar":
        raise ValueError(f"x is {x}, but the recipe {recipe} writes no X: leave it out")
    schedule = SCHEDULES[recipe][setting]
    task, takes = TASKS[recipe]
    if "scenes" in takes and scenes is None:
        raise ValueError(f"the recipe {recipe} needs scenes too: give --scenes a folder made by `argen data scenes`")
    kwargs = {"scenes": scenes, "total": schedule.steps, "x": x or xar.X}
    kwargs |= {part: trained(recipe, part, folder, shipped) for part, folder in parts.items() if part in takes}
    task = task(data, *(kwargs[name] for name in takes))
    if compile:
        for network in task.networks.values():
            network.compile()
    scores = train(task, schedule, out, seed=seed, steps=steps)
    if (out / "final").is_dir() and not any(parts.values()):  # what the card's reader puts beside it is what ships
        write_card_of(recipe, out / "final")
    return scores


def write_card_of(recipe: str, final: Path) -> None:
    """Give a trained folder the card of the shipped model that the recipe trains, so that ``argen.load(folder)`` reads it; parts of
    emoji-seed have none, since it takes three of them."""
    id = f"argen/{re.sub('-(second|third|decoder)$', '', recipe)}"
    if id in all_cards() and not recipe.startswith("emoji-seed"):
        write_card(replace(all_cards()[id], id=f"{recipe}, trained", order=1000), final)
