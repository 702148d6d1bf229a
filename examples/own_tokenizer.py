"""A custom tokenizer: the average of every square in 64 shades of grey, with a card, beside a shipped one."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

import argen
from argen.eval.reconstruction import reconstruct
from argen.hub.cards import Card
from tokenizers_img.pixels import from_pil


class Shades(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, image_size: int = 256, n_embed: int = 64):
        super().__init__()
        self.register_buffer("shades", torch.linspace(0, 1, n_embed))

    def encode(self, pixels):  # [B, 3, H, W] in [0, 1] -> ids [B, 256]
        return (F.adaptive_avg_pool2d(pixels.mean(dim=1), 16).flatten(1) * 63).round().long()

    def decode(self, ids):  # ids [B, 256] -> [B, 3, H, W] in [0, 1]
        return F.interpolate(self.shades[ids].view(-1, 1, 16, 16).expand(-1, 3, -1, -1), scale_factor=16)


def read(folder):  # of its files, of which there are none
    return Shades()


argen.register("card", "mine/shades", Card("mine/shades", "tokenizer", "64 shades of grey", f"{__name__}:read"))
image = argen.load("argen/emoji-parti")("a panda", generator=torch.Generator().manual_seed(0)).images[0]
pixels = (from_pil(image, 256) * 255).byte().permute(1, 2, 0)[None]
for name in ("mine/shades", "argen/emoji-vitvqgan"):
    reconstruction, ids = reconstruct(argen.load(name), pixels)
    error = (reconstruction - pixels.permute(0, 3, 1, 2) / 255).square().mean()
    print(f"{name}: {ids.shape[1]} tokens, PSNR {-10 * error.log10():.1f} dB")
