"""The recipes by name: which task and schedule `argen train RECIPE` runs, and what it needs."""

from pathlib import Path

from argen.train import clip as clip_recipe
from argen.train import controlar, draft, flexar, flextok, judge, kl_vae, llamagen, parti, vit_vqgan, xar
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
    "emoji-judge": judge.SCHEDULES,
}
STARTS = {  # recipe -> model it goes on from
    "emoji-parti-second": "emoji-parti",
    "emoji-llamagen-second": "emoji-llamagen",
    "emoji-control": "emoji-llamagen",
    "emoji-drafter": "emoji-llamagen",
}
TOKENIZERS = {"emoji-flextok-ar": "emoji-flextok"}  # recipe -> tokenizer it builds on; the others on emoji-vitvqgan
WITHOUT_SCENES = ("emoji-vitvqgan", "emoji-vitvqgan-decoder", "emoji-vae", "emoji-vae-decoder")


def run(
    recipe: str,
    setting: str,
    data: Path,
    scenes: Path | None,
    clip: Path,
    tokenizer: Path,
    vae: Path,
    generator: Path,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    compile: bool = False,
    x: str | None = None,
) -> dict[str, float]:
    """Train `recipe` in `out`, from its last checkpoint if there is one; returns the scores on held-out data.

    Args:
        setting: "cpu" or "gpu", the schedule.
        data, scenes: folders made by ``argen data emoji`` and ``argen data scenes``.
        clip, tokenizer, vae, generator: folders of the trained parts that a recipe builds on.
        steps: stop there; the schedule stays as long as it is.
        compile: the networks go through ``torch.compile`` first.
        x: of `emoji-xar`, see `argen.train.xar.XARTask`; None for that of the shipped model.
    """
    if recipe not in SCHEDULES:
        raise ValueError(f"unknown recipe {recipe!r}: expected one of {', '.join(SCHEDULES)}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}: expected at least 1")
    if x is not None and recipe != "emoji-xar":
        raise ValueError(f"x is {x}, but the recipe {recipe} writes no X: leave it out")
    schedule = SCHEDULES[recipe][setting]
    if recipe not in WITHOUT_SCENES and scenes is None:
        raise ValueError(f"the recipe {recipe} needs scenes too: give --scenes a folder made by `argen data scenes`")
    task = {
        "emoji-clip": lambda: clip_recipe.CLIPTask(data, scenes),
        "emoji-vitvqgan": lambda: vit_vqgan.ViTVQGANTask(data, schedule.steps),
        "emoji-vitvqgan-decoder": lambda: vit_vqgan.DecoderTask(data, tokenizer, clip, schedule.steps),
        "emoji-vae": lambda: kl_vae.KLVAETask(data, schedule.steps),
        "emoji-vae-decoder": lambda: kl_vae.KLDecoderTask(data, vae, clip, schedule.steps),
        "emoji-parti": lambda: parti.PartiTask(data, scenes, tokenizer, clip),
        "emoji-parti-second": lambda: parti.PartiTask(data, scenes, tokenizer, clip, generator),
        "emoji-llamagen": lambda: llamagen.LlamaGenTask(data, scenes, tokenizer, clip),
        "emoji-llamagen-second": lambda: llamagen.LlamaGenTask(data, scenes, tokenizer, clip, generator),
        "emoji-control": lambda: controlar.ControlTask(data, scenes, tokenizer, clip, generator),
        "emoji-drafter": lambda: draft.DraftTask(data, scenes, tokenizer, clip, generator),
        "emoji-xar": lambda: xar.XARTask(data, scenes, vae, clip, x or xar.X),
        "emoji-flextok": lambda: flextok.FlexTokTask(data, scenes, vae, clip),
        "emoji-flextok-ar": lambda: flexar.FlexARTask(data, scenes, vae, tokenizer, clip),
        "emoji-judge": lambda: judge.JudgeTask(data, scenes, tokenizer),
    }[recipe]()
    if compile:
        for network in task.networks.values():
            network.compile()
    return train(task, schedule, out, seed=seed, steps=steps)
