"""Semantic binding: each object of a prompt and its attributes share one token (ToMe, arXiv 2411.07132, NeurIPS 2024).

Not the ToMe that merges the tokens of a ViT for speed. Works on Stable Diffusion 1.x, 2.x and SDXL pipelines of diffusers as
they are: by prompt embeddings, a hook before the U-Net and recording attention processors, all taken away again at the end.

Letters in shape comments: L text tokens with padding, D width of their states, K groups, C h w a latent.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from argen.diffusion.base import StableDiffusion, check_pipeline, encode, frozen, unit_noise
from argen.diffusion.prompts import Binding, parse, token_positions
from argen.words import cut

NOUN_WEIGHT, MODIFIER_WEIGHT = 1.1, 1.2  # of the authors' code; the paper has a plain sum
THRESHOLDS = (
    26.0,
    25.0,
    24.0,
    23.0,
    22.5,
    22.0,
    21.5,
    21.0,
)  # of two groups on 32 x 32 maps, by step; the last one holds on
BINDING_SCALE = 10000.0  # of the binding loss


@dataclass(frozen=True)
class BindingSettings:
    """Settings of the binding; names as in the authors' code.

    Args:
        tome_control_steps: in so many first steps the composite tokens, and the maps of attention, are refined.
        token_refinement_steps: gradient steps on a composite token, each time.
        attention_refinement_steps: gradient steps on the maps, each time: above 0.9 of the noise's times, and below.
        eot_replace_step: from this step on the end token and the padding are those of the merged prompt; None for never.
        use_pose_loss: objects stand side by side, in the order of the prompt.
        scale_factor, scale_range: size of the steps on the maps, and its course over all steps.
        thresholds: of the entropy, by step; it is refined no further below. None for those of the authors, at any resolution.
        gentle: composite tokens are no longer than the noun's own, and the modifiers stay: for networks too small for what they were
            not trained on; not in the paper.
    """

    tome_control_steps: tuple[int, int] = (5, 5)
    token_refinement_steps: int = 3
    attention_refinement_steps: tuple[int, int] = (4, 4)
    eot_replace_step: int | None = None
    use_pose_loss: bool = False
    scale_factor: float = 3.0
    scale_range: tuple[float, float] = (1.0, 0.0)
    thresholds: tuple[float, ...] | None = None
    gentle: bool = False


PRESETS = {
    "attribute": BindingSettings(),
    "object": BindingSettings((7, 7), 3, (6, 6), 0, True),
    "merge": BindingSettings((0, 0), eot_replace_step=0),  # no gradients: fast, and all that few-step models take
    "gentle": BindingSettings((0, 0), gentle=True),
}


def merged_tokens(
    states: Tensor, groups: Sequence[tuple[Sequence[int], Sequence[int]]], gentle: bool = False
) -> Tensor:
    """States of a prompt [L, D] -> those where each group's noun holds all of it; the other tokens of a group are zero.

    Args:
        groups: token positions of each noun and of its modifiers.
        gentle: see `BindingSettings`.
    """
    states = states.clone()
    for noun, modifiers in groups:
        noun_state, modifier_state = states[list(noun)].sum(dim=0), states[list(modifiers)].sum(dim=0)
        if gentle:
            states[noun[0]] = (
                (noun_state + modifier_state) * states[noun[0]].norm() / (noun_state + modifier_state).norm()
            )
            continue
        states[[*noun, *modifiers]] = 0
        states[noun[0]] = NOUN_WEIGHT * noun_state + MODIFIER_WEIGHT * modifier_state
    return states


def entropy_loss(maps: Tensor, nouns: Sequence[int], end: int, pose: bool = False) -> Tensor:
    """Entropy of the attention to each composite token.

    Args:
        maps: attention of each place to each token [h, w, L], probabilities.
        nouns: token positions.
        end: position of the end token.
        pose: adds how far the objects are from standing side by side.
    """
    shares = (maps[:, :, 1:end] / 0.5).softmax(dim=-1)
    loss = maps.new_zeros(())
    for index, noun in enumerate(nouns):
        attention = shares[:, :, noun - 1]
        extent = attention.max() - attention.min()
        attention = (attention - attention.min()) / extent if extent > 0 else torch.ones_like(attention)
        attention = attention / attention.sum()
        loss = loss - 2 * (attention * (attention + 1e-5).log()).sum()
        if pose:
            rows, columns = (torch.linspace(0, 1, n, device=maps.device, dtype=maps.dtype) for n in attention.shape)
            centre = 32 * torch.stack([(attention.sum(dim=0) * columns).sum(), (attention.sum(dim=1) * rows).sum()])
            across = (10, 25)[index] if len(nouns) == 2 else 32 * (index + 0.5) / len(nouns)
            loss = loss + 0.2 * (centre - centre.new_tensor([across, 16])).square().mean()
    return loss


class Recorder:
    """An attention processor that keeps the probabilities while it is asked to."""

    def __init__(self):
        self.maps: list[Tensor] | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        query, key, value = (attn.head_to_batch_dim(part) for part in parts)
        shares = attn.get_attention_scores(query, key, attention_mask)
        if self.maps is not None:
            self.maps.append(shares)
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(shares, value))))


def recorded_layers(pipe) -> list[str]:
    """The cross-attentions whose maps are refined: of SDXL those of the authors, else those of the first up-block that has some,
    both at a quarter of the latent's size."""
    names = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    if isinstance(pipe, StableDiffusionXLPipeline):
        return [f"up_blocks.0.attentions.1.transformer_blocks.{index}.attn2.processor" for index in (1, 2, 3)]
    ups = [name for name in names if name.startswith("up_blocks")]
    first = min(name.split(".")[1] for name in ups)
    return [name for name in ups if name.split(".")[1] == first]


