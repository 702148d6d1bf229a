"""`argen train flextok`: FlexTok, images as ordered tokens, on one's own images, which need neither classes nor captions.

Its authors released no training code. As in the paper (arXiv 2502.13967, section 3): the error of a rectified flow on the latents of a VAE, which stays as
it is; only the first tokens are seen, in half of the samples 1 to all of them, in the others a power of two; in a fifth none is, for guidance.
Patches of a new network are drawn towards those of `emoji-clip`, which ships, in the place of DINOv2's (REPA); a trained one goes on by the flow alone.

Letters in shape comments: B samples, S side of the crops in pixels, C channels of a latent of h x w, L numbers that are kept of an image.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from argen.device import pick
from argen.eval.images import crop_adm
from argen.hub.cards import TRAINED_FLEXTOK, Card, write_card
from argen.hub.loading import load
from argen.models.clip import TextImageEncoder
from argen.processes import processes
from argen.train import flextok as emoji
from argen.train.flextok import Aligned, FlowTask, begin
from argen.train.loop import Schedule
from argen.train.own.latents import bits_of, drawn_latents, moments, numbers_of
from argen.train.own.options import OwnOptions
from argen.train.own.run import OwnRecipe, encoded
from argen.train.own.start import size_of
from argen.train.own.tokenizers import check_options
from argen.train.own.tokens import Examples
from argen.train.sources import Source
from samplers.errors import InvalidValue
from tokenizers_img.flextok.network import SIZES as WIDTHS
from tokenizers_img.flextok.network import FlexTok
from tokenizers_img.flextok.tokenizer import FlexTokenizer
from tokenizers_img.kl_vae import KLVAE

SCHEDULE = Schedule(
    steps=40_000,
    batch_size=256,
    learning_rate=1e-4,
    warmup=1_000,
    betas=(0.9, 0.99),
    weight_decay=0.01,
    ema_decay=0.999,
    decayed="matrices",
)
DROPPED = 0.2  # share of the samples that see no token (paper)
MINI = emoji.SIZES  # for a CPU
MINI_VAE = "argen/emoji-vae"
VAES = "a KL autoencoder, or a FlexTok, whose own is taken"
SCORED, LOSS_OF, AT_ONCE = 16, 256, 32  # held-out images: decoded for the scores, of the loss, at a time


def sizes() -> dict[str, dict]:
    """What `FlexTok` is called with, by the name of a size: encoder and decoder of a depth, whose width goes with it."""
    pairs = ("d12", "d12"), ("d18", "d18"), ("d18", "d28")
    published = {
        f"{encoder}-{decoder}": {
            "encoder_dim": WIDTHS[encoder],
            "encoder_depth": int(encoder[1:]),
            "decoder_dim": WIDTHS[decoder],
            "decoder_depth": int(decoder[1:]),
            "patch": 2,
        }
        for encoder, decoder in pairs
    }
    return published | {"mini": MINI}


class Seen(nn.Module):
    """What is kept of an image: mean and deviation of its latents and, with an encoder, the patches that it sees."""

    def __init__(self, vae: KLVAE, encoder: TextImageEncoder | None):
        super().__init__()
        self.vae, self.vision, self.side = vae, None, 0
        if encoder is not None:
            self.vision, self.side = encoder.clip.vision_model, encoder.clip.config.vision_config.image_size

    @property
    def device(self) -> torch.device:
        return self.vae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] -> the bits of float16 numbers, [B, L]."""
        parts = [moments(self.vae, pixels).flatten(1)]
        if self.vision is not None:
            small = F.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)
            parts.append(self.vision(pixel_values=2 * small - 1).last_hidden_state[:, 1:].flatten(1))
        return bits_of(torch.cat(parts, dim=1))


