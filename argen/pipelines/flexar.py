"""Class- and text-to-image with FlexAR (arXiv 2604.15453): ordered tokens of FlexTok, of any number."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast, T5EncoderModel

from argen.files import WEIGHTS
from argen.models.clip import TextImageEncoder
from argen.models.files import emoji_text, load_network
from argen.models.flexar import FlexAR, FlexARSession
from argen.models.t5 import read_t5, text_features
from argen.models.tokenizers import read_emoji_flextok
from argen.pipelines.base import Defaults, TokenPipeline
from argen.pipelines.canvas import TokenSequence
from argen.pipelines.prompts import distinct, image_generators
from argen.pipelines.running import SAMPLING
from argen.request import Control, Job, Request, check_beams
from tokenizers_img.flextok.network import FlexTok
from tokenizers_img.flextok.tokenizer import FlexTokenizer
from tokenizers_img.hub import hub_folder

PREVIEW_STEPS = 6  # of the flow that decodes unfinished images


class FlexARPipeline(TokenPipeline):
    """Args:
    transformer: the generator.
    flextok, vae: the networks of its image tokenizer.
    text_encoder, tokenizer: for a model of texts; None for a model of classes. They are flan-t5-xl's as published; the
        shipped model has a CLIP, which can rank candidates, too.
    groups: names that a model of texts takes as "class:NAME".
    class_names: those of a model of classes; None for ImageNet's, or numbers.
    steps, tokenizer_guidance: of the flow from tokens to an image, which begins with the same noise for all images.
    official_null: see `argen.models.flexar.FlexARSession`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->flextok->vae"
    _optional_components = ["text_encoder", "tokenizer"]
    canvas = TokenSequence(progressive=True)
    ordered = True

    def __init__(
        self,
        transformer: FlexAR,
        flextok: FlexTok,
        vae: AutoencoderKL,
        text_encoder: T5EncoderModel | CLIPModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        groups: list[str] | None = None,
        steps: int = 25,
        tokenizer_guidance: float = 7.5,
        official_null: bool = False,
        class_names: list[str] | None = None,
    ):
        super().__init__()
        flow = {"steps": steps, "tokenizer_guidance": tokenizer_guidance, "official_null": official_null}
        self.register_to_config(groups=groups, class_names=class_names, **flow)
        self.register_modules(
            transformer=transformer, flextok=flextok, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        registers, codes = flextok.config.registers, flextok.fsq.n_embed
        if transformer.length > registers or transformer.config.n_embed != codes:
            raise ValueError(
                f"the generator writes {transformer.length} tokens of {transformer.config.n_embed}, the image tokenizer "
                f"knows {registers} of {codes}: expected a generator of this tokenizer"
            )

    @classmethod
    def from_original(
        cls,
        generator: str | Path,
        image_tokenizer: str | Path,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> "FlexARPipeline":
        """Load released files, each with its configuration beside it: `FlexAR.from_original`, `FlexTokenizer.from_original`."""
        images = FlexTokenizer.from_original(image_tokenizer)
        return cls(FlexAR.from_original(generator), images.network, images.vae, text_encoder, tokenizer)

    @property
    def official(self) -> Defaults:
        """Those of the published configurations."""
        return Defaults(guidance_scale=1.5 if self.text_encoder is None else 3.0)

    @property
    def length(self) -> int:
        return self.transformer.length

    @property
    def image_tokenizer(self) -> FlexTokenizer:
        return FlexTokenizer(self.flextok, self.vae, self.config.steps, self.config.tokenizer_guidance)

    def shape_of(self, control: Control | None = None, num_tokens: int | None = None) -> tuple[int, int]:
        """See `TokenPipeline.shape_of`: one row.

        Raises:
            ValueError: the number of tokens is out of bounds.
        """
        count = self.length if num_tokens is None else num_tokens
        if not isinstance(count, int) or not 1 <= count <= self.length:
            raise ValueError(f"num_tokens is {count}: expected 1 to {self.length}")
        return 1, count

    def start(
        self,
        prompts: list[str],
        guided: bool,
        shape: tuple[int, int] | None = None,
        controls: list[Control] | None = None,
    ) -> FlexARSession:
        """See `TokenPipeline.start`. A prompt is a class (`argen.data.imagenet.class_id`) or a text.

        Raises:
            ValueError: there is no such class.
        """
        if self.text_encoder is None:
            ids = torch.tensor([self.class_of(prompt) for prompt in prompts], device=self.device)
            encoded = self.transformer.encode_class(torch.cat([ids, torch.full_like(ids, -1)]) if guided else ids)
            mask = torch.ones(len(encoded), 1, dtype=torch.bool, device=self.device)
        else:
            texts, rows = distinct(prompts, guided)
            states, mask = self.encode_text(texts)
            encoded, mask = self.transformer.encode_text(states)[rows], mask[rows]
        length = (shape or self.shape_of())[1]
        return FlexARSession(self.transformer, encoded, mask, guided, length, self.config.official_null)

    def encode_text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode texts -> hidden states [B, T, C], mask [B, T] bool."""
        if isinstance(self.text_encoder, CLIPModel):
            prompts = [self.caption(prompt) for prompt in prompts]
            with self.stage("text"):
                states, mask = TextImageEncoder(self.text_encoder, self.tokenizer).states(prompts)
        else:
            stage = partial(self.stage, "text")
            states, mask = text_features(self.text_encoder, self.tokenizer, prompts, self.device, stage=stage)
        return states.to(self.transformer.dtype), mask.bool()

    def encode_ahead(self, prompts: list[str]) -> None:
        """See `TokenPipeline.encode_ahead`."""
        if isinstance(self.text_encoder, T5EncoderModel):
            self.encode_text([*prompts, ""])

    def blank_tokens(self, shape: tuple[int, int]) -> Tensor:
        """See `TokenPipeline.blank_tokens`: none, `decode_tokens` reads the decided ones only."""
        return torch.full(shape, -1)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Decode ids [B, 1, k] to pixels [B, 3, H, W] in [0, 1], from the decided prefix of each."""
        counts = (tokens[:, 0] >= 0).long().cumprod(dim=1).sum(dim=1).tolist()
        rows = [row[0, : max(1, count)].clamp(min=0) for row, count in zip(tokens, counts, strict=True)]
        steps = self.config.steps if min(counts) == tokens.shape[-1] else min(PREVIEW_STEPS, self.config.steps)
        return self.image_tokenizer.decode(rows, steps).clamp(0, 1)

    def run(self, request: Request, every: int = 1, tokens: Tensor | None = None) -> Generator[Job, None, None]:
        """See `TokenPipeline.run`; with `num_beams` each image is found by beam search, which cannot be resumed."""
        beams = request.num_beams
        if beams is None:
            yield from super().run(request, every, tokens)
            return
        request = self.resolved(request)
        sampler = self.make_sampler(request.sampler, **request.sampler_settings())
        settings = {"sampler": sampler, **{name: getattr(request, name) for name in SAMPLING}}
        shape = self.shape_of(None, request.num_tokens)
        job = Job(request, self.canvas.empty(request.num_images, shape), lossless=sampler.lossless)
        prompt = self.read_prompt(request.prompt, request.literal).text
        searches = [
            self.search(prompt, beams, request.num_drawn, request.num_tokens, generator, **settings)
            for generator in request.generators()
        ]
        for stage in zip(*searches, strict=True):
            job.decided = stage[0].decided
            job.forward_passes += max(step.forward_passes for step in stage)
            job.tokens[:, 0, : job.decided] = torch.stack([step.tokens[0].cpu() for step in stage])
            job.scores = [step.scores[0] for step in stage]
            yield job
        job.log.append(f"{request.num_drawn} candidates for each beginning")
        job.requests = [request.for_image(index) for index in range(request.num_images)]
        job.images = self.images(job.tokens)
        yield job

    @torch.no_grad()
    def search(
        self,
        prompt: str,
        num_beams: int = 4,
        num_candidates: int = 16,
        num_tokens: int | None = None,
        generator: torch.Generator | None = None,
        **settings,
    ) -> Iterator["Beams"]:
        """Generate one image by beam search: of candidates with 1, 2, 4 ... tokens the best by `rank` are continued
        (arXiv 2604.15453). The first tokens matter most, and every prefix can be decoded.

        Args:
            num_beams: candidates that are kept in each stage.
            num_candidates: generated in each stage, equally many from each beam.
            num_tokens: of the image; None is the model's own.
            generator: of the random numbers of all stages.
            settings: of `stream`, e.g. guidance_scale.

        Yields:
            The beams after each stage, the last being a single image.

        Raises:
            ValueError: `num_candidates` is not a multiple of `num_beams`; the model cannot rank.
        """
        check_beams(num_beams, num_candidates)
        length, decided = self.shape_of(None, num_tokens)[1], 0
        beams = torch.full((1, 0), -1)
        while decided < length:
            decided = min(2 * decided or 1, length)
            rows = beams.repeat_interleave(num_candidates // len(beams), dim=0)
            grid = torch.nn.functional.pad(rows, (0, decided - rows.shape[1]), value=-1)
            generators = image_generators(generator, len(grid))
            *_, step = self.stream([prompt] * len(grid), generators, tokens=grid, shape=(1, decided), **settings)
            scores = self.rank(prompt, self.images(step.tokens[:, None]))
            best = sorted(range(len(scores)), key=lambda index: -scores[index])[: num_beams if decided < length else 1]
            beams = step.tokens[best].cpu()
            yield Beams(beams, [scores[index] for index in best], step.forward_passes)


@dataclass(frozen=True)
class Beams:
    """Beams of a search after a stage, best first.

    Attributes:
        tokens: [kept, decided] int64.
        scores: see `TokenPipeline.rank`.
        forward_passes: of the network, for this stage.
    """

    tokens: Tensor
    scores: list[float]
    forward_passes: int

    @property
    def decided(self) -> int:
        return self.tokens.shape[1]


def read_emoji(folder: Path) -> FlexARPipeline:
    """argen/emoji-flextok-ar."""
    images = read_emoji_flextok(WEIGHTS / "emoji-flextok")
    settings: dict[str, Any] = {"steps": images.steps, "tokenizer_guidance": images.guidance_scale}
    return FlexARPipeline(load_network(FlexAR, folder), images.network, images.vae, **emoji_text(), **settings)


def read_release(folder: Path, text: bool) -> FlexARPipeline:
    """A released FlexAR, of texts or of classes; its image tokenizer is fetched."""
    file = "model.safetensors"
    tokenizer = hub_folder(f"EPFL-VILAB/flextok_d18_d28_{'dfn' if text else 'in1k'}", (file, "config.json"))
    return FlexARPipeline.from_original(folder / file, tokenizer / file, *(read_t5() if text else ()))
