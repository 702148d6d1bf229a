"""SEED as an image tokenizer: pixels -> causal ids, and back through an unCLIP diffusion model.

Letters in shape comments: see `tokenizers_img.seed.network`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from transformers import (
    Blip2VisionModel,
)

from tokenizers_img.conv_encoder import TwoEncoders
from tokenizers_img.pixels import CLIP_MEAN, CLIP_STD, from_pil, on_white, upright
from tokenizers_img.seed.network import Seed

SETTINGS, SETTINGS_FILE = ("steps", "guidance_scale", "seed", "mean", "std", "squashed"), "tokenizer.json"
SMALLEST = 8  # pixels a side: in fewer there is nothing to recognise


def unclip_repository() -> str:
    """Where the published decoder is: it was withdrawn in 2025, and a copy that `ARGEN_UNCLIP` names will do."""
    return os.environ.get("ARGEN_UNCLIP", "stabilityai/stable-diffusion-2-1-unclip")


class UnCLIP(StableUnCLIPImg2ImgPipeline):
    """Images from embeddings. `image_embeds` are [B, E], or [B, 2, E] with the embeddings to guide away from behind each; without
    those guidance leads away from zeros, which stand for no image."""

    def _encode_image(
        self,
        image: None,
        device: torch.device,
        batch_size: int,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        noise_level: Tensor,
        generator: torch.Generator | None,
        image_embeds: Tensor,
    ) -> Tensor:
        negative_embeds = None
        if image_embeds.ndim == 3:
            image_embeds, negative_embeds = image_embeds.unbind(dim=1)
        embeds = self.noise_image_embeddings(image_embeds, noise_level, generator=generator)
        embeds = embeds.repeat_interleave(num_images_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            return embeds
        if negative_embeds is None:
            return torch.cat([torch.zeros_like(embeds), embeds])
        negative_embeds = self.noise_image_embeddings(negative_embeds, 0, generator=generator)
        return torch.cat([negative_embeds.repeat_interleave(num_images_per_prompt, dim=0), embeds])


class SeedTokenizer(nn.Module):
    """Pixels <-> causal ids; what comes back shows the same thing, not the same pixels.

    Args:
        network: of the tokens.
        vision: the picture encoder, of BLIP-2 or of `argen/emoji-seed`.
        decoder: draws generation embeddings, or gives what does when it is first needed; None where pictures are only read.
        steps, guidance_scale: of the decoder; as published.
        seed: of the noise that every picture starts from, so that decoding repeats.
        mean, std: of the colours, for the picture encoder.
        squashed: whether pictures that are no squares are squashed, as published, or padded.
    """

    def __init__(
        self,
        network: Seed,
        vision: Blip2VisionModel | TwoEncoders,
        decoder: UnCLIP | Callable[[], UnCLIP] | None = None,
        steps: int = 20,
        guidance_scale: float = 10.0,
        seed: int = 0,
        mean: tuple[float, float, float] = CLIP_MEAN,
        std: tuple[float, float, float] = CLIP_STD,
        squashed: bool = True,
    ):
        super().__init__()
        self.network, self.vision, self.decoder = network, vision, decoder
        self.steps, self.guidance_scale, self.seed = steps, guidance_scale, seed
        self.mean, self.std, self.squashed = mean, std, squashed
        # nested tokens: the first ones alone can be decoded
        tokens = {"tokens": network.config.tokens} if network.config.nested else {}
        self.config = FrozenDict(image_size=vision.config.image_size, n_embed=network.config.n_embed, **tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the networks, each in its own layout, and the settings; a decoder that was not needed yet is that of the release, and stays out."""
        folder = Path(folder)
        self.network.save_pretrained(folder)
        self.vision.save_pretrained(folder / "vision")
        if isinstance(self.decoder, UnCLIP):
            self.decoder.save_pretrained(folder / "decoder")
        settings = {name: getattr(self, name) for name in SETTINGS}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, release: Callable[[], UnCLIP] | None = None) -> "SeedTokenizer":
        """Read what `save_pretrained` wrote.

        Args:
            release: gives the decoder where the folder has none.
        """
        folder = Path(folder)
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        parts = TwoEncoders if (folder / "vision" / "conv").is_dir() else Blip2VisionModel
        network, vision, decoder = Seed.from_pretrained(folder), parts.from_pretrained(folder / "vision"), release
        if (folder / "decoder").is_dir():
            decoder = UnCLIP.from_pretrained(folder / "decoder", feature_extractor=None, image_encoder=None)
        return cls(network, vision, decoder, **settings).eval()

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def prepare(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
        """A picture -> pixels [3, S, S] in [0, 1], as in training; the authors' scripts have it bilinear.

        Raises:
            ValueError: it is too small to show anything.
        """
        if min(image.size) < SMALLEST:
            raise ValueError(
                f"the image is {image.width} x {image.height}: SEED expects at least {SMALLEST} pixels a side"
            )
        size = self.config.image_size
        if not self.squashed:
            return from_pil(image, size)
        small = on_white(upright(image)).resize((size, size), resample)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] -> ids [B, N]."""
        return self.network.ids(self.features(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] -> features [B, P, V].

        Raises:
            ValueError: they are of another size.
        """
        size = self.config.image_size
        if tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"images are {list(pixels.shape[1:])}: expected [3, {size}, {size}]")
        return self.vision(self.normalised(pixels).to(self.vision.dtype)).last_hidden_state.to(self.dtype)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] -> as the picture encoder wants them."""
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    @torch.no_grad()
    def decode(
        self, ids: Tensor, negative_ids: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Ids [B, N] -> pixels [B, 3, H, W] in [0, 1].

        Args:
            negative_ids: ids [1 or B, N] to guide away from, e.g. those that the language model writes without a prompt.
            generator: of the noise; None is the tokenizer's own, the same for all pictures.

        Raises:
            ValueError: bad ids, see `Seed.decode`; there is no decoder.
        """
        image_embeds = self.network.decode(ids)
        if self.decoder is None:
            raise ValueError(
                f"these tokens were read without a decoder, so nothing can be drawn: "
                f"{unclip_repository()} draws them, or a copy of it"
            )
        if not isinstance(self.decoder, UnCLIP):
            self.decoder = self.decoder()
        self.decoder.set_progress_bar_config(disable=True)
        pipe, size = self.decoder.to(self.device), self.decoder.unet.config.sample_size
        generator = torch.Generator().manual_seed(self.seed) if generator is None else generator
        shape = 1, pipe.unet.config.in_channels, size, size
        noise = randn_tensor(shape, generator, pipe.device, pipe.unet.dtype).expand(len(ids), -1, -1, -1)
        if negative_ids is not None:
            negative_embeds = self.network.decode(negative_ids).expand_as(image_embeds)
            image_embeds = torch.stack([image_embeds, negative_embeds], dim=1)
        output = pipe(
            image_embeds=image_embeds.to(pipe.unet.dtype),
            prompt=[""] * len(ids),
            latents=noise.clone() * pipe.scheduler.init_noise_sigma,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=generator,
            output_type="pt",
        )
        return output.images