class OwnFlexTokTask(FlowTask):
    """Args:
    tokenizer: whose network is trained.
    encoder: whose patches those of the network are drawn towards, or None.
    source, held: images to train on, and others.
    """

    scored = SCORED

    def __init__(
        self,
        tokenizer: FlexTokenizer,
        encoder: TextImageEncoder | None,
        options: OwnOptions,
        source: Source,
        held: Source,
    ):
        self.vae, self.size = KLVAE(tokenizer.vae.requires_grad_(False)), tokenizer.config.image_size
        self.flow = {"steps": tokenizer.steps, "guidance_scale": tokenizer.guidance_scale}
        self.null_share = DROPPED if options.dropped is None else options.dropped
        self.width = None if encoder is None else encoder.clip.config.vision_config.hidden_size
        network, seen = tokenizer.network, Seen(self.vae, encoder)
        side = self.size // self.vae.stride
        self.shape, self.grid = (self.vae.config.latent_channels, side, side), network.config.grid
        aligned = Aligned(network.requires_grad_(True), self.width).to(network.device).train()
        self.networks: dict[str, nn.Module] = {"model": aligned}
        if processes().is_main_process:
            print(source.report(size=self.size))
        self.examples, self.held = (
            Examples(encoded(seen, part, self.size, options.crops or "flip"), part) for part in (source, held)
        )
        rows = np.linspace(0, len(held) - 1, min(SCORED, len(held))).astype(int).tolist()
        self.test = torch.from_numpy(np.stack([np.asarray(crop_adm(held.image(row), self.size)) for row in rows]))
        self.options = {name: str(getattr(options, name)) for name in ("init", "size", "tokenizer", "crops")}
        self.options |= {"dropped": str(self.null_share), "image_size": str(self.size), "images": source.identity}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Which images and crops [B], what is drawn of their latents [B, C, h, w], and what `FlowTask.drawn` says."""
        image = torch.randint(len(self.examples), (size,), generator=generator)
        crop = (torch.rand(size, generator=generator) * self.examples.tokens.crops).long()
        normal = torch.randn(size, *self.shape, generator=generator)
        return {"image": image, "crop": crop, "drawn": normal, **self.drawn(normal.shape, generator)}

    def read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Latents of a drawn batch, and patches [B, P, W] where there is an encoder."""
        return self.seen(self.examples, batch)

    def seen(self, examples: Examples, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `read`, of some images."""
        bits = examples.ids(batch["image"].tolist(), batch["crop"].tolist())
        count = 2 * batch["drawn"][0].numel()
        read = {name: batch[name] for name in ("noise", "times", "keep", "dropped")}
        read["latents"] = drawn_latents(bits[:, :count], batch["drawn"])
        if self.width is not None:
            read["patches"] = self.placed(numbers_of(bits[:, count:]))
        return read

    def placed(self, patches: Tensor) -> Tensor:
        """Patches of the encoder [B, ...] -> one for each of the network's [B, P, W]."""
        grid = patches.view(len(patches), -1, self.width)
        grid = rearrange(grid, "b (y x) w -> b w y x", y=round(grid.shape[1] ** 0.5))
        if grid.shape[-1] != self.grid:
            grid = F.interpolate(grid, (self.grid, self.grid), mode="bilinear", antialias=True)
        return rearrange(grid, "b w y x -> b (y x) w")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The error of the flow on at most `LOSS_OF` held-out images, with the same noise each time, and PSNR, see `FlowTask`."""
        model, count, total = self._model(), min(LOSS_OF, len(self.held)), 0.0
        for first in range(0, count, AT_ONCE):
            rows, chance = torch.arange(first, min(first + AT_ONCE, count)), torch.Generator().manual_seed(first)
            normal = torch.randn(len(rows), *self.shape, generator=chance)
            batch = {"image": rows, "crop": torch.zeros_like(rows), "drawn": normal}
            batch = self.seen(self.held, batch | self.drawn(normal.shape, chance))
            batch = {key: value.to(model.flextok.device) for key, value in batch.items()}
            total += len(rows) * self.flow_error(model, batch)[0].item()
        return {"held-out loss": total / count} | super().evaluate()

    def save(self, folder: Path) -> None:
        """Write a folder that `argen.load` reads: network, VAE, card."""
        tokenizer = self.tokenizer()
        tokenizer.network.save_pretrained(folder)
        tokenizer.vae.save_pretrained(folder / "vae")
        config, side = tokenizer.config, f"{self.size} x {self.size}"
        about = f"FlexTok, {side} <-> 1 to {config.tokens} ordered ids of {config.n_embed}"
        millions = round(sum(part.numel() for part in tokenizer.parameters()) / 1e6, 1)
        card = Card(
            "flextok, trained", "tokenizer", about, TRAINED_FLEXTOK, parameters=millions, arguments=dict(self.flow)
        )
        write_card(card, folder)


def new_tokenizer(options: OwnOptions) -> FlexTokenizer:
    """A tokenizer whose network has random weights.

    Raises:
        InvalidValue: an unknown size, no VAE, something else than one, or a side of images that its patches do not divide.
    """
    chosen, name = size_of(options, sizes(), "d12-d12"), options.tokenizer
    if name is None and options.size != "mini":
        raise InvalidValue(
            f"a new network needs a VAE: give --tokenizer, e.g. EPFL-VILAB/flextok_vae_c16 or {MINI_VAE}, or --init a model to start from",
            "tokenizer",
        )
    images = load(name or MINI_VAE, dtype="fp32")
    if not isinstance(images, KLVAE | FlexTokenizer):
        raise InvalidValue(f"{name} is no tokenizer that FlexTok reads: expected {VAES}", "tokenizer")
    vae = KLVAE(images.vae)
    side, patch = options.image_size or images.config.image_size, vae.stride * chosen["patch"]
    if side % patch:
        raise InvalidValue(
            f"image_size is {side}: expected a multiple of {patch}, a patch of {name or MINI_VAE}", "image_size"
        )
    network = FlexTok(**chosen, channels=vae.config.latent_channels, grid=side // patch)
    for part in network.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    begin(network)
    flow = FlowTask.flow if options.size == "mini" else {}  # of the others as published
    return FlexTokenizer(network, vae.vae, **flow)


def prepare(options: OwnOptions, source: Source, held: Source) -> OwnFlexTokTask:
    """See `argen.train.own.run.OwnRecipe.prepare`."""
    check_options(options, reads_vae=True)
    encoder = None
    if options.init is None:
        tokenizer, encoder = new_tokenizer(options), load("argen/emoji-clip", dtype="fp32")
        encoder.clip.to(pick(None))
    else:
        tokenizer = load(options.init, dtype="fp32")
        if not isinstance(tokenizer, FlexTokenizer):
            raise InvalidValue(f"{options.init} is no FlexTok: expected one to start from", "init")
        if options.image_size not in (None, tokenizer.config.image_size):
            raise InvalidValue(
                f"image_size is {options.image_size}: expected {tokenizer.config.image_size}, that of {options.init}",
                "image_size",
            )
    return OwnFlexTokTask(tokenizer.to(pick(None)), encoder, options, source, held)


RECIPE = OwnRecipe(prepare, SCHEDULE, conditions=False)
