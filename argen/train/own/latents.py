"""Latents of one's own images: mean and deviation as a KL autoencoder gives them, kept as bits where token ids are.

Letters in shape comments: B samples, C channels of a latent of h x w.
"""

import numpy as np
import torch
from torch import Tensor

from tokenizers_img.kl_vae import KLVAE


def moments(vae: KLVAE, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [0, 1] -> mean and deviation of their scaled latents [B, 2, C, h, w]."""
    posterior = vae.posterior(pixels)
    return torch.stack([posterior.mean, posterior.std], dim=1).float() * vae.vae.config.scaling_factor


def bits_of(numbers: Tensor) -> Tensor:
    """[B, ...] in float16 -> [B, L], whole numbers below 65536 with the same bits."""
    return torch.from_numpy(numbers.flatten(1).half().cpu().numpy().view(np.uint16).astype(np.int32))


def numbers_of(bits: Tensor) -> Tensor:
    """What `bits_of` made whole numbers of [B, L] -> float32."""
    return torch.from_numpy(bits.cpu().numpy().astype(np.uint16).view(np.float16).astype(np.float32))


def moments_of(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `bits_of` made of moments [B, 2, *shape] -> float32."""
    return numbers_of(bits).view(len(bits), 2, *shape)


def drawn_latents(bits: Tensor, drawn: Tensor) -> Tensor:
    """Latents [B, C, h, w] out of the distributions that `bits_of` has kept, by normal numbers of that shape."""
    mean, deviation = moments_of(bits, tuple(drawn.shape[1:])).unbind(1)
    return mean + deviation * drawn
