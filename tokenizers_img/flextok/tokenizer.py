"""FlexTok as an image tokenizer: pixels <-> ordered ids, through the latents of a VAE and a rectified flow.

Letters in shape comments: see `tokenizers_img.flextok.network`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from samplers.flow import NormalisedGuidance, euler, even_times
from samplers.logits import guide
from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.flextok.checkpoint import ALIGNMENT, VAE, read_config, sizes_of, vae_network, vae_sizes
from tokenizers_img.flextok.network import FlexTok
from tokenizers_img.mapped import unfilled
from tokenizers_img.quantize import check_ids


class FlexTokenizer(nn.Module):
    """Pixels <-> ordered ids.

    Args:
        network: of the tokens.
        vae: of the latents; its `scaling_factor` makes them about as large as the noise.
        steps, guidance_scale: of `decode`; as published.
    """

    def __init__(self, network: FlexTok, vae: AutoencoderKL, steps: int = 25, guidance_scale: float = 7.5):
        super().__init__()
        self.network, self.vae, self.steps, self.guidance_scale = network, vae, steps, guidance_scale
        config = network.config
        stride = 2 ** (len(vae.config.block_out_channels) - 1)
        self.stride = stride * config.patch
        self.config = FrozenDict(
            image_size=self.stride * config.grid, n_embed=network.fsq.n_embed, tokens=config.registers
        )

    @classmethod
    def from_original(cls, path: str | Path) -> "FlexTokenizer":
        """Load a published ``model.safetensors``, its ``config.json`` beside it or inside.

        Raises:
            ValueError: the file does not fit its configuration, which names something that argen does not know.
        """
        path = Path(path)
        state = {key: value for key, value in read_state_dict(path).items() if not key.startswith(ALIGNMENT)}
        config = read_config(path)
        inner = {key.removeprefix(VAE): value for key, value in state.items() if key.startswith(VAE)}
        rest = {key: value for key, value in state.items() if not key.startswith(VAE)}
        network = load_strict(unfilled(FlexTok, **sizes_of(config)), rest, source=path)
        return cls(network, load_strict(unfilled(vae_network, **vae_sizes(config)), inner, source=path))

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def latents(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> scaled latents [B, C, h, w] float32: the mean of the posterior, which repeats, or
        drawn from it by `generator`, as in the authors' code.

        Raises:
            ValueError: a side is no multiple of the stride.
        """
        if pixels.shape[2] % self.stride or pixels.shape[3] % self.stride:
            raise ValueError(f"images are {list(pixels.shape[2:])}: expected multiples of {self.stride}")
        posterior = self.vae.encode(2 * pixels.to(self.vae.dtype) - 1).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return latents.float() * self.vae.config.scaling_factor

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> ids [B, N]."""
        return self.network.fsq.ids(self.network.encode(self.latents(pixels).to(self.dtype)))

    def decode(
        self,
        ids: Tensor | Sequence[Tensor],
        steps: int | None = None,
        guidance_scale: float | Callable[[float], float] | None = None,
        normalised: bool = True,
        noise: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        precise: bool | None = None,
    ) -> Tensor:
        """Ids [B, k], or B of them of any length k -> pixels [B, 3, H, W], about [0, 1] and not clipped.

        Args:
            steps: of the flow; None is the tokenizer's own.
            guidance_scale: a number, or one for each time; 1 is none, None the tokenizer's own.
            normalised: see `samplers.flow.NormalisedGuidance`; else plain.
            noise: [B, C, h, w] to start from; None is the same noise for every picture, so that decoding repeats.
            shape: of the latents (h, w); those of a square of the size it was trained at, by default.
            precise: see `samplers.flow.NormalisedGuidance`; None is yes where the device has float64.

        Raises:
            ValueError: no token or too many, or an id outside the codebook.
        """
        codes, keep = self._codes(ids)
        if noise is None:
            side = self.network.config.grid * self.network.config.patch
            size = self.network.config.channels, *(shape or (side, side))
            noise = torch.randn(size, generator=torch.Generator().manual_seed(0)).expand(len(codes), -1, -1, -1)
        registers = self.network.read(codes, keep)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        steps = self.steps if steps is None else steps
        latents = self.flow(registers, noise.to(self.device), steps, scale, normalised, precise)
        return (self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample + 1) / 2

    def _codes(self, ids: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Codes [B, N, Q], those behind a picture's last token arbitrary, and how many count [B]."""
        most, rows = self.config.tokens, [row.flatten() for row in ids]
        for row in rows:
            check_ids(row, self.config.n_embed, 1, most)
        padded = torch.stack([F.pad(row, (0, most - len(row))) for row in rows]).to(self.device)
        return self.network.fsq.decode(padded), torch.tensor([len(row) for row in rows], device=self.device)

    def flow(
        self,
        registers: Tensor,
        noise: Tensor,
        steps: int,
        guidance_scale: float | Callable[[float], float],
        normalised: bool = True,
        precise: bool | None = None,
    ) -> Tensor:
        """Follow the flow: what `FlexTok.read` gives, noise [B, C, h, w] -> scaled latents [B, C, h, w] float32."""
        network, times = self.network, even_times(steps)
        layers, last = network.modulations(torch.tensor(times[:-1], device=noise.device))
        numbers = {time: index for index, time in enumerate(times)}
        guided = callable(guidance_scale) or guidance_scale != 1
        null = network.null(len(noise))
        together = guided and null.shape == registers.shape
        both = torch.cat([registers, null.to(registers.dtype)]) if together else registers
        precise = noise.device.type != "mps" if precise is None else precise
        combine = NormalisedGuidance(precise=precise) if normalised else guide

        def velocity(x: Tensor, time: float) -> Tensor:
            step = numbers[time]
            modulation = [layer[step : step + 1] for layer in layers], last[step : step + 1]
            if not guided:
                return network.velocity(x, registers, modulation)[0]
            if together:
                conditional, unconditional = network.velocity(torch.cat([x, x]), both, modulation)[0].chunk(2)
            else:
                conditional, unconditional = (
                    network.velocity(x, condition, modulation)[0] for condition in (registers, null)
                )
            return combine(
                conditional, unconditional, guidance_scale(time) if callable(guidance_scale) else guidance_scale
            )

        *_, latents = euler(velocity, noise.float(), times)
        return latents
