"""`argen train vit-vqgan`: the image tokenizer of Parti on one's own images, which need neither classes nor captions.

The defaults are those of github.com/thuanz123/enhancing-transformers: L2, a tenth of the perceptual and of the logistic adversarial term,
both from the first step, R1 in every 16th, AdamW (0.9, 0.99), decay 1e-4; rate and batch are those of the paper (arXiv 2110.04627, section 5.1).
"""

from math import inf
from pathlib import Path

from argen.device import pick
from argen.hub.cards import Card, write_card
from argen.train.loop import Schedule
from argen.train.own.options import OwnOptions
from argen.train.own.run import OwnRecipe
from argen.train.own.tokenizers import OwnTokenizerTask, Terms, check_options, check_side, started
from argen.train.sources import Source
from argen.words import cut
from samplers.errors import InvalidValue
from tokenizers_img.vit_vqgan import SIZES, ViTVQGAN

SCHEDULE = Schedule(
    steps=40_000,
    batch_size=256,
    learning_rate=1e-4,
    warmup=1_000,
    betas=(0.9, 0.99),
    weight_decay=1e-4,
    grad_clip=inf,
    ema_decay=0.0,
    floor=0.0,
    ema_warmup=False,
)
TERMS = Terms(l1=0.0, l2=1.0, perceptual=0.1, adversarial="logistic", fooled=0.1, smoothness=10.0)
MINI = {
    "patch_size": 16,
    "encoder_size": {"dim": 192, "depth": 4, "heads": 3, "dim_head": 64, "mlp_dim": 768},
    "decoder_size": {"dim": 256, "depth": 4, "heads": 4, "dim_head": 64, "mlp_dim": 1024},
    "embed_dim": 16,
    "n_embed": 1024,
    "conv_channels": [32, 64, 128, 192],
    "pyramid": [32, 64, 128],
}  # for a CPU


class ViTVQGANTask(OwnTokenizerTask):
    """ViT-VQGAN on images of one size."""

    def save(self, folder: Path) -> None:
        """See `OwnTokenizerTask.save`."""
        self.settle()
        self._model().save_pretrained(folder)
        arguments = {"network": "tokenizers_img.vit_vqgan:ViTVQGAN"}
        about, target = self.about("ViT-VQGAN"), "argen.models.files:read_network"
        card = Card("vit-vqgan, trained", "tokenizer", about, target, parameters=self.millions(), arguments=arguments)
        write_card(card, folder)


def new_network(size: str, image_size: int | None) -> ViTVQGAN:
    """A network of random weights.

    Raises:
        InvalidValue: an unknown size, or one of images that its patches do not divide.
    """
    if size == "mini":
        return ViTVQGAN(check_side(image_size or 128, MINI["patch_size"]), **MINI)
    if size not in SIZES:
        raise InvalidValue(f"size is {cut(size)}: expected {', '.join(SIZES)} or mini", "size")
    return ViTVQGAN(check_side(image_size or 256, 8), 8, SIZES[size], SIZES[size])


def prepare(options: OwnOptions, source: Source, held: Source) -> ViTVQGANTask:
    """See `argen.train.own.run.OwnRecipe.prepare`."""
    check_options(options)
    if options.init is None:
        model = new_network(options.size or "base", options.image_size)
    else:
        model = started(options.init, ViTVQGAN, "ViT-VQGAN")
        for half in (model.encoder.en_pos_embedding, model.decoder.de_pos_embedding):
            half.requires_grad_(False)  # fixed, as published
        if options.image_size not in (None, model.config.image_size):
            raise InvalidValue(
                f"image_size is {options.image_size}: expected {model.config.image_size}, that of {options.init}",
                "image_size",
            )
    model, side = model.to(pick(None)), model.config.image_size
    return ViTVQGANTask(model, model.quantizer.embedding.weight, TERMS, side, source, held, options)


RECIPE = OwnRecipe(prepare, SCHEDULE, conditions=False)
