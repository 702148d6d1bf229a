"""`argen train controlar`: ControlAR on one's own images, which it learns to draw along edges, depth or any other control image.

The defaults are those of the official scripts (github.com/hustvl/ControlAR): a LlamaGen's weights to start from, AdamW (0.9, 0.95) at 5e-5, decay 0.05 of
matrices, caption and control image left out together in a tenth of the samples.

Letters in shape comments: B samples, S side of the control images in pixels.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor, nn

from argen.eval.images import crops
from argen.hub.loading import load
from argen.models.annotators import annotate, as_control, check_kind, resized
from argen.models.controlar import CELL, ControlAR
from argen.pipelines.controlar import ControlARPipeline
from argen.pipelines.llamagen import LlamaGenPipeline
from argen.train.own import llamagen
from argen.train.own.options import OwnOptions
from argen.train.own.run import OwnRecipe
from argen.train.own.tokens import Examples, check_captions, cross_entropy, examples_of
from argen.train.sources import Source
from samplers.errors import InvalidValue

SCHEDULE = replace(llamagen.SCHEDULE, steps=10_000, batch_size=96, learning_rate=5e-5, ema_decay=0.0)
SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 288,
    "patch_size": 16,
}
KEPT = 4096  # control images that are kept in memory


class ControlARTask(llamagen.LlamaGenTask):
    """LlamaGen after captions and a control image."""

    def __init__(self, pipe: ControlARPipeline, examples: Examples, held_out: Examples, options: OwnOptions):
        super().__init__(pipe, examples, held_out, options)
        self.kind = options.control
        self.options = self.options | {"control": options.control}
        self.control = lru_cache(KEPT)(self.made_control)

    def picture(self, source: Source, index: int) -> Image.Image:
        """The crop that an image's tokens are of, or the control image that came with it."""
        own = source.control(index)
        image = source.image(index) if own is None else own
        return crops(image, self.pipe.image_size, "center")[0]

    def made_control(self, held_out: bool, index: int) -> Tensor:
        """[3, S, S] in [-1, 1]."""
        source, side = (self.held_out if held_out else self.examples).source, self.pipe.transformer.config.grid * CELL
        kind = "map" if source.control(index) is not None else self.kind
        return as_control(annotate(resized(self.picture(source, index), kind, (side, side)), kind))

    def read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Also the control images [B, 3, S, S]."""
        control = torch.stack([self.control(False, index) for index in batch["image"].tolist()])
        return super().read(batch) | {"control": control}

    def held_out_batch(self, first: int) -> dict[str, Tensor]:
        batch = super().held_out_batch(first)
        rows = range(first, first + len(batch["tokens"]))
        return batch | {"control": torch.stack([self.control(True, index) for index in rows])}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """See `OwnTokensTask.loss`."""
        logits = network(self.conditioned(batch), batch["mask"], batch["tokens"], batch["control"], batch["dropped"])
        return cross_entropy(logits, batch["tokens"])

    def arguments(self, indices: list[int]) -> dict:
        """Control images of the sample sheet, as they come."""
        images = [self.picture(self.held_out.source, index) for index in indices]
        own = self.held_out.source.control(indices[0]) is not None
        return {"control_image": images, "control_type": "map" if own else self.kind}


def check_control(options: OwnOptions) -> None:
    """Raises:
    ValueError: there is no such control, or the crops are not those that control images are made of.
    """
    check_kind(options.control)
    if options.crops not in (None, "center"):
        raise InvalidValue(f"crops is {options.crops}: expected center, of which the control image is made", "crops")


def started(options: OwnOptions) -> ControlARPipeline:
    """A ControlAR, or a LlamaGen of captions with a new control path.

    Raises:
        InvalidValue: it is neither.
    """
    pipe = load(options.init, dtype="fp32")
    if isinstance(pipe, ControlARPipeline):
        return pipe
    if not isinstance(pipe, LlamaGenPipeline) or pipe.transformer.config.classes is not None:
        raise InvalidValue(
            f"{options.init} is neither a ControlAR nor a LlamaGen of captions: expected one to start from", "init"
        )
    config = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    side = config["grid"] * CELL
    network = ControlAR(encoder="vit", encoder_sizes=SMALL | {"image_size": side}, **config)
    network.load_state_dict(pipe.transformer.state_dict(), strict=False)
    return ControlARPipeline(network, pipe.vq, pipe.text_encoder, pipe.tokenizer, pipe.config.groups, any_size=False)


def prepare(options: OwnOptions, source: Source, held: Source) -> ControlARTask:
    """See `argen.train.own.run.OwnRecipe.prepare`."""
    check_captions(source, "ControlAR")
    check_control(options)
    if options.init is None:
        raise InvalidValue("controlar starts from a model: give --init a ControlAR or a LlamaGen of captions", "init")
    pipe = started(options)
    return ControlARTask(pipe, *examples_of(pipe, options, source, held, "center"), options)


RECIPE = OwnRecipe(prepare, SCHEDULE)
