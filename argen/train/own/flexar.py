"""`argen train flexar`: FlexAR on classes or captions of one's own images, from nothing or from any FlexAR.

Its authors released no training code. The settings are those of `emoji-flextok-ar` without Muon: AdamW (0.9, 0.98), decay 0.03 of matrices,
a warm-up and then a decline, the condition left out in a tenth of the samples.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from argen.device import pick
from argen.models.flexar import FlexAR
from argen.pipelines.flexar import FlexARPipeline
from argen.train.loop import Schedule
from argen.train.own.options import OwnOptions
from argen.train.own.run import OwnRecipe
from argen.train.own.start import image_tokenizer_of, read_text_encoder, size_of, start_of
from argen.train.own.tokens import (
    OwnTokensTask,
    check_conditions,
    cross_entropy,
    examples_of,
    shown_states,
)
from argen.train.sources import Source
from samplers.errors import InvalidValue
from tokenizers_img.flextok.tokenizer import FlexTokenizer

SCHEDULE = Schedule(
    steps=10_000,
    batch_size=256,
    learning_rate=1e-3,
    warmup=500,
    betas=(0.9, 0.98),
    weight_decay=0.03,
    ema_decay=0.999,
    decayed="matrices",
)
LORA_SCHEDULE = replace(SCHEDULE, steps=1_000, batch_size=8, warmup=20, weight_decay=0.0, ema_decay=0.99)
SIZES = {
    name: {"dim": width, "depth": depth, "heads": width // 64, "hidden": 8 * width // 3 // 64 * 64}
    for name, width, depth in (("113M", 768, 12), ("382M", 1152, 18), ("1B", 1664, 26), ("3B", 2304, 36))
} | {"mini": {"dim": 160, "depth": 5, "heads": 5, "hidden": 448, "dropout": 0.1}}
TEXT_ENCODER = "argen/emoji-clip"


class FlexARTask(OwnTokensTask):
    """FlexAR after classes or captions."""

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """See `OwnTokensTask.loss`."""
        if "states" in batch:
            condition, mask = shown_states(batch)
        else:
            condition = torch.where(batch["dropped"], -1, batch["condition"])
            mask = torch.ones(len(condition), 1, dtype=torch.bool, device=condition.device)
        return cross_entropy(network(condition, mask, batch["tokens"]), batch["tokens"])


def new_pipeline(options: OwnOptions, source: Source) -> FlexARPipeline:
    """A pipeline with a network of random weights, after classes where the images have some, else after captions.

    Raises:
        ValueError: a size, a tokenizer or a text encoder that cannot be used.
    """
    sizes = size_of(options, SIZES, "113M")
    images = image_tokenizer_of(options, FlexTokenizer, "FlexAR", "a FlexTok", "argen/emoji-flextok")
    if options.image_size not in (None, images.config.image_size):
        raise InvalidValue(
            f"image_size is {options.image_size}: expected {images.config.image_size}, that of {options.tokenizer}",
            "image_size",
        )
    parts = images.network, images.vae
    flow = {"steps": images.steps, "tokenizer_guidance": images.guidance_scale}
    shared = {"n_embed": images.config.n_embed, "length": images.config.tokens} | sizes
    if source.classes is not None:
        network = FlexAR(classes=len(source.classes), text_dim=None, **shared)
        return FlexARPipeline(network, *parts, class_names=list(source.classes), **flow)
    encoder, tokenizer, width = read_text_encoder(options.text_encoder or TEXT_ENCODER)
    return FlexARPipeline(FlexAR(text_dim=width, **shared), *parts, encoder, tokenizer, **flow)


def with_classes(network: FlexAR, count: int) -> None:
    """Give a network a table of other classes, each of which begins at "no class", which is zero."""
    parts = network.models["ar_image_model"]["preprocessor"]
    parts.cls_embedding = nn.Embedding(count, network.config.dim).to(parts.embedding.weight)
    nn.init.zeros_(parts.cls_embedding.weight)


def prepare(options: OwnOptions, source: Source, held: Source) -> FlexARTask:
    """See `argen.train.own.run.OwnRecipe.prepare`."""
    check_conditions(source)
    pipe = (
        new_pipeline(options, source)
        if options.init is None
        else start_of(options, source, FlexARPipeline, FlexAR, "FlexAR", with_classes)
    )
    pipe = pipe.to(pick(None))
    crops = "flip" if source.classes is not None else "center"
    return FlexARTask(pipe, *examples_of(pipe, options, source, held, crops), options)


RECIPE = OwnRecipe(prepare, SCHEDULE, LORA_SCHEDULE)
