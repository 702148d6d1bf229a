"""`argen train parti`: a Parti-style encoder and decoder on captions of one's own images, from nothing or from argen/emoji-parti.

Google released no training code. The defaults are the paper's (arXiv 2206.10789, section 4) where they do not depend on its size: AdamW
(0.9, 0.96), decay 0.045, the text left out in a tenth of the samples, a warm-up and then a decline.
"""

from dataclasses import replace

from torch import Tensor, nn

from argen.device import pick
from argen.hub.loading import load
from argen.models.clip import TextImageEncoder
from argen.models.parti import Parti
from argen.pipelines.parti import PartiPipeline
from argen.train.loop import Schedule
from argen.train.own.options import OwnOptions
from argen.train.own.run import OwnRecipe
from argen.train.own.tokens import OwnTokensTask, check_captions, cross_entropy, examples_of, shown_states
from argen.train.sources import Source
from argen.words import cut
from samplers.errors import InvalidValue
from tokenizers_img.vit_vqgan import ViTVQGAN

SCHEDULE = Schedule(
    steps=10_000,
    batch_size=64,
    learning_rate=1e-3,
    warmup=500,
    betas=(0.9, 0.96),
    weight_decay=0.045,
    ema_decay=0.999,
    decayed="matrices",
)
LORA_SCHEDULE = replace(
    SCHEDULE, steps=1_000, batch_size=8, learning_rate=1e-3, warmup=20, weight_decay=0.0, ema_decay=0.99
)
TEXT_ENCODER = "argen/emoji-clip"  # a CLIP, which ranks candidates, too
SIZES = {"mini": {}, "B": {"dim": 768, "encoder_depth": 2, "decoder_depth": 12, "heads": 12, "mlp_dim": 3072}}


class PartiTask(OwnTokensTask):
    """Parti after captions."""

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """See `OwnTokensTask.loss`."""
        return cross_entropy(network(*shown_states(batch), batch["tokens"]), batch["tokens"])


def new_pipeline(options: OwnOptions) -> PartiPipeline:
    """A pipeline with a network of random weights.

    Raises:
        ValueError: a size, a tokenizer or a text encoder that cannot be used.
    """
    if (options.size or "mini") not in SIZES:
        raise InvalidValue(f"size is {cut(options.size)}: expected {' or '.join(SIZES)}", "size")
    name = options.tokenizer or "argen/emoji-vitvqgan"
    images, encoder = load(name), load(options.text_encoder or TEXT_ENCODER)
    if not isinstance(images, ViTVQGAN):
        raise InvalidValue(f"{name} is no ViT-VQGAN: expected one, as argen/emoji-vitvqgan", "tokenizer")
    if not isinstance(encoder, TextImageEncoder):
        raise InvalidValue(f"{options.text_encoder} is no CLIP: expected one, as {TEXT_ENCODER}", "text_encoder")
    width = encoder.clip.config.text_config.hidden_size
    network = Parti(width, images.config.n_embed, images.grid, **SIZES[options.size or "mini"])
    return PartiPipeline(encoder.clip, encoder.tokenizer, network, images)


def prepare(options: OwnOptions, source: Source, held: Source) -> PartiTask:
    """See `argen.train.own.run.OwnRecipe.prepare`."""
    check_captions(source, "Parti")
    pipe = new_pipeline(options) if options.init is None else load(options.init, dtype="fp32")
    if not isinstance(pipe, PartiPipeline):
        raise InvalidValue(f"{options.init} is no Parti: expected one to start from, as argen/emoji-parti", "init")
    pipe = pipe.to(pick(None))
    return PartiTask(pipe, *examples_of(pipe, options, source, held, "center"), options)


RECIPE = OwnRecipe(prepare, SCHEDULE, LORA_SCHEDULE)
