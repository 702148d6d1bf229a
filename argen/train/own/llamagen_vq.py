"""`argen train llamagen-vq`: LlamaGen's image tokenizer on one's own images, which need neither classes nor captions.

The defaults are those of the official code (github.com/FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_train.py): Adam (0.9, 0.95), a constant
rate of 1e-4, 128 images a step, gradients clipped at norm 1; L2 of pixels in [-1, 1], the perceptual term, and from step 20,000 on half of the hinge loss of a
PatchGAN, which a trained tokenizer has from the first. As there, no weight adapts and no entropy of codes is asked for.
"""

from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F

from argen.device import pick
from argen.hub.cards import TRAINED_VQ, Card, write_card
from argen.train.loop import Schedule
from argen.train.own.options import OwnOptions
from argen.train.own.run import OwnRecipe
from argen.train.own.tokenizers import OwnTokenizerTask, Terms, check_options, check_side, started
from argen.train.sources import Source
from argen.words import cut
from samplers.errors import InvalidValue
from tokenizers_img.llamagen_vq import MULTIPLIERS, LlamaGenVQ, network

SCHEDULE = Schedule(
    steps=40_000,
    batch_size=128,
    learning_rate=1e-4,
    warmup=0,
    betas=(0.9, 0.95),
    weight_decay=0.0,
    ema_decay=0.9999,
    decline="constant",
)
TERMS = Terms(l1=0.0, l2=1.0, perceptual=1.0, adversarial="hinge", fooled=0.5, judged=0.5, start=20_000, signed=True)
SIZES = {f"VQ-{stride}": {"multipliers": MULTIPLIERS[stride]} for stride in (16, 8)}  # as published
MINI = {"multipliers": MULTIPLIERS[16], "width": 32, "latent_channels": 64, "codes": 1024, "layers": 1}  # for a CPU


class LlamaGenVQTask(OwnTokenizerTask):
    """LlamaGen's VQ on images of one size."""

    def save(self, folder: Path) -> None:
        """See `OwnTokenizerTask.save`."""
        self.settle()
        self._model().vq.save_pretrained(folder)
        arguments, about = {"image_size": self.size}, self.about("LlamaGen's VQ")
        card = Card(
            "llamagen-vq, trained", "tokenizer", about, TRAINED_VQ, parameters=self.millions(), arguments=arguments
        )
        write_card(card, folder)


def new_network(size: str) -> LlamaGenVQ:
    """A network of random weights.

    Raises:
        InvalidValue: an unknown size.
    """
    if size != "mini" and size not in SIZES:
        raise InvalidValue(f"size is {cut(size)}: expected {', '.join(SIZES)} or mini", "size")
    vq = network(**(MINI if size == "mini" else SIZES[size]))
    codes = vq.quantize.embedding.weight
    codes.data = F.normalize(codes.data, dim=-1)
    return LlamaGenVQ(vq, 128 if size == "mini" else 256)


def prepare(options: OwnOptions, source: Source, held: Source) -> LlamaGenVQTask:
    """See `argen.train.own.run.OwnRecipe.prepare`."""
    check_options(options)
    if options.init is None:
        model, terms = new_network(options.size or "VQ-16"), TERMS
    else:
        model, terms = started(options.init, LlamaGenVQ, "VQ of LlamaGen"), replace(TERMS, start=0)
    side = check_side(options.image_size or model.config.image_size, model.stride)
    model = model.to(pick(None))
    return LlamaGenVQTask(model, model.vq.quantize.embedding.weight, terms, side, source, held, options)


RECIPE = OwnRecipe(prepare, SCHEDULE, conditions=False)
