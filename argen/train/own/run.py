"""From a folder of images to a training: what every recipe of one's own images does before its first step."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor

from argen.device import pick
from argen.eval.images import crops
from argen.metadata import fingerprint
from argen.processes import processes
from argen.train.loop import Schedule, Task, train
from argen.train.own.options import OwnOptions
from argen.train.sharding import check_launch
from argen.train.sources import Source, held_out, open_source
from argen.train.token_cache import TokenCache, Tokens
from argen.train.tracking import check_tracker
from samplers.errors import InvalidValue
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.pixels import from_pil

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnRecipe:
    """A recipe for one's own images.

    Attributes:
        prepare: options, images to train on, images that are held out -> the task.
        schedule: that of the official code.
        lora: that of a LoRA; None where there is none.
        conditions: whether classes or captions of the images are learned.
        mixed: whether it can learn to complete images.
    """

    prepare: Callable[[OwnOptions, Source, Source], Task]
    schedule: Schedule
    lora: Schedule | None = None
    conditions: bool = True
    mixed: bool = False

    def scheduled(self, options: OwnOptions, steps: int | None) -> Schedule:
        """The schedule, as the options change it.

        Raises:
            InvalidValue: a LoRA or an objective is asked for that the recipe does not have.
        """
        if options.objective == "mixed" and not self.mixed:
            raise InvalidValue("objective is mixed, which only the recipe llamagen has: leave it out", "objective")
        start = self.schedule if options.lora is None else self.lora
        if start is None:
            raise InvalidValue("this recipe trains no LoRA: leave lora out", "lora")
        names = ("batch_size", "micro_batch", "learning_rate", "warmup", "ema_decay")
        changes = {name: value for name in names if (value := getattr(options, name)) is not None}
        return replace(start, **changes | ({"steps": steps} if steps else {}))


def run(
    recipe: OwnRecipe,
    options: OwnOptions,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    stop: int | None = None,
    compile: bool = False,
) -> dict[str, float]:
    """Train in `out`, from its last checkpoint if there is one; returns the scores on held-out images.

    Args:
        steps: how many; None for the recipe's.
        stop: after so many of them, to go on later.
        compile: the network goes through ``torch.compile`` first.

    Raises:
        FileNotFoundError, ValueError: images or options that cannot be used; says which, before anything is written.
    """
    check_launch()
    check_tracker(options.tracker)
    schedule = recipe.scheduled(options, steps)
    with processes().main_process_first():  # what it finds out is kept for the others
        source = opened(options, recipe.conditions)
    set_seed(seed)  # of a new network's weights
    task = recipe.prepare(options, *held_out(source))
    if compile:
        for network in task.networks.values():
            network.compile()
    every = options.evaluate_every
    often = {"checkpoint_every": every, "evaluate_every": every, "keep": options.keep_checkpoints}
    return train(task, schedule, out, seed=seed, steps=stop, tracker=options.tracker, **often)


def opened(options: OwnOptions, conditions: bool = True) -> Source:
    """The images that are asked for; see `open_source`."""
    return open_source(
        options.images,
        options.captions,
        image_column=options.image_column,
        caption_column=options.caption_column,
        label_column=options.label_column,
        control_column=options.control_column,
        split=options.split,
        missing_captions=options.missing_captions,
        strict=options.strict,
        conditions=conditions,
    )


def encoded(
    tokenizer: ImageTokenizer,
    source: Source,
    size: int,
    how: str,
    encode: Callable[[Tensor], Tensor] | None = None,
    whole: Callable[[Image.Image], Tensor] | None = None,
) -> Tokens:
    """The token ids of all crops of all images, made now or taken from the cache.

    Args:
        size: side of the crops in pixels.
        how: see `argen.eval.images.crops`, or what to call `whole`.
        encode: pixels [B, 3, size, size] in [0, 1] -> whole numbers [B, L]; None for the tokenizer's ids.
        whole: an image as it is -> pixels [3, size, size] in [0, 1], in the place of crops.
    """
    device = pick(None)

    @torch.no_grad()
    def numbers_of(images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([from_pil(image, size) if whole is None else whole(image) for image in images])
        return (encode or tokenizer.encode)(pixels.to(tokenizer.device, tokenizer.dtype)).cpu()

    settings = {
        "tokenizer": fingerprint(getattr(tokenizer, "vq", tokenizer)),
        "size": size,
        "resize": "adm",
        "crop": how,
        "flip": whole is None and how != "center",
    }
    state = processes()
    shared = {"rank": state.process_index, "world": state.num_processes, "barrier": state.wait_for_everyone}
    cache = TokenCache(None, settings | {"dtype": str(tokenizer.dtype), "device": device.type}, **shared)
    return cache.encode(source, numbers_of, lambda image: crops(image, size, how) if whole is None else [image])
