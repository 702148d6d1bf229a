"""Running the recipes of the registry: what each of them takes, from where, and the card of what it writes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import set_seed

from argen.bounds import check
from argen.hub.cards import all_cards, write_card
from argen.registry import recipes
from argen.train.loop import Recipe, Task, train


def trained(recipe: Recipe, part: str, folder: Path | None, shipped: Path) -> Path:
    """The folder of a trained part ("clip", "tokenizer", "vae", "judge" or "generator"); None is that in `shipped`.

    Raises:
        ValueError: it holds none, or another network than the one that ships.
    """
    models = {"clip": "emoji-clip", "vae": "emoji-vae", "judge": "emoji-judge"}
    models |= {"tokenizer": recipe.tokenizer, "generator": recipe.start}
    model = models[part]
    folder = folder or shipped / model
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no trained {model} in {folder}: give --{part} the folder `final` that `argen train {model}` has written"
        )
    classes = [_class_of(each) for each in (folder, shipped / model)]
    if None not in classes and classes[0] != classes[1]:
        raise ValueError(
            f"--{part} {folder} holds a network of the class {classes[0]}: expected a trained {model}, of the class {classes[1]}"
        )
    return folder


def _class_of(folder: Path) -> str | None:
    """The class of the network in a folder, as its configuration names it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config.get("_class_name") or config["architectures"][0]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None


def check_set(flag: str, folder: Path | None) -> None:
    """Raises:
    ValueError: a folder that `argen data` did not make, or one of the other kind.
    """
    if folder is None:
        return
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema

    command, column = {"data": ("argen data emoji", "concept"), "scenes": ("argen data scenes", "objects")}[flag]
    file = next(iter(sorted(folder.glob("data/train-*.parquet"))), None)
    try:
        columns = [] if file is None else read_schema(file).names
    except (ArrowException, OSError) as error:
        raise ValueError(
            f"{file} cannot be read ({' '.join(str(error).split())[:200]}): make it again by `{command}`"
        ) from error
    if column not in columns:
        raise ValueError(f"--{flag} {folder} holds no images of this kind: expected a folder made by `{command}`")


def check_batch(task: Task, size: int) -> None:
    """Raises:
    ValueError: the sets are too small to draw a batch from.
    """
    try:
        task.batch(size, torch.Generator().manual_seed(0))
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(
            f"the images are too few for a batch of {size} ({error}): make more with `argen data`"
        ) from error


def run(
    recipe: str,
    setting: str,
    data: Path | None,
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
        x: of a recipe that takes it, see `argen.train.xar.XARTask`; None for that of the shipped model.
        parts: clip, tokenizer, vae, judge, generator, see `trained`.
    """
    known = recipes[recipe]
    check("run_seed", seed, "seed")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}: expected at least 1")
    if x is not None and "x" not in known.takes:
        raise ValueError(f"x is {x}, but the recipe {recipe} writes no X: leave it out")
    schedule = known.schedules[setting]
    if known.needs_data and data is None:
        raise ValueError(f"the recipe {recipe} learns from images: give --data a folder made by `argen data emoji`")
    if not known.needs_data and data is not None:
        raise ValueError(f"the recipe {recipe} learns from no images: leave --data out")
    for flag, folder in (("data", data), ("scenes", scenes)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{flag} {folder} is not a folder: expected one made by `argen data`")
    if "scenes" in known.takes and scenes is None:
        raise ValueError(f"the recipe {recipe} needs scenes too: give --scenes a folder made by `argen data scenes`")
    kwargs = {"scenes": scenes, "total": schedule.steps, "x": x}
    kwargs |= {part: trained(known, part, folder, shipped) for part, folder in parts.items() if part in known.takes}
    check_set("data", data)
    check_set("scenes", scenes)
    folders = (data,) if known.needs_data else ()
    set_seed(seed)  # of the weights
    task = known.task(*folders, *(kwargs[name] for name in known.takes))
    check_batch(task, schedule.batch_size)
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
