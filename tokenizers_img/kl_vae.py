"""KL-16, the picture tokenizer of MAR and xAR: a convolutional autoencoder with a Gaussian over continuous latents.

Paper: "Autoregressive Image Generation without Vector Quantization" (arXiv 2406.11838). Weights: ``kl16.ckpt`` of
github.com/LTH14/mar (MIT), also as ``xwen99/mar-vae-kl16`` on the hub. The network is `diffusers.AutoencoderKL`: this file
converts the published names.

Letters in shape comments: B batch, H W pixels, C channels of a latent, h w its sides (H / stride, W / stride).
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from tokenizers_img.checkpoint import load_strict, read_state_dict, to_diffusers
from tokenizers_img.mapped import unfilled

SCALE = 0.2325  # 1 / standard deviation of sampled latents over ImageNet


def network(
    channels: tuple[int, ...] = (128, 128, 256, 256, 512),
    latent_channels: int = 16,
    norm_num_groups: int = 32,
    image_size: int = 256,
    scaling_factor: float = SCALE,
    layers_per_block: int = 2,
) -> AutoencoderKL:
    """The published network, or one of other sizes: attention stands in the last level of the encoder, in no level of the
    decoder, and in the middle of both."""
    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        sample_size=image_size,
        scaling_factor=scaling_factor,
    )


class KLVAE(nn.Module):
    """Pixels <-> latents of about unit variance, as the generators take them.

    Args:
        vae: its `scaling_factor` is 1 / standard deviation of its latents.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self.config = FrozenDict(image_size=vae.config.sample_size, latent_channels=vae.config.latent_channels)

    @classmethod
    def from_original(cls, path: str | Path) -> "KLVAE":
        """Load ``kl16.ckpt`` as released."""
        vae = unfilled(network)
        state = {key: value for key, value in read_state_dict(path).items() if not key.startswith("loss.")}
        return cls(load_strict(vae, to_diffusers(state, len(vae.config.block_out_channels)), source=path))

    @property
    def device(self) -> torch.device:
        return self.vae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    def posterior(self, pixels: Tensor) -> DiagonalGaussianDistribution:
        """The Gaussian over unscaled latents of pixels [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: a side is no multiple of the stride.
        """
        if pixels.shape[2] % self.stride or pixels.shape[3] % self.stride:
            raise ValueError(f"images are {list(pixels.shape[2:])}: expected multiples of {self.stride}")
        return self.vae.encode(2 * pixels - 1).latent_dist

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> the mean of their latents, scaled [B, C, h, w]."""
        return self.posterior(pixels).mode() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> pixels [B, 3, H, W], about [0, 1] and not clipped."""
        return (self.vae.decode(latents / self.vae.config.scaling_factor).sample + 1) / 2

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """In training: pixels [B, 3, H, W] in [0, 1] and what is drawn of their posteriors (by default the mean), by normal
        `noise` [B, C, h, w] -> what comes back, and the divergence from the standard normal distribution, a mean over the latent numbers [B]."""
        posterior = self.posterior(pixels)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(dim=(1, 2, 3))
        return (self.vae.decode(latents).sample + 1) / 2, kl

    def save_pretrained(self, folder: str | Path) -> None:
        """As `diffusers.AutoencoderKL` does."""
        self.vae.save_pretrained(folder)
