"""`argen train llamagen`: LlamaGen on classes or captions of one's own images, from nothing or from any LlamaGen.

The defaults are those of the official code (github.com/FoundationVision/LlamaGen, autoregressive/train): AdamW (0.9, 0.95), decay 0.05
of matrices, a constant rate of 1e-4, gradients clipped at norm 1, the condition left out in a tenth of the samples.

Letters in shape comments: B samples, N tokens of an image, T condition positions.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from argen.device import pick
from argen.models.llamagen import SIZES, ClassEmbedder, LlamaGen
from argen.models.t5 import T5
from argen.pipelines.llamagen import LlamaGenPipeline
from argen.train.loop import Schedule
from argen.train.own.options import OwnOptions
from argen.train.own.run import OwnRecipe
from argen.train.own.start import image_tokenizer_of, read_text_encoder, size_of, start_of
from argen.train.own.tokens import Examples, OwnTokensTask, check_conditions, cross_entropy, examples_of
from argen.train.sources import Source
from samplers.errors import InvalidValue
from tokenizers_img.llamagen_vq import LlamaGenVQ
from tokenizers_img.vit_vqgan import ViTVQGAN

SCHEDULE = Schedule(
    steps=10_000,
    batch_size=256,
    learning_rate=1e-4,
    warmup=0,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    ema_decay=0.9999,
    decline="constant",
    decayed="matrices",
)
LORA_SCHEDULE = replace(
    SCHEDULE, steps=1_000, batch_size=8, warmup=20, weight_decay=0.0, ema_decay=0.99, decline="cosine"
)


class LlamaGenTask(OwnTokensTask):
    """LlamaGen after classes or captions.

    With the objective "mixed" every second sample is an image to complete: its known tokens, all but those of a rectangle or a random
    share, are seen by those before them (`LlamaGen.look_ahead`), and the loss is that of the others. The mixture is after TokenUnify's
    (arXiv 2405.16847), without its prediction of all later tokens at once.
    """

    def __init__(self, pipe: LlamaGenPipeline, examples: Examples, held_out: Examples, options: OwnOptions):
        super().__init__(pipe, examples, held_out, options)
        self.mixed, self.completed = options.objective == "mixed", None  # known cells of held-out images, or None
        if self.mixed:
            if options.lora is not None:
                raise InvalidValue("objective mixed changes what the network reads: leave lora out", "objective")
            pipe.transformer.register_to_config(looks_ahead=True)
            self.options |= {"objective": options.objective}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """See `OwnTokensTask.batch`; where images are completed, also their "known" cells [B, N]."""
        batch = super().batch(size, generator)
        if not self.mixed:
            return batch
        known = known_cells(size, self.pipe.transformer.config.grid, generator)
        return batch | {"known": known & (torch.rand(size, 1, generator=generator) < 0.5)}

    def read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `OwnTokensTask.read`."""
        return super().read(batch) | {name: batch[name] for name in ("known",) if name in batch}

    @torch.no_grad()
    def condition(self, texts: list[str]) -> dict[str, Tensor]:
        """What the network reads of classes or captions: "condition", class ids [B] or text features [B, T, C], and "mask" [B, T]."""
        if self.pipe.transformer.config.classes is not None:
            classes = torch.tensor([self.pipe.class_of(text) for text in texts])
            return {"condition": classes, "mask": torch.ones(len(texts), 1, dtype=torch.bool)}
        features, mask = self.pipe.encode_text(texts)
        return {"condition": features, "mask": mask}

    def conditioned(self, batch: dict[str, Tensor]) -> Tensor:
        """Class ids [B] or text features [B, T, C], "none" in place of those that are left out."""
        condition, dropped = batch["condition"], batch["dropped"]
        none = self.pipe.transformer.unconditional(condition)
        return torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), none, condition)

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean cross-entropy of tokens [B, N], in nats; a caption that is left out keeps its mask, as in the official code."""
        condition, tokens = self.conditioned(batch), batch["tokens"]
        if "known" not in batch:
            return cross_entropy(network(condition, batch["mask"], tokens), tokens)
        logits = network(condition, batch["mask"], tokens, known=batch["known"])
        return cross_entropy(logits[~batch["known"]][None], tokens[~batch["known"]][None])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """See `OwnTokensTask.evaluate`; also the mean loss in the middle of held-out images, all around which is known."""
        scores = super().evaluate()
        if self.mixed:
            grid = self.pipe.transformer.config.grid
            known = torch.ones(grid, grid, dtype=torch.bool)
            known[grid // 4 : -(grid // 4), grid // 4 : -(grid // 4)] = False
            self.completed = known.flatten()
            scores |= {"held-out loss of the middle": super().evaluate()["held-out loss"]}
            self.completed = None
        return scores

    def held_out_batch(self, first: int) -> dict[str, Tensor]:
        """See `OwnTokensTask.held_out_batch`."""
        batch = super().held_out_batch(first)
        return batch if self.completed is None else batch | {"known": self.completed.expand(len(batch["tokens"]), -1)}


def known_cells(size: int, grid: int, generator: torch.Generator) -> Tensor:
    """What is known of images to complete, [B, N] bool: all but a rectangle of any size, or a random share of the cells."""
    chance = torch.rand(6, size, generator=generator)
    sides = 1 + (chance[:2] * grid).long()
    first = (chance[2:4] * (grid - sides + 1)).long()
    cells = torch.arange(grid)
    rows, columns = (
        (cells >= start[:, None]) & (cells < (start + side)[:, None]) for start, side in zip(first, sides, strict=True)
    )
    outside = ~(rows[:, :, None] & columns[:, None]).flatten(1)
    scattered = torch.rand(size, grid * grid, generator=generator) < chance[4, :, None]
    known = torch.where(chance[5, :, None] < 0.5, outside, scattered)
    return known & ~known.all(dim=1, keepdim=True)


MINI = {"dim": 256, "depth": 6, "heads": 4, "multiple_of": 32}  # for a CPU


def new_pipeline(options: OwnOptions, source: Source) -> LlamaGenPipeline:
    """A pipeline with a network of random weights, after classes where the images have some, else after captions.

    Raises:
        ValueError: a size, a tokenizer or a text encoder that cannot be used.
    """
    sizes = size_of(options, SIZES | {"mini": MINI}, "B")
    images = image_tokenizer_of(
        options, LlamaGenVQ | ViTVQGAN, "LlamaGen", "its VQ, or a ViT-VQGAN", "argen/emoji-vitvqgan"
    )
    fixed = isinstance(images, ViTVQGAN)
    side = images.config.image_size if fixed else options.image_size or images.config.image_size
    if side % images.stride or (fixed and options.image_size not in (None, side)):
        expected = str(side) if fixed else f"a multiple of {images.stride}"
        raise InvalidValue(
            f"image_size is {options.image_size}: expected {expected}, of {options.tokenizer}", "image_size"
        )
    shared = {"n_embed": len(images.codebook), "grid": side // images.stride, **sizes}
    vq = images if fixed else images.vq
    if source.classes is not None:
        return LlamaGenPipeline(LlamaGen(classes=len(source.classes), **shared), vq, class_names=list(source.classes))
    text_encoder, tokenizer, width = read_text_encoder(options.text_encoder or T5)
    small = isinstance(text_encoder, CLIPModel)
    length = {"caption_length": 24, "caption_attention": True} if small else {}  # a small network reads word by word
    return LlamaGenPipeline(LlamaGen(caption_dim=width, **length, **shared), vq, text_encoder, tokenizer)


def with_classes(network: LlamaGen, count: int) -> None:
    """Give a network a table of other classes; "no class" stays what it was, and each new one begins there."""
    old = network.cls_embedding.embedding_table.weight
    network.cls_embedding = ClassEmbedder(count, network.config.dim)
    network.cls_embedding.embedding_table.weight.data = old.data[-1:].repeat(count + 1, 1)


def prepare(options: OwnOptions, source: Source, held: Source) -> LlamaGenTask:
    """See `argen.train.own.run.OwnRecipe.prepare`."""
    check_conditions(source)
    pipe = (
        new_pipeline(options, source)
        if options.init is None
        else start_of(options, source, LlamaGenPipeline, LlamaGen, "LlamaGen", with_classes)
    )
    pipe = pipe.to(pick(None))
    crops = "ten:1.1" if source.classes is not None else "center"
    return LlamaGenTask(pipe, *examples_of(pipe, options, source, held, crops), options)


RECIPE = OwnRecipe(prepare, SCHEDULE, LORA_SCHEDULE, mixed=True)