@dataclass
class BindingStep:
    """Losses of a step: of each group's token, and of the maps."""

    semantic: list[list[float]] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)


def check_settings(name: str) -> str:
    """Raises:
    ValueError: no settings in `PRESETS` have this name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown settings {cut(name)!r}: expected one of {', '.join(PRESETS)}")
    return name


class SemanticBinding:
    """A pipeline whose prompts are bound; the pipeline itself stays as it is.

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.

    Attributes:
        binding: of the last call, how its prompt was understood.
        history: of the last call, a `BindingStep` for each step of the sampler.

    Raises:
        ValueError: another kind of pipeline.
    """

    def __init__(self, pipe: StableDiffusion):
        check_pipeline(pipe, f"{type(pipe).__name__} cannot be bound")
        self.pipe = pipe
        self.binding: Binding | None = None
        self.history: list[BindingStep] = []

    def __call__(
        self,
        prompt: str | Binding,
        bind: Mapping[str, str | Sequence[str]] | None = None,
        settings: str | BindingSettings = "attribute",
        negative_prompt: str = "",
        guidance_scale: float = 7.5,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        **others,
    ):
        """One picture.

        Args:
            prompt, bind: see `parse`; or what that gave, corrected.
            settings: a name of `PRESETS`, or settings.
            guidance_scale: above 1, unless the settings refine nothing.
            latents: unit noise [1, C, h, w]; drawn by `generator` by default, as the pipeline would.
            others: of the pipeline's call, as num_inference_steps and output_type.

        Returns:
            What the pipeline returns.

        Raises:
            ValueError: nothing to bind; unknown settings; no guidance.
        """
        if isinstance(settings, str):
            settings = PRESETS[check_settings(settings)]
        if max(settings.tome_control_steps) and guidance_scale <= 1:
            raise ValueError(f"guidance_scale is {guidance_scale}: expected above 1, or the settings merge")
        self.binding = prompt if isinstance(prompt, Binding) else parse(prompt, bind)
        run = BindingRun(self.pipe, self.binding, settings, negative_prompt, guidance_scale, generator, latents)
        self.history = run.history
        with run.attached():
            return self.pipe(
                **run.embeddings, latents=run.latents, guidance_scale=guidance_scale, generator=generator, **others
            )


class BindingRun:
    """One call of a pipeline, bound: what its U-Net is asked is changed in a hook before it. See `SemanticBinding`."""

    def __init__(self, pipe, binding, settings, negative_prompt, guidance_scale, generator, latents):
        self.pipe, self.settings, self.guidance_scale = pipe, settings, guidance_scale
        tokenizer = pipe.tokenizer
        self.end = len(tokenizer(binding.prompt, truncation=True).input_ids) - 1
        self.first_replaced = self.end if binding.length is None else binding.length + 1
        self.groups = binding.positions or [
            tuple(token_positions(tokenizer, binding.prompt, part) for part in (group.noun, group.modifiers))
            for group in binding.groups
        ]
        if max(position for group in self.groups for part in group for position in part) >= self.end:
            raise ValueError(f"the prompt has more than {self.end} text tokens: bind what stands before")
        encoded = encode(pipe, binding.prompt, negative_prompt)
        self.anchors = [encode(pipe, group.anchor)["prompt_embeds"][0] for group in binding.groups]
        self.padding = encode(pipe, binding.merged)["prompt_embeds"][0, self.first_replaced :]
        states = merged_tokens(encoded["prompt_embeds"][0].float(), self.groups, settings.gentle)
        self.embeddings = encoded | {"prompt_embeds": states[None].to(encoded["prompt_embeds"].dtype)}
        self.latents = unit_noise(pipe, generator) if latents is None else latents
        self.history: list[BindingStep] = []
        self.recorder = Recorder()
        self.states: Tensor | None = None  # [2, L, D] float32: without the prompt, and with it
        self.busy = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The pipeline with the hook and the recorder; afterwards it is what it was, whatever happened."""
        unet = self.pipe.unet
        before = unet.attn_processors
        layers = recorded_layers(self.pipe) if max(self.settings.tome_control_steps) else []
        unet.set_attn_processor(
            {name: self.recorder if name in layers else processor for name, processor in before.items()}
        )
        hook = unet.register_forward_pre_hook(self.before_unet, with_kwargs=True)
        try:
            with frozen(unet):
                yield
        finally:
            hook.remove()
            unet.set_attn_processor(before)

    def before_unet(self, unet, args, kwargs):
        """Changes what the pipeline asks the U-Net for a step."""
        if self.busy:
            return None
        self.busy = True
        try:
            (sample, time, *rest), index = args, len(self.history)
            states = kwargs["encoder_hidden_states"]
            if index == 0:
                self.states = states.float()
                start = self.latents.to(states.device).float() * self.pipe.scheduler.init_noise_sigma
                self.paths = [(start, copy.deepcopy(self.pipe.scheduler)) for _ in self.groups]
            self.history.append(BindingStep())
            positive = sample[-1:].float()
            if index == self.settings.eot_replace_step:
                self.states = self.states.clone()
                self.states[-1, self.first_replaced :] = self.padding.float()
            added = kwargs.get("added_cond_kwargs")
            if index < self.settings.tome_control_steps[0]:
                self.bind(index, time, added)
            if index < self.settings.tome_control_steps[1]:
                positive = self.focus(index, time, positive, added)
            sample = positive.expand_as(sample).to(sample.dtype)
            return (sample, time, *rest), kwargs | {"encoder_hidden_states": self.states.to(states.dtype)}
        finally:
            self.busy = False

    def unet(self, sample: Tensor, time: Tensor, states: Tensor, added: dict[str, Tensor] | None) -> Tensor:
        """The U-Net's prediction for one picture [1, C, h, w] and states [1, n, D], float32; SDXL sees no pooled text here."""
        dtype = self.pipe.unet.dtype
        if added is not None:
            added = {"text_embeds": torch.zeros_like(added["text_embeds"][-1:]), "time_ids": added["time_ids"][-1:]}
        kwargs = {"encoder_hidden_states": states.to(dtype), "added_cond_kwargs": added}
        return self.pipe.unet(sample.to(dtype), time, **kwargs, return_dict=False)[0].float()

    def bind(self, index: int, time: Tensor, added: dict[str, Tensor] | None) -> None:
        """Each composite token alone is to give what its anchor gives, on a path of its own."""
        for number, (noun, _) in enumerate(self.groups):
            path, scheduler = self.paths[number]
            path = scheduler.scale_model_input(path, time)
            with torch.no_grad():
                target = self.unet(path, time, self.anchors[number][None], added)
            token, losses = self.states[-1, noun[0]], []
            for _ in range(self.settings.token_refinement_steps):
                with torch.enable_grad():
                    token = token.detach().requires_grad_()
                    loss = (target - self.unet(path, time, token[None, None], added)).square().mean()
                    (slope,) = torch.autograd.grad(BINDING_SCALE * loss, token)
                token = (token - slope).detach()
                losses.append(loss.item())
            self.history[index].semantic.append(losses)
            self.states = self.states.clone()
            self.states[-1, noun[0]] = token
            with torch.no_grad():
                uncond = self.unet(path, time, self.states[:1], added)
            guided = uncond + self.guidance_scale * (uncond - target)  # away from the anchor, as in the authors' code
            self.paths[number] = scheduler.step(guided, time, path, return_dict=False)[0], scheduler

    def focus(self, index: int, time: Tensor, sample: Tensor, added: dict[str, Tensor] | None) -> Tensor:
        """Each composite token is to be looked at from one place; the refined sample [1, C, h, w], for this prediction only."""
        settings, steps = self.settings, len(self.pipe.scheduler.timesteps)
        most = settings.attention_refinement_steps[0 if time / 1000 > 0.9 else 1]
        first, last = settings.scale_range
        rate = settings.scale_factor * (first + (last - first) * index / max(1, steps - 1))
        states = self.states
        for _ in range(most):
            with torch.enable_grad():
                sample, states = sample.detach().requires_grad_(), states.detach().requires_grad_()
                maps = self.maps(sample, time, states, added)
                loss = entropy_loss(maps, [noun[0] for noun, _ in self.groups], self.end, settings.use_pose_loss)
                slopes = torch.autograd.grad(loss, (sample, states))
            sample, states = (sample - 0.5 * rate * slopes[0]).detach(), (states - rate * slopes[1]).detach()
            self.history[index].entropy.append(loss.item())
            if loss.item() < self.threshold(index, maps.shape[:2].numel()):
                break
        self.states = states
        return sample

    def threshold(self, index: int, places: int) -> float:
        """Below it the maps are refined no further in this step."""
        thresholds = self.settings.thresholds
        scale = math.log(places) / math.log(32**2) if thresholds is None else 1.0
        thresholds = thresholds or THRESHOLDS
        return scale * thresholds[min(index, len(thresholds) - 1)] / 2 * len(self.groups) - 2

    def maps(self, sample: Tensor, time: Tensor, states: Tensor, added: dict[str, Tensor] | None) -> Tensor:
        """Attention of each place to each token [h, w, L], mean of layers and heads."""
        self.recorder.maps = []
        self.unet(sample, time, states[-1:], added)
        layers, self.recorder.maps = self.recorder.maps, None
        mean = torch.stack([layer.float().mean(dim=0) for layer in layers]).mean(dim=0)
        height, width = sample.shape[2:]
        rows = round(math.sqrt(len(mean) * height / width))
        return mean.unflatten(0, (rows, len(mean) // rows))
