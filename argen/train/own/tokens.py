"""What the recipes of generators share: token ids and captions of one's own images, scores, samples, what is written.

Letters in shape comments: B samples, N tokens of an image.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from argen.hub.cards import ADAPTED, Card, write_card
from argen.models.lora import digest_of
from argen.processes import processes
from argen.train import lora
from argen.train.loop import Task
from argen.train.own.options import OwnOptions
from argen.train.own.run import encoded
from argen.train.sources import Source
from argen.train.token_cache import Tokens
from samplers.errors import InvalidValue
from tokenizers_img.base import ImageTokenizer

SHOWN = 16  # images of a sample sheet
AT_ONCE = 32  # held-out images
DROPPED = 0.1  # share of the images whose condition is left out


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


def examples_of(
    pipe: Any,
    options: OwnOptions,
    source: Source,
    held: Source,
    crops: str,
    tokenizer: ImageTokenizer | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
    whole: Callable[[Image.Image], Tensor] | None = None,
    too_long: Callable[[str], bool] | None = None,
) -> tuple[Examples, Examples]:
    """Say what there is, and encode it by the pipeline's image tokenizer.

    Args:
        crops: see `argen.eval.images.crops`.
        tokenizer, encode, whole: see `argen.train.own.run.encoded`; `whole` where the options name no crops.
        too_long: see `Source.report`.
    """
    if processes().is_main_process:
        print(source.report(size=pipe.image_size, too_long=too_long))
        print(f"held out: {len(held):,} more, for the scores")
    tokenizer = tokenizer or pipe.image_tokenizer
    how, whole = options.crops or crops, None if options.crops else whole
    first, second = (
        Examples(encoded(tokenizer, part, pipe.image_size, how, encode, whole), part) for part in (source, held)
    )
    return first, second


def states_of(pipe: Any, texts: list[str]) -> dict[str, Tensor]:
    """Text states [B, T, C] of captions and their "mask" [B, T], and of no text "none" and "none_mask"."""
    states, mask = pipe.encode_text(texts)
    none, none_mask = pipe.encode_text([""])
    length = max(states.shape[1], none.shape[1])
    states, none = (F.pad(each, (0, 0, 0, length - each.shape[1])) for each in (states, none))
    mask, none_mask = (F.pad(each, (0, length - each.shape[1])) for each in (mask, none_mask))
    size = len(texts)
    return {"states": states, "mask": mask, "none": none.expand(size, -1, -1), "none_mask": none_mask.expand(size, -1)}


def shown_states(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States and mask of a batch, those of no text in the samples that are "dropped"."""
    dropped = batch["dropped"][:, None]
    states = torch.where(dropped[..., None], batch["none"], batch["states"])
    return states, torch.where(dropped, batch["none_mask"], batch["mask"]).bool()


def check_conditions(source: Source) -> None:
    """Raises:
    ValueError: the images have neither classes nor captions.
    """
    if source.classes is None and not source.has_captions:
        raise ValueError(
            f"the images in {source.path} have neither classes nor captions: put them into a folder for each class, a .txt file "
            "beside each image, or name a table with --captions"
        )


def check_captions(source: Source, name: str) -> None:
    """Args:
        name: what errors call the network.

    Raises:
        ValueError: the images have no captions.
    """
    check_conditions(source)
    if not source.has_captions:
        raise ValueError(
            f"the images in {source.path} have classes, and {name} reads captions: name a table with --captions"
        )


class OwnTokensTask(Task):
    """Args:
    pipe: the pipeline whose `transformer` is trained.
    examples, held_out: what is trained on, and what is not.
    options: of them the share of conditions that are left out, and the rank of a LoRA.
    """

    shards = True

    def __init__(self, pipe: Any, examples: Examples, held_out: Examples, options: OwnOptions):
        self.pipe, self.examples, self.held_out = pipe, examples, held_out
        self.dropped = DROPPED if options.dropped is None else options.dropped
        local = options.init is not None and Path(options.init).exists()
        self.base = str(Path(options.init).resolve()) if local else options.init or ""
        self.adapter, self.digest = None, digest_of(pipe.transformer)
        if options.lora is not None:
            if options.init is None:
                raise InvalidValue("lora changes a model: give --init the one to start from", "lora")
            self.adapter = lora.inject(pipe.transformer, options.lora)
        pipe.transformer.train()
        self.networks: dict[str, nn.Module] = {"model": pipe.transformer}
        self.options = {name: str(getattr(options, name)) for name in ("init", "size", "tokenizer", "lora", "crops")}
        self.options |= {"dropped": str(self.dropped), "images": examples.source.identity}

    def use(self, network: nn.Module) -> None:
        """See `argen.train.loop.Task.use`; the pipeline has it, too."""
        super().use(network)
        self.pipe.transformer = network

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
        tokens = self.examples.ids(batch["image"].tolist(), batch["crop"].tolist())
        return {"tokens": tokens, "dropped": batch["dropped"], **self.condition(self.texts(batch))}

    def texts(self, batch: dict[str, Tensor]) -> list[str]:
        """Classes or captions of a drawn batch; of several one."""
        own = [self.examples.conditions(index) for index in batch["image"].tolist()]
        return [texts[int(chance * len(texts))] for texts, chance in zip(own, batch["caption"].tolist(), strict=True)]

    @torch.no_grad()
    def condition(self, texts: list[str]) -> dict[str, Tensor]:
        """What the network reads of classes, class ids "condition" [B], or of captions, see `states_of`."""
        if self.pipe.components.get("text_encoder", "under another name") is None:
            return {"condition": torch.tensor([self.pipe.class_of(text) for text in texts])}
        return states_of(self.pipe, texts)

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean cross-entropy of a batch's "tokens" [B, N], in nats, without the condition of those that are "dropped" [B]."""
        raise NotImplementedError

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        loss = self.loss(self.networks["model"], batch)
        log["loss"] = loss.item()
        yield "model", loss

    def held_out_batch(self, first: int) -> dict[str, Tensor]:
        """Some held-out images from `first` on, with their first crop and caption."""
        rows = range(first, min(first + AT_ONCE, len(self.held_out)))
        texts = [self.held_out.conditions(index)[0] for index in rows]
        tokens, dropped = self.held_out.ids(rows, [0] * len(rows)), torch.zeros(len(rows), dtype=torch.bool)
        return {"tokens": tokens, "dropped": dropped, **self.condition(texts)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss on held-out images."""
        model, total = self._model(), 0.0
        for first in range(0, len(self.held_out), AT_ONCE):
            batch = {key: value.to(model.device) for key, value in self.held_out_batch(first).items()}
            total += len(batch["tokens"]) * self.loss(model, batch).item()
        return {"held-out loss": total / len(self.held_out)}

    def arguments(self, indices: list[int]) -> dict[str, Any]:
        """Further arguments of the pipeline's call for held-out images."""
        return {}

    def sample(self) -> Image.Image:
        """Images of the held-out conditions, four in a row."""
        places = random.Random(0).sample(range(len(self.held_out)), min(SHOWN, len(self.held_out)))
        texts = [self.held_out.conditions(index)[0] for index in places]
        self.pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(index) for index in range(len(texts))]
        images = self.pipe(texts, generator=generators, output_type="pt", **self.arguments(places)).images.float().cpu()
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
                id=f"{self.base}, LoRA",
                about=about,
                target=ADAPTED,
                repo=None,
                files=(),
                arguments={"base": self.base},
                order=1000,
            ),
            folder,
        )
