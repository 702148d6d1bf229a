"""Arguments of a pipeline's call: what each must be, and what stands here for those that other pipelines have."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from argen.bounds import check
from argen.registry import nearest
from argen.words import check_prompt, cut, number_of
from samplers.errors import InvalidValue

STEPS = "tokens take as many steps as there are; of a flow give the sampler's, sampler='sde:steps=40'"
PER_PROMPT = "give num_images_per_prompt, or num_candidates to choose from"
NO_NEGATIVE = "its guidance leads away from no prompt at all, raise or lower guidance_scale"
CALLBACK = "give callback_on_step_end, which gets the pipeline, the step, the decided cells and the tokens"
EMBEDS = "prompts are texts here, give prompt"
INSTEAD = {  # of arguments that other pipelines have
    "negative_prompt": NO_NEGATIVE,
    "height": "its images have one size, or under a control that of size=(width, height)",
    "width": "its images have one size, or under a control that of size=(width, height)",
    "num_inference_steps": STEPS,
    "steps": STEPS,
    "timesteps": STEPS,
    "sigmas": STEPS,
    "latents": "give tokens, with -1 in the cells to fill",
    "image": "to change an image use edit(prompt, image, mask), to follow one control_image",
    "mask_image": "to change an image use edit(prompt, image, mask)",
    "mask": "to change an image use edit(prompt, image, mask)",
    "strength": "to change an image use edit(prompt, image, mask), to follow one control_image with control_strength",
    "seed": "give generator=torch.Generator().manual_seed(SEED)",
    "generators": "give generator, one or a list",
    "num_images": PER_PROMPT,
    "num_samples": PER_PROMPT,
    "n": PER_PROMPT,
    "batch_size": PER_PROMPT,
    "num_beams": "of a model of ordered tokens, e.g. argen/emoji-flextok-ar, use search(prompt, num_beams=4)",
    "callback": CALLBACK,
    "callback_steps": CALLBACK,
    "callback_on_step_end_tensor_inputs": CALLBACK,
    "prompt_embeds": EMBEDS,
    "pooled_prompt_embeds": EMBEDS,
    "prompt_attention_mask": EMBEDS,
    "prompt_2": EMBEDS,
    "negative_prompt_2": NO_NEGATIVE,
    "negative_prompt_embeds": NO_NEGATIVE,
    "negative_pooled_prompt_embeds": NO_NEGATIVE,
    "guidance_rescale": "the logits are guided, which needs no rescaling: leave it out",
    "cfg_scale": "give guidance_scale",
    "cfg": "give guidance_scale",
    "eta": "the noise of tokens has no scale, give temperature",
    "scheduler": "give sampler",
    "sampler_name": "give sampler",
    "sampler_args": "give them behind the sampler's name, e.g. sampler='jacobi:window=8'",
    "conditioning_scale": "give control_strength",
    "controlnet_conditioning_scale": "give control_strength",
    "dtype": "give it to argen.load",
    "device": "give it to argen.load, or call pipe.to(device)",
}


def check_unknown(pipeline: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raises:
    ValueError: an argument that the call of a pipeline does not have; names what stands for it, or what is spelled like it.
    """
    for name in unknown:
        near = nearest(name, known).removeprefix("; ")
        instead = INSTEAD.get(name, near or f"it has {', '.join(known)}")
        raise InvalidValue(f"{name} is not an argument of {pipeline}: {instead}", name)


