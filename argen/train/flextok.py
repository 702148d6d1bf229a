"""Recipe `emoji-flextok`: latents of `emoji-vae` as up to 64 ordered tokens (arXiv 2502.13967, section 3).

Beside the flow's error, the patches after an early layer of the decoder are drawn towards those of `emoji-clip` (REPA, arXiv
2410.06940): this is what makes few tokens say what a picture shows.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModel

from argen.data.tables import pixels, read_split
from argen.eval.metrics import psnr
from argen.models.files import load_network
from argen.train.loop import Recipe, Schedule, Task
from tokenizers_img.flextok.network import FlexTok
from tokenizers_img.flextok.tokenizer import FlexTokenizer
from tokenizers_img.kl_vae import KLVAE
from tokenizers_img.pixels import from_uint8

SCHEDULES = {
    "cpu": Schedule(steps=5500, batch_size=64, learning_rate=2e-3, warmup=150, weight_decay=0.01, muon=True),
    "gpu": Schedule(steps=80000, batch_size=512, learning_rate=5e-4, weight_decay=0.01),
}
SIZES = {
    "levels": (8, 5, 5, 5),
    "registers": 64,
    "encoder_dim": 192,
    "encoder_depth": 3,
    "decoder_dim": 192,
    "decoder_depth": 5,
    "patch": 1,
    "rank": 48,
}
NULL_SHARE, SCENES_SHARE = 0.15, 0.25
ALIGNED_LAYER, ALIGNMENT = 1, 0.5  # the weight of the second term
SHOWN = (1, 4, 16, 64)  # tokens, in the sample
STEPS, GUIDANCE = 12, 3.0  # of the sample


class Aligned(nn.Module):
    """The network, with the head that draws its patches towards those of another network.

    Args:
        width: of the other network's patches; None where there is no head.
    """

    def __init__(self, flextok: FlexTok, width: int | None):
        super().__init__()
        dim = flextok.config.decoder_dim
        self.flextok, self.head = flextok, None
        if width is not None:
            layers = nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, width)
            self.head = nn.Sequential(*layers)

    def forward(
        self, latents: Tensor, noise: Tensor, times: Tensor, keep: Tensor, dropped: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `FlexTok.forward`; the patches are those of the head."""
        velocity, features = self.flextok(latents, noise, times, keep, dropped, ALIGNED_LAYER)
        return velocity, None if self.head is None else self.head(features)


@torch.no_grad()
def patches_of(vision: CLIPVisionModel, images: Tensor) -> Tensor:
    """Patch features [B, N, C] bfloat16 by `emoji-clip` of images [B, H, W, 3] uint8."""
    features = (vision(pixel_values=2 * from_uint8(part) - 1).last_hidden_state[:, 1:] for part in images.split(64))
    return torch.cat([part.bfloat16() for part in features])


def sample_num_tokens(size: int, most: int, generator: torch.Generator) -> Tensor:
    """Numbers of tokens to decode [size], at most `most`: every other one a power of two, so that short prefixes occur often enough."""
    uniform = torch.randint(1, most + 1, (size,), generator=generator)
    powers = 2 ** torch.randint(most.bit_length(), (size,), generator=generator)
    return torch.where(torch.arange(size) % 2 == 0, uniform, powers)


def begin(flextok: FlexTok) -> None:
    """Set the weights that a new network starts with: what time does is nothing at first, and the velocity zero."""
    for name, parameter in flextok.named_parameters():
        if any(part in name for part in ("adaLN_modulation", "dec_to_patches.proj")):
            nn.init.zeros_(parameter)
    for block in flextok.decoder.module_dict.dec_transformer.layers if flextok.config.rank is not None else ():
        nn.init.xavier_uniform_(block.adaLN_modulation[1].weight)  # of the two in a row, only the last is zero


