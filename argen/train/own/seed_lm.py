"""`argen train seed-lm`: a SEED-LLaMA that draws and describes one's own images; its image tokenizer stays as it is.

The settings are those of the official code (github.com/AILab-CVC/SEED, instruction tuning): AdamW (0.9, 0.95) at 1e-4, decay 0.05, a rise over 7% of the
steps and a cosine to a tenth, 128 images a step. A model that answers learns its answers alone, in the prompts of its own format; one that does not learns whole
sequences, caption and image or the other way round, and the image alone, which is what guidance leads away from.

Letters in shape comments: B samples, N codes of an image, L words of the longest sequence.
"""

from collections.abc import Sequence
from dataclasses import replace
from os.path import commonprefix

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from argen.device import pick
from argen.models.seed_llama import image_text
from argen.pipelines.seed_llama import SeedLlamaPipeline
from argen.train.loop import Schedule
from argen.train.own.options import OwnOptions
from argen.train.own.run import OwnRecipe
from argen.train.own.start import model_of
from argen.train.own.tokens import AT_ONCE, DROPPED, Examples, OwnTokensTask, check_captions, examples_of
from argen.train.seed_lm import padded, word_errors
from argen.train.sources import Source
from samplers.errors import InvalidValue
from tokenizers_img.seed.tokenizer import UnCLIP

SCHEDULE = Schedule(
    steps=10_000,
    batch_size=128,
    learning_rate=1e-4,
    warmup=700,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    ema_decay=0.0,
    floor=0.1,
)
LORA_SCHEDULE = replace(SCHEDULE, steps=1_000, batch_size=8, warmup=70)
LONGEST = 256  # words of a caption


class Sequences:
    """Images and captions as a SEED-LLaMA reads and writes them."""

    def __init__(self, pipe: SeedLlamaPipeline):
        self.pipe, self.end = pipe, pipe.tokenizer.eos_token_id
        none = [0] * pipe.length
        longest = max(len(self.of(none, "", described, dropped=False)[0]) for described in (False, True))
        self.room = min(LONGEST, pipe.transformer.config.max_position_embeddings - longest)

    def ids(self, text: str) -> list[int]:
        """Ids of a text that may hold codes, of any length, after the start."""
        return self.pipe.tokenizer(f"<s>{text}", add_special_tokens=False, verbose=False).input_ids

    def too_long(self, caption: str) -> bool:
        return len(self.ids(caption)) > self.room + 1

    def cut(self, caption: str) -> str:
        """As much of a caption as there is room for."""
        ids = self.ids(caption)[1:]
        return caption if len(ids) <= self.room else self.pipe.tokenizer.decode(ids[: self.room])

    def of(self, codes: Sequence[int], caption: str, described: bool, dropped: bool) -> tuple[list[int], int]:
        """The ids of an image's codes and its caption, the image first where it is `described` and alone where the caption is `dropped`;
        and how many ids are given, before those that are learned."""
        form, image = self.pipe.format, image_text(codes)
        given, learned = form.ask.format(image), form.answer.format(caption).rstrip()
        if dropped:
            given, learned = "", image
        elif not described:
            given, learned = form.ask.format(self.pipe.request(caption)), image
        whole = [*self.ids(given + learned), self.end]
        return whole, len(commonprefix([self.ids(given), whole])) if form.answers else 1


class OwnSeedLMTask(OwnTokensTask):
    """SEED-LLaMA on captions."""

    def __init__(
        self,
        pipe: SeedLlamaPipeline,
        sequences: Sequences,
        examples: Examples,
        held_out: Examples,
        options: OwnOptions,
    ):
        super().__init__(pipe, examples, held_out, options)
        self.sequences, self.described = sequences, options.described
        self.options = self.options | {"described": str(self.described)}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Also which images are described [B]."""
        return super().batch(size, generator) | {"described": torch.rand(size, generator=generator) < self.described}

    def read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ids [B, L], padded with -1, and how many of each are given [B]."""
        codes = self.examples.ids(batch["image"].tolist(), batch["crop"].tolist())
        return self.words(codes, self.texts(batch), batch["described"].tolist(), batch["dropped"].tolist())

    def words(
        self, codes: Tensor, captions: list[str], described: list[bool], dropped: list[bool]
    ) -> dict[str, Tensor]:
        """See `read`."""
        each = zip(codes.tolist(), map(self.sequences.cut, captions), described, dropped, strict=True)
        rows, given = zip(*(self.sequences.of(*sample) for sample in each), strict=True)
        return {"ids": padded(rows), "given": torch.tensor(given)}

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean over samples of that of their learned words, in nats, so that parts of a batch train as the whole."""
        ids = batch["ids"]
        places = torch.arange(1, ids.shape[1], device=ids.device)
        learned = (ids[:, 1:] >= 0) & (places >= batch["given"][:, None])
        return ((word_errors(network, ids) * learned).sum(dim=1) / learned.sum(dim=1)).mean()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss on held-out images, as they are drawn and as they are described."""
        model, scores = self._model(), {}
        for name, described in (("held-out loss", False), ("held-out loss of captions", True)):
            total = 0.0
            for first in range(0, len(self.held_out), AT_ONCE):
                rows = range(first, min(first + AT_ONCE, len(self.held_out)))
                captions = [self.held_out.conditions(index)[0] for index in rows]
                codes = self.held_out.ids(rows, [0] * len(rows))
                batch = self.words(codes, captions, [described] * len(rows), [False] * len(rows))
                batch = {key: value.to(model.device) for key, value in batch.items()}
                total += len(rows) * self.loss(model, batch).item()
            scores[name] = total / len(self.held_out)
        return scores


def prepare(options: OwnOptions, source: Source, held: Source) -> OwnSeedLMTask:
    """See `argen.train.own.run.OwnRecipe.prepare`."""
    check_captions(source, "SEED-LLaMA")
    if options.init is None:
        raise InvalidValue(
            "seed-lm starts from a model: give --init a SEED-LLaMA, e.g. argen/emoji-seed-lm or AILab-CVC/seed-llama-8b-sft",
            "init",
        )
    pipe = model_of(options, SeedLlamaPipeline, LlamaForCausalLM, "SEED-LLaMA").to(pick(None))
    images = pipe.image_tokenizer
    if not isinstance(images.decoder, UnCLIP) and images.decoder is not None:
        images.decoder = images.decoder()  # of the release, which the samples need: it is fetched now or never
    if options.dropped is None:
        options = replace(options, dropped=0.0 if pipe.format.answers else DROPPED)
    sequences, how = Sequences(pipe), "squashed" if images.squashed else "padded"
    more = {"whole": images.prepare, "too_long": sequences.too_long}
    return OwnSeedLMTask(pipe, sequences, *examples_of(pipe, options, source, held, how, **more), options)


RECIPE = OwnRecipe(prepare, SCHEDULE, LORA_SCHEDULE)