def check_call(
    prompt: Any,
    num_images_per_prompt: Any = 1,
    num_candidates: Any = None,
    generator: Any = None,
    tokens: Any = None,
    output_type: Any = "pil",
    size: Any = None,
    callback: Any = None,
    sampler: Any = "auto",
    control_image: Any = None,
) -> None:
    """Check the arguments of a call that no other function checks, before anything is drawn.

    Raises:
        ValueError: one of the wrong type, or out of bounds; says what is expected.
    """
    if not _texts(prompt):
        raise InvalidValue(f"prompt is {cut(repr(prompt))}: expected a text, or a list of one or more", "prompt")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise InvalidValue(
            f"unknown output_type {cut(repr(output_type))}: expected pil, np, pt or latent", "output_type"
        )
    check_counts(num_images_per_prompt, num_candidates)
    each = generator if isinstance(generator, list | tuple) else [] if generator is None else [generator]
    if wrong := [one for one in each if not isinstance(one, torch.Generator)]:
        raise InvalidValue(
            f"generator is {cut(repr(wrong[0]))}: expected torch.Generator().manual_seed(SEED), or a list of them",
            "generator",
        )
    if tokens is not None and not isinstance(tokens, Tensor):
        raise InvalidValue(
            f"tokens are a {type(tokens).__name__}: expected a tensor of ids, -1 in the cells to fill", "tokens"
        )
    if size is not None and not (isinstance(size, list | tuple) and len(size) == 2):
        raise InvalidValue(f"size is {cut(repr(size))}: expected (width, height) in pixels", "size")
    if not isinstance(sampler, str) and not callable(sampler):
        raise InvalidValue(
            f"sampler is {cut(repr(sampler))}: expected a name, e.g. 'jacobi:window=8', or a sampler", "sampler"
        )
    controls = control_image if isinstance(control_image, list) else [control_image]
    if wrong := [one for one in controls if one is not None and not isinstance(one, Image.Image)]:
        raise InvalidValue(
            f"control_image is {cut(repr(wrong[0]))}: expected an image of PIL, or a list of them", "control_image"
        )
    if callback is not None and not callable(callback):
        raise InvalidValue(
            f"callback_on_step_end is {cut(repr(callback))}: expected a function", "callback_on_step_end"
        )


def _texts(prompt: Any) -> bool:
    rows = prompt if isinstance(prompt, list | tuple) else [prompt]
    return bool(rows) and all(isinstance(text, str) for text in rows)


def check_counts(num_images_per_prompt: Any, num_candidates: Any) -> None:
    """Raises:
    ValueError: no whole numbers, no image, or fewer candidates than images.
    """
    for name, count in (("num_images_per_prompt", num_images_per_prompt), ("num_candidates", num_candidates)):
        optional = name == "num_candidates" and count is None
        if not optional and (isinstance(count, bool) or not isinstance(count, int | np.integer)):
            raise InvalidValue(f"{name} is {cut(repr(count))}: expected a whole number, 1 or more", name)
    if not 1 <= num_images_per_prompt <= (num_images_per_prompt if num_candidates is None else num_candidates):
        raise InvalidValue(
            f"num_images_per_prompt is {num_images_per_prompt} and num_candidates {num_candidates}: "
            "expected at least 1 image, and at least as many candidates",
            "num_images_per_prompt",
        )


def check_sampling(guidance_scale: Any, temperature: Any, top_k: Any, top_p: Any, by_cell: bool = True) -> None:
    """Check the sampling settings of a call; None leaves one to the model.

    Args:
        by_cell: whether the guidance may be a function of the cell.

    Raises:
        ValueError: one that is not a number, or out of bounds.
    """
    if not (by_cell and callable(guidance_scale)):
        check("guidance_scale", _plain(guidance_scale))
    check("temperature", _plain(temperature))
    check("top_p", _plain(top_p))
    count = _plain(top_k)
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise InvalidValue(f"top_k is {cut(repr(count))}: expected a whole number, 0 (all) or more", "top_k")


def _plain(value: Any) -> Any:
    """A number of NumPy or a tensor of one number as Python's own."""
    is_number = isinstance(value, np.generic) or isinstance(value, Tensor) and value.numel() == 1
    return value.item() if is_number else value


def check_prompts(prompts: list[str], generators: list[torch.Generator]) -> None:
    """Raises:
    ValueError: an empty or too long prompt, or not one generator for each.
    """
    for prompt in dict.fromkeys(prompts):
        check_prompt(prompt)
    if len(generators) != len(prompts):
        counts = number_of(len(generators), "generator"), number_of(len(prompts), "image")
        raise ValueError(f"got {counts[0]} for {counts[1]}: expected one for each")
