"""`argen train xar`: xAR on classes or captions of one's own images, from nothing or from any xAR.

The defaults are those of the official code (github.com/OliverRensu/xAR): AdamW (0.9, 0.96), decay 0.02 of matrices, 4e-4 after a rise over an
eighth of the steps, a fall to 1e-5 in their last quarter, and Noisy Context Learning: every cell is noised for a time of its own, and reads
those before it at their own noise levels. Mean and standard deviation of the posterior are cached; latents are sampled from it at each step.

Letters in shape comments: B samples, C channels of a latent of h x w, N positions of the sequence, K entities.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from argen.device import pick
from argen.models.xar import SIZES, XAR
from argen.pipelines.xar import XARPipeline
from argen.train.loop import Schedule
from argen.train.own.latents import bits_of, drawn_latents, moments
from argen.train.own.options import OwnOptions
from argen.train.own.run import OwnRecipe
from argen.train.own.start import image_tokenizer_of, read_text_encoder, size_of, start_of
from argen.train.own.tokens import OwnTokensTask, check_conditions, examples_of, shown_states
from argen.train.sources import Source
from samplers.errors import InvalidValue
from tokenizers_img.kl_vae import KLVAE

SCHEDULE = Schedule(
    steps=10_000,
    batch_size=256,
    learning_rate=4e-4,
    warmup=1_250,
    betas=(0.9, 0.96),
    weight_decay=0.02,
    ema_decay=0.9999,
    hold=0.75,
    floor=0.025,
    decayed="matrices",
)
LORA_SCHEDULE = replace(SCHEDULE, steps=1_000, batch_size=8, warmup=20, weight_decay=0.0, ema_decay=0.99, hold=0.0)
MINI = {"dim": 256, "encoder_depth": 2, "decoder_depth": 3, "heads": 4, "rank": 48}  # for a CPU
DROPOUT = 0.1  # of attention and of what layers add, as in the official code
TEXT_ENCODER = "argen/emoji-clip"
CELLS = 2  # along each side, as published


class XARTask(OwnTokensTask):
    """xAR after classes or captions; what the cache keeps of an image are the bits of float16 numbers."""

    def drawn(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What is drawn for each sample: "drawn" [B, C, h, w] of the latents' distribution, a time of each entity [B, K], "noise" [B, N, C]."""
        config, entities = self._model().config, self._model().entities
        normal = torch.randn(size, config.channels, config.grid, config.grid, generator=generator)
        times = torch.randn(size, len(entities.lengths), generator=generator).sigmoid()
        noise = torch.randn(size, sum(entities.lengths), config.channels, generator=generator)
        return {"drawn": normal, "times": times, "noise": noise}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """See `OwnTokensTask.batch` and `drawn`."""
        return super().batch(size, generator) | self.drawn(size, generator)

    def read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `OwnTokensTask.read`; "tokens" are latents [B, C, h, w]."""
        return self._with_latents(super().read(batch), batch)

    def held_out_batch(self, first: int) -> dict[str, Tensor]:
        """See `OwnTokensTask.held_out_batch`; what is drawn is the same each time."""
        batch = super().held_out_batch(first)
        return self._with_latents(batch, self.drawn(len(batch["tokens"]), torch.Generator().manual_seed(first)))

    def _with_latents(self, read: dict[str, Tensor], drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = drawn_latents(read["tokens"], drawn["drawn"])
        return read | {"tokens": latents, "times": drawn["times"], "noise": drawn["noise"]}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean squared error of the velocity, noise minus data."""
        model = self._model()
        x, noise = model.entities.patchify(batch["tokens"]), batch["noise"]
        times = batch["times"][:, model.entity, None]
        noisy = (1 - times) * x + times * noise
        if "states" in batch:
            states, mask = shown_states(batch)
            velocity = network(noisy, batch["times"], states, mask=mask)
        else:
            velocity = network(noisy, batch["times"], batch["condition"], batch["dropped"])
        return (velocity.float() - (noise - x)).square().mean()


def new_pipeline(options: OwnOptions, source: Source) -> XARPipeline:
    """A pipeline with a network of random weights, after classes where the images have some, else after captions.

    Raises:
        ValueError: a size, a tokenizer or a text encoder that cannot be used.
    """
    sizes = size_of(options, SIZES | {"mini": MINI}, "B")
    images = image_tokenizer_of(options, KLVAE, "xAR", "a KL autoencoder", "argen/emoji-vae")
    side = options.image_size or images.config.image_size
    if side % (CELLS * images.stride):
        raise InvalidValue(
            f"image_size is {side}: expected a multiple of {CELLS * images.stride}, two cells of {options.tokenizer}",
            "image_size",
        )
    grid = side // images.stride
    shared = {"grid": grid, "size": grid // CELLS, "channels": images.config.latent_channels, "dropout": DROPOUT}
    if source.classes is not None:
        network = XAR(classes=len(source.classes), **sizes, **shared)
        return XARPipeline(network, images.vae, class_names=list(source.classes))
    encoder, tokenizer, width = read_text_encoder(options.text_encoder or TEXT_ENCODER)
    return XARPipeline(XAR(caption_dim=width, **sizes, **shared), images.vae, encoder, tokenizer)


def with_classes(network: XAR, count: int) -> None:
    """Give a network a table of other classes; "no class" stays what it was, and each new one begins there."""
    table = network.class_emb.weight.data
    network.class_emb = nn.Embedding(count + 1, table.shape[1]).to(table)
    network.class_emb.weight.data = table[-1:].repeat(count + 1, 1)


def prepare(options: OwnOptions, source: Source, held: Source) -> XARTask:
    """See `argen.train.own.run.OwnRecipe.prepare`."""
    check_conditions(source)
    pipe = (
        new_pipeline(options, source)
        if options.init is None
        else start_of(options, source, XARPipeline, XAR, "xAR", with_classes)
    )
    pipe = pipe.to(pick(None))
    vae = KLVAE(pipe.vae)
    crops = "flip" if source.classes is not None else "center"
    encode = lambda pixels: bits_of(moments(vae, pixels))  # noqa: E731
    return XARTask(pipe, *examples_of(pipe, options, source, held, crops, vae, encode), options)


RECIPE = OwnRecipe(prepare, SCHEDULE, LORA_SCHEDULE)