class FlowTask(Task):
    """What trainings of a FlexTok share: what is drawn, the losses, reconstructions.

    Attributes:
        vae: of the latents.
        test: held-out images [n, H, W, 3] uint8.
        null_share: of the samples have no condition.
        flow: settings of the tokenizer's decoding.
        scored: held-out images that are decoded for the scores, at most.
    """

    vae: KLVAE
    test: Tensor
    null_share = NULL_SHARE
    flow = {"steps": STEPS, "guidance_scale": GUIDANCE}
    scored = 64

    def drawn(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """What is drawn for latents of a shape [B, C, h, w]: "noise" like them and "times", "keep" and "dropped" [B]."""
        size = shape[0]
        return {
            "noise": torch.randn(shape, generator=generator),
            "times": torch.randn(size, generator=generator).sigmoid(),
            "keep": sample_num_tokens(size, self._model().flextok.config.registers, generator),
            "dropped": torch.rand(size, generator=generator) < self.null_share,
        }

    def flow_error(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The mean squared error of the velocity, noise minus latents, and patches, see `Aligned`."""
        latents, noise = batch["latents"], batch["noise"]
        velocity, patches = network(*(batch[key] for key in ("latents", "noise", "times", "keep", "dropped")))
        return (velocity - (noise - latents)).square().mean(), patches

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        flow, patches = self.flow_error(self.networks["model"], batch)
        log["flow"] = flow.item()
        if patches is None:
            yield "model", flow
            return
        apart = 1 - F.cosine_similarity(patches.float(), batch["patches"].float(), dim=-1).mean()
        log["apart"] = apart.item()
        yield "model", flow + ALIGNMENT * apart

    def tokenizer(self) -> FlexTokenizer:
        model = self._model()
        return FlexTokenizer(model.flextok, self.vae.vae, **self.flow)

    def shown(self) -> list[int]:
        """Numbers of tokens that reconstructions are shown of."""
        most = self._model().flextok.config.registers
        return [count for count in SHOWN if count < most] + [most]

    @torch.no_grad()
    def decoded(self, images: Tensor, keep: int) -> Tensor:
        """Reconstructions [B, 3, H, W] of images [B, H, W, 3] uint8 from their first `keep` tokens."""
        tokenizer, decoded = self.tokenizer(), []
        for part in images.split(64):
            ids = tokenizer.encode(from_uint8(part).to(tokenizer.device))
            decoded.append(tokenizer.decode(ids[:, :keep]).clamp(0, 1).cpu())
        return torch.cat(decoded)

    def evaluate(self) -> dict[str, float]:
        """PSNR in dB on some held-out images, by the number of tokens."""
        images = self.test[:: max(1, len(self.test) // self.scored)][: self.scored]
        real = from_uint8(images)
        return {f"psnr, {keep} tokens": psnr(self.decoded(images, keep), real).mean().item() for keep in self.shown()}

    def sample(self) -> Image.Image:
        """8 held-out images, and below each what 1, 4, 16 and 64 of its tokens, or all, give back."""
        images = self.test[:: max(1, len(self.test) // 8)][:8]
        rows = torch.stack([from_uint8(images), *(self.decoded(images, keep) for keep in self.shown())])
        sheet = rearrange(rows, "r c d h w -> (r h) (c w) d")
        return Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())


class FlexTokTask(FlowTask):
    """Args:
    data, scenes: folders made by ``argen data emoji`` and ``argen data scenes``.
    vae, clip: folders of the trained `emoji-vae` and `emoji-clip`.
    """

    def __init__(self, data: Path, scenes: Path, vae: Path, clip: Path):
        self.vae = KLVAE(load_network(AutoencoderKL, vae).requires_grad_(False))
        vision = CLIPVisionModel.from_pretrained(clip, dtype=torch.float32).eval()
        singles, composed, self.test = (
            torch.from_numpy(pixels(read_split(folder, split), self.vae.config.image_size))
            for folder, split in ((data, "train"), (scenes, "train"), (data, "test"))
        )
        images, self.singles = torch.cat([singles, composed]), len(singles)
        self.latents, self.patches = self.encode(images), patches_of(vision, images)
        grid = self.latents.shape[-1]
        flextok = FlexTok(**SIZES, channels=self.vae.config.latent_channels, grid=grid)
        begin(flextok)
        self.networks: dict[str, nn.Module] = {"model": Aligned(flextok, vision.config.hidden_size)}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([self.vae.encode(from_uint8(part)) for part in images.split(64)])

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        scenes = int(size * SCENES_SHARE)
        indices = torch.cat(
            [
                torch.randint(self.singles, (size - scenes,), generator=generator),
                torch.randint(self.singles, len(self.latents), (scenes,), generator=generator),
            ]
        )
        latents = self.latents[indices]
        drawn = self.drawn(tuple(latents.shape), generator)
        return {"latents": latents, "patches": self.patches[indices], **drawn}

    def save(self, folder: Path) -> None:
        self.tokenizer().network.to(torch.bfloat16).save_pretrained(folder)


RECIPE = Recipe(FlexTokTask, SCHEDULES, takes=("scenes", "vae", "clip"))
