"""What a tokenizer of pictures keeps."""

import torch
from torch import Tensor

from tokenizers_img.pixels import from_uint8
from tokenizers_img.vit_vqgan import ViTVQGAN


@torch.no_grad()
def reconstruct(tokenizer: ViTVQGAN, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [B, H, W, 3] uint8 -> what comes back, [B, 3, H, W] in [0, 1], and ids [B, N], both on the CPU."""
    made, ids = [], []
    for part in pictures.split(64):
        ids.append(tokenizer.encode(from_uint8(part).to(tokenizer.device, tokenizer.dtype)))
        made.append(tokenizer.decode(ids[-1]).float().clamp(0, 1).cpu())
    return torch.cat(made), torch.cat(ids).cpu()


def evaluate(tokenizer: ViTVQGAN, pictures: Tensor) -> dict[str, float]:
    """PSNR in dB, mean of the pictures [B, H, W, 3] uint8; share of the codes that they use."""
    made, ids = reconstruct(tokenizer, pictures)
    error = (made - from_uint8(pictures)).square().mean(dim=(1, 2, 3))
    return {"psnr": (-10 * error.log10()).mean().item(), "codes_used": ids.unique().numel() / tokenizer.config.n_embed}
