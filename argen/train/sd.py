"""Recipe `emoji-sd`: a small Stable Diffusion on the latents of `emoji-vae` (arXiv 2112.10752), for the tools of `argen.diffusion`.

It knows the 65 things of `argen.data.scenes.COMMON`: so small a model that is to draw all of them draws none that is recognised.
Most of its pictures are scenes, so that it counts and binds a little, and fails as the large ones do. In three stages:
`emoji-sd-second` goes on from `emoji-sd` with more scenes, until the things in them are recognised, too; in `emoji-sd-third` half of
the pictures have an end token and padding that say nothing of colours and numbers, because a small network would else read these
from there alone, where a prompt is one blend.
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from argen.data.scenes import COMMON, HUES, NUMBERS
from argen.models.emoji_diffusion import NOISE, SAMPLED, assembled
from argen.models.files import load_network
from argen.train.loop import Recipe, Schedule
from argen.train.tokens import LatentsTask

SCHEDULES = {
    "cpu": Schedule(
        steps=2600, batch_size=64, learning_rate=1.2e-3, warmup=150, weight_decay=0.01, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=80000, batch_size=512, learning_rate=4e-4, weight_decay=0.01),
}
SECOND_SCHEDULES = {
    "cpu": Schedule(
        steps=4200, batch_size=64, learning_rate=1e-3, warmup=100, weight_decay=0.01, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=40000, batch_size=512, learning_rate=3e-4, weight_decay=0.01),
}
THIRD_SCHEDULES = {
    "cpu": Schedule(
        steps=3600, batch_size=64, learning_rate=8e-4, warmup=100, weight_decay=0.01, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=20000, batch_size=512, learning_rate=2e-4, weight_decay=0.01),
}
UNET = {
    "block_out_channels": (176,),  # 8 x 8 latents of 16 channels have nothing to spare: no level below
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": (4,),  # so many heads
    "norm_num_groups": 16,
}
BARE_SHARE, UNSAID = 0.5, {*HUES, *NUMBERS}  # of the third stage; what a bare caption leaves out


def velocity_error(
    noise: DDIMScheduler, network: nn.Module, batch: dict[str, Tensor], states: Tensor | None, **kwargs: Tensor
) -> Tensor:
    """Squared error of a U-Net's velocity prediction for the latents `batch["tokens"]` at `batch["times"]`; `kwargs` are further
    arguments of its forward."""
    noisy = noise.add_noise(batch["tokens"], batch["noise"], batch["times"])
    target = noise.get_velocity(batch["tokens"], batch["noise"], batch["times"])
    prediction = network(noisy, batch["times"], states, **kwargs, return_dict=False)[0]
    return (prediction.float() - target).square()


class StableDiffusionTask(LatentsTask):
    """Args:
    first_stage: folder of a trained `emoji-sd`, to go on from.
    others: see `LatentsTask`.
    """

    scenes_share = 0.7
    only = COMMON

    def __init__(self, data: Path, scenes: Path, vae: Path, clip: Path, first_stage: Path | None = None):
        super().__init__(data, scenes, vae, clip)
        if first_stage is not None:
            model = load_network(UNet2DConditionModel, first_stage)
        else:
            channels, side = self.image_tokens.shape[1:3]
            width = self.clip.config.text_config.hidden_size
            model = UNet2DConditionModel(
                sample_size=side, in_channels=channels, out_channels=channels, cross_attention_dim=width, **UNET
            )
        self.networks: dict[str, nn.Module] = {"model": model.to(memory_format=torch.channels_last)}
        self.noise = DDIMScheduler(**NOISE)

    def text(self, captions: list[str]) -> dict[str, Tensor]:
        """Ids with their padding, all of which is read, as diffusers does."""
        text = self.text_tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return {"input_ids": text.input_ids, "attention_mask": torch.ones_like(text.input_ids)}

    def more(self, tokens: Tensor, images: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise, and a time for each picture."""
        times = torch.randint(self.noise.config.num_train_timesteps, (len(tokens),), generator=generator)
        return {"times": times, "noise": torch.randn(tokens.shape, generator=generator)}

    def error(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        states, _ = self.encode_text(batch)
        return velocity_error(self.noise, network, batch, states)

    def pipeline(self) -> StableDiffusionPipeline:
        return assembled(self._model(), self.vae.vae, self.clip, self.text_tokenizer)

    def pipeline_kwargs(self) -> dict:
        return super().pipeline_kwargs() | SAMPLED


class ThirdStableDiffusionTask(StableDiffusionTask):
    """The third stage: `BARE_SHARE` of the pictures are read with the end token and the padding of a caption without colours and
    numbers."""

    def text(self, captions: list[str]) -> dict[str, Tensor]:
        """Also the ids of the captions without colours and numbers."""
        bare = [" ".join(word for word in caption.split() if word not in UNSAID) for caption in captions]
        return super().text(captions) | {"bare_ids": super().text(bare)["input_ids"]}

    def more(self, tokens: Tensor, images: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Also which are read with a bare end."""
        batch = super().more(tokens, images, scenes, generator)
        return batch | {"bare": torch.rand(len(tokens), generator=generator) < BARE_SHARE}

    def encode_text(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        states, mask = super().encode_text(batch)
        bare, _ = super().encode_text(batch | {"input_ids": batch["bare_ids"]})
        ended = (batch["input_ids"] == self.text_tokenizer.eos_token_id).cumsum(dim=1) > 0
        return torch.where((ended & batch["bare"][:, None])[..., None], bare, states), mask


RECIPE = Recipe(StableDiffusionTask, SCHEDULES, takes=("scenes", "vae", "clip"))
SECOND_RECIPE = Recipe(
    StableDiffusionTask, SECOND_SCHEDULES, takes=("scenes", "vae", "clip", "generator"), start="emoji-sd"
)
THIRD_RECIPE = Recipe(
    ThirdStableDiffusionTask, THIRD_SCHEDULES, takes=("scenes", "vae", "clip", "generator"), start="emoji-sd"
)
