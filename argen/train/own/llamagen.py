"""`argen train llamagen`: LlamaGen on classes or captions of one's own images, from nothing or from any LlamaGen.

The defaults are those of the official code (github.com/FoundationVision/LlamaGen, autoregressive/train): AdamW (0.9, 0.95), decay 0.05
of matrices, a constant rate of 1e-4, gradients clipped at norm 1, the condition left out in a tenth of the samples.

Letters in shape comments: B samples, N tokens of an image, T condition positions.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel

from argen.device import pick
from argen.hub.cards import ADAPTED, Card, write_card
from argen.hub.loading import load
from argen.models.clip import TextImageEncoder
from argen.models.llamagen import SIZES, ClassEmbedder, LlamaGen
from argen.models.lora import digest_of
from argen.models.t5 import T5, read_t5
from argen.pipelines.llamagen import LlamaGenPipeline
from argen.train import lora
from argen.train.loop import Schedule, Task
from argen.train.own.options import OwnOptions
from argen.train.own.run import OwnRecipe, encoded
from argen.train.sources import Source
from argen.train.token_cache import Tokens
from argen.words import cut
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
    ema_warmup=False,
)
LORA_SCHEDULE = replace(
    SCHEDULE, steps=1_000, batch_size=8, warmup=20, weight_decay=0.0, ema_decay=0.99, ema_warmup=True, decline="cosine"
)
SHOWN = 16  # images of a sample sheet
AT_ONCE = 32  # held-out images


@dataclass
class Examples:
    """Images as a generator learns them.

    Attributes:
        tokens: ids [N] of the crops of each image.
        source: their classes or captions.
    """

    tokens: Tokens
    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def conditions(self, index: int) -> Sequence[str]:
        """The class of an image, as "class:3", or its captions."""
        label = self.source.label(index)
        return self.source.captions(index) if label is None else [f"class:{label}"]

    def ids(self, indices: Iterable[int], crops: Iterable[int]) -> Tensor:
        """[B, N] int64."""
        return torch.from_numpy(np.stack([self.tokens.ids(*place) for place in zip(indices, crops, strict=True)]))


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over logits [B, N, K] of tokens [B, N], in nats."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class LlamaGenTask(Task):
    """Args:
    pipe: the pipeline whose `transformer` is trained.
    examples, held_out: what is trained on, and what is not.
    options: of them the share of conditions that are left out, and the rank of a LoRA.
    """

    def __init__(self, pipe: LlamaGenPipeline, examples: Examples, held_out: Examples, options: OwnOptions):
        self.pipe, self.examples, self.held_out = pipe, examples, held_out
        self.dropped, self.base = options.dropped, options.init or ""
        self.adapter, self.digest = None, digest_of(pipe.transformer)
        if options.lora is not None:
            if pipe.transformer.config.classes is not None:
                raise InvalidValue("lora is for models of captions, and this one draws classes: leave it out", "lora")
            if options.init is None:
                raise InvalidValue("lora changes a model: give --init the one to start from", "lora")
            self.adapter = lora.inject(pipe.transformer, options.lora)
        pipe.transformer.train()
        self.networks: dict[str, nn.Module] = {"model": pipe.transformer}
        self.options = {
            name: str(getattr(options, name)) for name in ("init", "size", "tokenizer", "lora", "dropped", "crops")
        }
        self.options |= {"images": examples.source.identity}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Which images, crops and captions, and whose conditions are left out, [B] each."""
        chance = torch.rand(3, size, generator=generator)
        return {
            "image": torch.randint(len(self.examples), (size,), generator=generator),
            "crop": (chance[0] * self.examples.tokens.crops).long(),
            "caption": chance[1],
            "dropped": chance[2] < self.dropped,
        }

    def read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens [B, N] and conditions of a drawn batch."""
        images = batch["image"].tolist()
        tokens = self.examples.ids(images, batch["crop"].tolist())
        captions = [self.examples.conditions(index) for index in images]
        texts = [own[int(chance * len(own))] for own, chance in zip(captions, batch["caption"].tolist(), strict=True)]
        return {"tokens": tokens, "dropped": batch["dropped"], **self.condition(texts)}

    @torch.no_grad()
    def condition(self, texts: list[str]) -> dict[str, Tensor]:
        """What the network reads of classes or captions: "condition", class ids [B] or text features [B, T, C], and "mask" [B, T]."""
        if self.pipe.transformer.config.classes is not None:
            classes = torch.tensor([self.pipe.class_of(text) for text in texts])
            return {"condition": classes, "mask": torch.ones(len(texts), 1, dtype=torch.bool)}
        features, mask = self.pipe.encode_text(texts)
        return {"condition": features, "mask": mask}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean cross-entropy of tokens [B, N], in nats; a caption that is left out keeps its mask, as in the official code."""
        condition, dropped = batch["condition"], batch["dropped"]
        none = self._model().unconditional(condition)
        condition = torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), none, condition)
        return cross_entropy(network(condition, batch["mask"], batch["tokens"]), batch["tokens"])

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        loss = self.loss(self.networks["model"], batch)
        log["loss"] = loss.item()
        yield "model", loss

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss on held-out images, with their first crop and caption."""
        model, total, device = self._model(), 0.0, self._model().device
        for first in range(0, len(self.held_out), AT_ONCE):
            rows = range(first, min(first + AT_ONCE, len(self.held_out)))
            texts = [self.held_out.conditions(index)[0] for index in rows]
            tokens, dropped = self.held_out.ids(rows, [0] * len(rows)), torch.zeros(len(rows), dtype=torch.bool)
            batch = {"tokens": tokens, "dropped": dropped}
            batch = {key: value.to(device) for key, value in (batch | self.condition(texts)).items()}
            total += len(texts) * self.loss(model, batch).item()
        return {"held-out loss": total / len(self.held_out)}

    def sample(self) -> Image.Image:
        """Images of the held-out conditions, four in a row."""
        places = random.Random(0).sample(range(len(self.held_out)), min(SHOWN, len(self.held_out)))
        texts = [self.held_out.conditions(index)[0] for index in places]
        self.pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(index) for index in range(len(texts))]
        images = self.pipe(texts, generator=generators, output_type="pt").images.float().cpu()
        missing = torch.ones(-len(images) % 4, *images.shape[1:])
        sheet = rearrange(torch.cat([images, missing]), "(r c) d h w -> (r h) (c w) d", c=4)
        return Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())

    def save(self, folder: Path) -> None:
        """Write a folder that `argen.load` reads: the pipeline, or the LoRA with a card that names its model."""
        if self.adapter is None:
            self.pipe.save_pretrained(folder)
            return
        lora.save(self.pipe.transformer, self.adapter, self.base, self.digest, folder)
        card = self.pipe.card or Card("", "generator", "", "")
        about = f"a LoRA of {self.base}"
        write_card(
            replace(
                card,
                id=f"{folder.name}",
                about=about,
                target=ADAPTED,
                repo=None,
                files=(),
                arguments={"base": self.base},
                order=1000,
            ),
            folder,
        )


MINI = {"dim": 256, "depth": 6, "heads": 4, "multiple_of": 32}  # for a CPU


def new_pipeline(options: OwnOptions, source: Source) -> LlamaGenPipeline:
    """A pipeline with a network of random weights, after classes where the images have some, else after captions.

    Raises:
        ValueError: a size, a tokenizer or a text encoder that cannot be used.
    """
    size = options.size or "B"
    if size != "mini" and size not in SIZES:
        raise InvalidValue(f"size is {cut(size)}: expected {', '.join(SIZES)} or mini", "size")
    if options.tokenizer is None:
        raise InvalidValue(
            "a new network needs an image tokenizer: give --tokenizer, e.g. argen/emoji-vitvqgan, or --init a model to start from",
            "tokenizer",
        )
    images = load(options.tokenizer)
    if not isinstance(images, LlamaGenVQ | ViTVQGAN):
        raise InvalidValue(
            f"{options.tokenizer} is no tokenizer that LlamaGen reads: expected its VQ, or a ViT-VQGAN", "tokenizer"
        )
    fixed = isinstance(images, ViTVQGAN)
    side = images.config.image_size if fixed else options.image_size or images.config.image_size
    if side % images.stride or (fixed and options.image_size not in (None, side)):
        expected = str(side) if fixed else f"a multiple of {images.stride}"
        raise InvalidValue(
            f"image_size is {options.image_size}: expected {expected}, of {options.tokenizer}", "image_size"
        )
    sizes = MINI if size == "mini" else SIZES[size]
    shared = {"n_embed": len(images.codebook), "grid": side // images.stride, **sizes}
    vq = images if fixed else images.vq
    if source.classes is not None:
        return LlamaGenPipeline(LlamaGen(classes=len(source.classes), **shared), vq, class_names=list(source.classes))
    text_encoder, tokenizer = _text_encoder(options.text_encoder or T5)
    clip = isinstance(text_encoder, CLIPModel)
    width = text_encoder.config.text_config.hidden_size if clip else text_encoder.config.d_model
    length = {"caption_length": 24, "caption_attention": True} if clip else {}  # a small network reads word by word
    return LlamaGenPipeline(LlamaGen(caption_dim=width, **length, **shared), vq, text_encoder, tokenizer)


def _text_encoder(name: str) -> tuple[Any, Any]:
    if name == T5 or "t5" in name.lower():
        return read_t5(name)
    encoder = load(name)
    if not isinstance(encoder, TextImageEncoder):
        raise InvalidValue(f"{name} is no text encoder: expected {T5} or argen/emoji-clip", "text_encoder")
    return encoder.clip, encoder.tokenizer


def started(options: OwnOptions, source: Source) -> LlamaGenPipeline:
    """The pipeline that a training starts from: a model, with a table of its own classes where the images have other ones.

    Raises:
        ValueError: it is no LlamaGen, or reads captions where the images have classes alone.
    """
    for name in ("size", "tokenizer", "text_encoder"):
        if getattr(options, name) is not None:
            raise InvalidValue(
                f"{name} is for a new network, and {options.init} has its own: leave one of them out", name
            )
    pipe = load(options.init, dtype="fp32")
    if not isinstance(pipe, LlamaGenPipeline) or not isinstance(pipe.transformer, LlamaGen):
        raise InvalidValue(f"{options.init} is no LlamaGen: expected one to start from", "init")
    if options.image_size not in (None, pipe.image_size):
        raise InvalidValue(
            f"image_size is {options.image_size}: expected {pipe.image_size}, that of {options.init}", "image_size"
        )
    by_class = pipe.transformer.config.classes is not None
    if by_class != (source.classes is not None):
        has, needs = ("captions", "classes") if by_class else ("classes", "captions")
        raise InvalidValue(
            f"{options.init} draws {needs}, and the images have {has}: choose another model to start from", "init"
        )
    if by_class:
        with_classes(pipe, list(source.classes or ()))
    return pipe


def with_classes(pipe: LlamaGenPipeline, names: list[str]) -> None:
    """Give a model of classes a table of other classes; "no class" stays what it was, and each new one begins there."""
    network, old = pipe.transformer, pipe.transformer.cls_embedding.embedding_table.weight
    network.cls_embedding = ClassEmbedder(len(names), network.config.dim)
    network.cls_embedding.embedding_table.weight.data = old.data[-1:].repeat(len(names) + 1, 1)
    network.register_to_config(classes=len(names))
    pipe.register_to_config(class_names=names)


def prepare(options: OwnOptions, source: Source, held: Source) -> LlamaGenTask:
    """See `argen.train.own.run.OwnRecipe.prepare`."""
    if source.classes is None and not source.has_captions:
        raise ValueError(
            f"the images in {source.path} have neither classes nor captions: put them into a folder for each class, a .txt file beside each "
            "image, or name a table with --captions"
        )
    pipe = new_pipeline(options, source) if options.init is None else started(options, source)
    pipe = pipe.to(pick(None))
    how = options.crops or ("ten:1.1" if source.classes is not None else "center")
    print(source.report(size=pipe.image_size))
    tokens = [encoded(pipe.image_tokenizer, pipe.vq, part, pipe.image_size, how) for part in (source, held)]
    examples, others = (Examples(ids, part) for ids, part in zip(tokens, (source, held), strict=True))
    return LlamaGenTask(pipe, examples, others, options)


RECIPE = OwnRecipe(prepare, SCHEDULE, LORA_SCHEDULE)
