"""What the tools ask of a pipeline of diffusers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

StableDiffusion = StableDiffusionPipeline | StableDiffusionXLPipeline


def check_pipeline(pipe: StableDiffusion, refusal: str) -> None:
    """Raises:
    ValueError: `refusal`, of another kind of pipeline.
    """
    if not isinstance(pipe, StableDiffusion):
        raise ValueError(f"{refusal}: expected a StableDiffusionPipeline or a StableDiffusionXLPipeline")


@torch.no_grad()
def encode(pipe: StableDiffusion, prompt: str | Sequence[str], negative_prompt: str | None = None) -> dict[str, Tensor]:
    """Embeddings of one or more prompts for the pipeline's call, with their padding; and of the negative prompt, if given."""
    kwargs = {"device": pipe._execution_device, "num_images_per_prompt": 1}
    guided = negative_prompt is not None
    embeds = pipe.encode_prompt(
        prompt=prompt, negative_prompt=negative_prompt, do_classifier_free_guidance=guided, **kwargs
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: value for name, value in zip(names, embeds, strict=False) if value is not None}


def unit_noise(pipe: StableDiffusion, generator: torch.Generator | None) -> Tensor:
    """Noise [1, C, h, w] of a picture of the pipeline's own size, as the pipeline would draw it."""
    config = pipe.unet.config
    sides = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    return randn_tensor((1, config.in_channels, *sides), generator, pipe._execution_device, pipe.unet.dtype)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """The modules gather no gradients; afterwards those of their parameters do that did before."""
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
