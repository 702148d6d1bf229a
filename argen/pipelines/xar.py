"""Class- and text-to-image with xAR (arXiv 2502.20388): continuous latents, entity by entity."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast

from argen.files import WEIGHTS
from argen.models.clip import TextImageEncoder
from argen.models.files import emoji_text, load_network
from argen.models.xar import SIZES, XAR, XARSession
from argen.pipelines.arguments import check_prompts, check_sampling
from argen.pipelines.base import Defaults, TokenPipeline
from argen.pipelines.canvas import LatentGrid
from argen.pipelines.prompts import distinct
from argen.registry import samplers, samplers_of
from argen.request import Control, Request, parse_sampler
from samplers.next_x import NextX
from samplers.settings import make
from tokenizers_img.hub import hub_file
from tokenizers_img.kl_vae import KLVAE

KL16 = "xwen99/mar-vae-kl16"  # repository of the image tokenizer
OFFICIAL = {"B": Defaults(2.7, steps=40), "L": Defaults(2.3, steps=50), "H": Defaults(2.2, steps=50)}


@dataclass(frozen=True, slots=True)
class LatentStep:
    """The state after a step, as `samplers.steps.Step` is that of tokens.

    Attributes:
        tokens: [B, C, h, w] float32; noisy in the current entity, NaN in later ones.
        finished: [B, h, w] bool, cells that are final.
    """

    tokens: Tensor
    finished: Tensor
    decided: int
    forward_passes: int
    origins: None = None


class XARPipeline(TokenPipeline):
    """Args:
    transformer: the generator.
    vae: the network of its image tokenizer.
    text_encoder, tokenizer: for a model of captions; None for a model of classes, as published.
    groups: names that a model of captions takes as "class:NAME".
    class_names: those of a model of classes; None for ImageNet's, or numbers.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: XAR,
        vae: AutoencoderKL,
        text_encoder: CLIPModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        groups: list[str] | None = None,
        class_names: list[str] | None = None,
    ):
        super().__init__()
        self.register_to_config(groups=groups, class_names=class_names)
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)

    @classmethod
    def from_original(cls, generator: str | Path, image_tokenizer: str | Path, size: str) -> "XARPipeline":
        """Load released files, as ``xAR-B.pth`` and ``kl16.ckpt``; `size` as in `XAR.from_original`."""
        return cls(XAR.from_original(generator, size), KLVAE.from_original(image_tokenizer).vae)

    @property
    def official(self) -> Defaults:
        """Those of the paper for each size; for others those of the smallest."""
        dim = self.transformer.config.dim
        size = next((name for name, sizes in SIZES.items() if sizes["dim"] == dim), None)
        return OFFICIAL[size or "B"]

    @property
    def samplers(self) -> list[str]:
        """See `TokenPipeline.samplers`."""
        return ["auto", *samplers_of("latents")]

    @property
    def length(self) -> int:
        return self.transformer.config.grid**2

    def make_sampler(self, name: str, **settings) -> NextX:
        """See `TokenPipeline.make_sampler`."""
        name, typed = parse_sampler(name)
        settings = typed | settings
        if name not in self.samplers:
            raise ValueError(
                f"this model writes continuous latents, and the sampler {name} tokens: choose one of {', '.join(self.samplers)}"
            )
        defaults = {"steps": self.defaults.steps, "precise": self.device.type != "mps"}  # which has no float64
        auto = "sde" if self.text_encoder is None else "euler"  # as published; as good in half of the steps
        return make(samplers[auto if name == "auto" else name], defaults | settings)

    @property
    def canvas(self) -> LatentGrid:
        return LatentGrid(self.transformer.config.channels)

    def check(self, request: Request) -> None:
        """See `TokenPipeline.check`."""
        _check_undrawn(request.temperature, request.top_k, request.top_p)
        super().check(request)

    def start(self, prompts: list[str], guided: bool, times: list[float]) -> XARSession:
        """Start a session for one image of each prompt, evaluated at `times`.

        Raises:
            ValueError: there is no such class.
        """
        if self.text_encoder is None:
            condition = torch.tensor([self.class_of(prompt) for prompt in prompts], device=self.device)
        else:
            texts, rows = distinct(prompts, guided)
            condition = self.transformer.read(*self.encode_text(texts))[rows]
        return XARSession(self.transformer, condition, times, guided)

    def encode_text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode captions -> hidden states [B, T, C], mask [B, T] bool."""
        texts = [self.caption(prompt) for prompt in prompts]
        with self.stage("text"):
            states, mask = TextImageEncoder(self.text_encoder, self.tokenizer).states(texts)
        return states.to(self.transformer.dtype), mask

    def stream(
        self,
        prompts: list[str],
        generators: list[torch.Generator],
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        sampler: str | NextX = "auto",
        tokens: Tensor | None = None,
        controls: list[Control] | None = None,
        shape: tuple[int, int] | None = None,
        every: int = 1,
    ) -> Iterator[LatentStep]:
        """See `TokenPipeline.stream`; `tokens` are latents [B, C, h, w], NaN in the cells to generate.

        Raises:
            ValueError: a temperature, top-k or top-p that would change something.
        """
        check_sampling(guidance_scale, temperature, top_k, top_p, by_cell=False)
        _check_undrawn(temperature, top_k, top_p)
        if controls:
            self.prepare(controls[0])
        sampler = self.make_sampler(sampler) if isinstance(sampler, str) else sampler
        if not isinstance(sampler, NextX):
            self.make_sampler(sampler.name)
        check_prompts(prompts, generators)
        empty = self.canvas.empty(len(prompts), self.shape_of())
        latents = empty if tokens is None else tokens
        latents = self.canvas.check(latents, tuple(empty.shape), None)
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        return self._write_latents(prompts, generators, latents.to(self.device), scale, sampler, every)

    @torch.no_grad()
    def _write_latents(self, prompts, generators, latents, scale, sampler, every) -> Iterator[LatentStep]:
        entities = self.transformer.entities
        lengths = entities.lengths
        times = {time for entity in range(len(lengths)) for time in sampler.times(entity, len(lengths))}
        self.bring("tokens")
        session = self.start(prompts, scale != 1, sorted(times))
        channels = latents.shape[1]

        def noise(entity: int, draws: int) -> tuple[Tensor, Tensor]:
            """Draw the noise of each image from its own generator, in the order of the authors' code."""
            size = lengths[entity], channels
            start = [torch.randn(size, generator=generator) for generator in generators]
            extra_noise = [
                [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(draws)]
                for generator in generators
            ]
            stacked = torch.stack([torch.stack(part) for part in extra_noise], dim=1) if draws else torch.empty(0)
            stacked = stacked if sampler.precise else stacked.float()
            return torch.stack(start).to(self.device), stacked.to(self.device)

        decided = self.canvas.decided(latents)
        step, emitted = LatentStep(latents, decided, 0, 0), -every
        for state in sampler(session, entities.patchify(latents), lengths, scale, noise):
            finished = entities.unpatchify((torch.arange(sum(lengths)) < state.finished)[None, :, None])[0, 0]
            step = LatentStep(
                entities.unpatchify(state.sequence),
                finished.to(decided.device) | decided,
                self._cells(state.decided),
                state.forward_passes,
            )
            if step.decided - emitted >= every:
                emitted = step.decided
                yield step
        if step.decided != emitted:
            yield step

    def _cells(self, positions: int) -> int:
        """Convert a number of positions of the sequence to cells of the image."""
        return positions * self.length // sum(self.transformer.entities.lengths)

    @property
    def codes(self) -> None:
        """See `TokenPipeline.codes`: latents have none."""

    @property
    def image_size(self) -> int:
        return KLVAE(self.vae).stride * self.transformer.config.grid

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """See `TokenPipeline.encode_images`: latents [B, C, h, w]."""
        with self.stage("image"):
            return KLVAE(self.vae).encode(pixels.to(self.device, self.vae.dtype)).to(self.transformer.dtype)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, H, W] in [0, 1]."""
        return KLVAE(self.vae).decode(tokens.to(self.vae.dtype)).clamp(0, 1)


def read_emoji(folder: Path) -> XARPipeline:
    """argen/emoji-xar."""
    return XARPipeline(load_network(XAR, folder), load_network(AutoencoderKL, WEIGHTS / "emoji-vae"), **emoji_text())


def read_release(folder: Path, name: str, size: str) -> XARPipeline:
    """`name` is that of the released file, e.g. "xAR-B"; the image tokenizer may lie beside it."""
    vae = folder / "kl16.ckpt"
    return XARPipeline.from_original(folder / f"{name}.pth", vae if vae.is_file() else hub_file(KL16, vae.name), size)


def _check_undrawn(temperature: float | None, top_k: int | None, top_p: float | None) -> None:
    """Raises:
    ValueError: a temperature, top-k or top-p that would change something.
    """
    settings = {"temperature": (temperature, 1.0), "top_k": (top_k, 0), "top_p": (top_p, 1.0)}
    for name, (value, neutral) in settings.items():
        if value not in (None, neutral):
            raise ValueError(f"{name} is {value}: this model draws no tokens, leave it out")
