"""Recipes `emoji-vae` and `emoji-vae-decoder`: the KL autoencoder of the continuous generators (LDM, arXiv 2112.10752).

The first trains everything, mostly on squares cut out where there is something to see: the network is convolutional, and
four of them cost as much as a whole picture. The second keeps the encoder, so that latents keep their meaning, and trains
the decoder on, at its end with the perceptual and the adversarial term.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from argen.models.files import load_network
from argen.train.loop import Recipe, Schedule
from argen.train.vit_vqgan import DecoderTask, Reconstruction, augment
from tokenizers_img.kl_vae import KLVAE, network
from tokenizers_img.pixels import from_uint8

SCHEDULES = {
    "cpu": Schedule(steps=6000, batch_size=64, learning_rate=1.2e-3, warmup=150),
    "gpu": Schedule(steps=60000, batch_size=256, learning_rate=6e-4),
}
DECODER_SCHEDULES = {
    "cpu": Schedule(steps=2000, batch_size=16, learning_rate=4e-4, warmup=50),
    "gpu": Schedule(steps=10000, batch_size=128, learning_rate=2e-4),
}
CHANNELS, LATENT_CHANNELS, GROUPS, SIDE = (16, 32, 64, 128, 192), 16, 8, 128
L1, L2 = 0.2, 1.0
KL = 2e-4  # of the mean over latent numbers; half of it is what the posterior's noise may add to the L2 term
KL_FROM, KL_UNTIL, LOGVAR = 0.1, 0.4, -6.0  # shares of the schedule in which it grows, after a start with little noise
CUT, WHOLE_SHARE = 64, 0.25  # pixels on a side of the squares; share of the batches that are of whole pictures


class KLVAETask(Reconstruction):
    """The first stage: everything, from scratch.

    Args:
        total: steps of the schedule.
    """

    def __init__(self, data: Path, total: int):
        vae = network(CHANNELS, LATENT_CHANNELS, GROUPS, SIDE, 1.0, layers_per_block=1)
        nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], LOGVAR)
        super().__init__(KLVAE(compilable(vae)), data)
        self.total = total

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        uncropped = torch.rand(1, generator=generator) < WHOLE_SHARE
        size = size * CUT**2 // SIDE**2 if uncropped else size
        indices = torch.randint(len(self.train), (size,), generator=generator)
        images = augment(self.train[indices], generator)
        images = images if uncropped else cut_out(images, CUT, generator)
        latents = size, LATENT_CHANNELS, *(side // self._model().stride for side in images.shape[1:3])
        return {"pixels": from_uint8(images), "noise": torch.randn(latents, generator=generator)}

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        decoded, kl = self.networks["model"](batch["pixels"], batch["noise"])
        error, kl = decoded.float() - batch["pixels"], kl.mean()
        log |= {"l2": error.square().mean().item(), "kl": kl.item()}
        ramp = min(1.0, max(0.0, (step / self.total - KL_FROM) / (KL_UNTIL - KL_FROM)))
        yield "model", L2 * error.square().mean() + L1 * error.abs().mean() + ramp * KL * kl

    def save(self, folder: Path) -> None:
        model = self._model()
        model.vae.register_to_config(scaling_factor=1 / spread(model, self.train[:: max(1, len(self.train) // 2000)]))
        super().save(folder)


def compilable(vae: AutoencoderKL) -> AutoencoderKL:
    """The same with its up-sampling kept out of ``torch.compile``, whose graphs (torch 2.13, on a CPU) lose the gradient there."""
    for module in vae.modules():
        if isinstance(module, Upsample2D):
            module.forward = torch.compiler.disable(module.forward)
    return vae


def cut_out(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A square of each picture [B, H, W, 3] uint8: of two drawn at random the one with less white."""
    corners = torch.randint(images.shape[1] - side + 1, (len(images), 2, 2), generator=generator)
    crops = []
    for image, candidates in zip(images, corners.tolist(), strict=True):
        squares = [image[top : top + side, left : left + side] for top, left in candidates]
        crops.append(min(squares, key=lambda square: int((square == 255).sum())))
    return torch.stack(crops)


@torch.no_grad()
def spread(model: KLVAE, images: Tensor) -> float:
    """Standard deviation of the latents of pictures [B, H, W, 3] uint8, drawn from their posteriors."""
    generator = torch.Generator().manual_seed(0)
    latents = [model.posterior(from_uint8(part).to(model.device)).sample(generator) for part in images.split(64)]
    return torch.cat(latents).std().item()


class KLDecoderTask(DecoderTask):
    """The second stage, see `DecoderTask`."""

    def start(self, tokenizer: Path) -> tuple[KLVAE, list[nn.Module]]:
        """See `DecoderTask.start`."""
        vae = load_network(AutoencoderKL, tokenizer)
        vae.register_to_config(_name_or_path="emoji-vae")
        return KLVAE(compilable(vae)), [vae.encoder, vae.quant_conv]


RECIPE = Recipe(KLVAETask, SCHEDULES, takes=("total",))
DECODER_RECIPE = Recipe(KLDecoderTask, DECODER_SCHEDULES, takes=("vae", "judge", "total"))
