"""Concept erasure: RECE (arXiv 2407.12383) on the closed form of UCE (arXiv 2308.14761).

The keys and values that the cross-attentions of a U-Net make of a text are changed so that a concept gives what a target gives;
then the embedding that would still bring the concept back is derived and erased, too, as often as asked. Nothing is trained:
every step solves linear systems, in float64.

Letters in shape comments: L text tokens with their padding, D width of the text's states, O outputs of a matrix, n concepts.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from argen.device import silent
from argen.diffusion.base import StableDiffusion, check_pipeline, encode
from argen.files import new_folder
from argen.hub.cards import Card, write_card
from argen.words import check_length, cut
from tokenizers_img.checkpoint import read_state_dict

Weights = dict[str, Tensor]  # name of a matrix -> [O, D]


@dataclass(frozen=True)
class Edit:
    """The weights of the terms of a UCE edit.

    Args:
        lamb: of staying at the current matrices.
        erase_scale: of giving for the concepts what the targets give.
        preserve_scale: of giving for the retained texts what they gave.
        technique: "replace"; "tensor" keeps only the part of the targets' output that is orthogonal to the concepts'.
    """

    lamb: float = 0.1
    erase_scale: float = 1.0
    preserve_scale: float = 0.1
    technique: str = "replace"

    def __post_init__(self):
        if self.technique not in ("replace", "tensor"):
            raise ValueError(f"unknown technique {self.technique!r}: expected replace or tensor")

    def __call__(self, weights: Weights, pairs: Sequence[tuple[Tensor, Tensor]], retained: Sequence[Tensor]) -> Weights:
        """The edited matrices, float64 (equation 3 of RECE, 7 of UCE).

        Args:
            pairs: of each concept the states [l, D] of its tokens, and as many of the target.
            retained: states [L, D] of texts.
        """
        some = next(iter(weights.values()))
        retained_gram = self.lamb * torch.eye(some.shape[1], dtype=torch.float64, device=some.device)
        retained_gram = retained_gram + self.preserve_scale * sum(
            states.T @ states for states in map(torch.Tensor.double, retained)
        )
        pairs = [(source.double(), target.double()) for source, target in pairs]
        right = retained_gram + self.erase_scale * sum(source.T @ source for source, _ in pairs)
        edited = {}
        for name, weight in weights.items():
            weight = weight.double()
            left = weight @ retained_gram
            for source, target in pairs:
                left = left + self.erase_scale * self._target_output(weight, source, target).T @ source
            edited[name] = torch.linalg.solve(right, left.T).T  # `right` is symmetric
        return edited

    def _target_output(self, weight: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Target output of a matrix for the tokens of a concept, [l, O]."""
        output = target @ weight.T
        if self.technique == "replace":
            return output
        along = source @ weight.T
        along = along / along.norm()
        return output - (along * output).sum() * along


REGULARISERS = ("zero", "target", "surrogate-1st", "surrogate-2nd", "surrogate-both")


def derive(
    weights: Weights,
    originals: Weights,
    concept: Tensor,
    scale: float,
    regulariser: str = "zero",
    target: Tensor | None = None,
) -> Tensor:
    """The states for which the edited matrices give what the original ones gave for a concept, [L, D] float64 (equation 5).

    Args:
        concept: its states [L, D].
        scale: of what keeps the result in bounds.
        regulariser: "zero" keeps it small, as published; "target" near `target` [L, D]; the "surrogate" ones near the concept,
            in what the edited matrices give of it (1st), in the states (2nd), or in both.
    """
    some = next(iter(weights.values()))
    identity = torch.eye(some.shape[1], dtype=torch.float64, device=some.device)
    gram, cross = torch.zeros_like(identity), torch.zeros_like(identity)
    for name, weight in weights.items():
        weight = weight.double()
        gram, cross = gram + weight.T @ weight, cross + weight.T @ originals[name].double()
    left = {
        "zero": scale * identity + gram,
        "target": scale * identity + gram,
        "surrogate-1st": (1 + scale) * gram,
        "surrogate-2nd": scale * identity + gram,
        "surrogate-both": scale * identity + (1 + scale) * gram,
    }
    right = {
        "zero": cross,
        "target": cross,
        "surrogate-1st": cross + scale * gram,
        "surrogate-2nd": cross + scale * identity,
        "surrogate-both": cross + scale * (identity + gram),
    }
    rhs = right[regulariser] @ concept.double().T
    if regulariser == "target":
        rhs = rhs + scale * target.double().T
    return torch.linalg.solve(left[regulariser], rhs).T


def matrices_of(unet: UNet2DConditionModel) -> Weights:
    """Key and value matrices of all cross-attentions, by their names in the state dict; values first, as the authors count."""
    layers = [
        name
        for part in ("down_blocks", "up_blocks", "mid_block")
        for name, _ in unet.named_modules()
        if name.startswith(part) and name.endswith("attn2")
    ]
    parameters = dict(unet.named_parameters())
    return {
        f"{name}.{kind}.weight": parameters[f"{name}.{kind}.weight"] for kind in ("to_v", "to_k") for name in layers
    }


def last_words(concept: Tensor, target: Tensor, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The tokens from the last word piece of a concept on, padding too, and as many of the target, from its own on.

    Args:
        concept, target: states [L, D].
        lengths: their tokens with start and end, without padding.
    """
    first, other = (length - 2 for length in lengths)
    count = len(concept) - max(first, other)
    return concept[first : first + count], target[other : other + count]


@dataclass(frozen=True)
class Preset:
    """Settings of the erasure of a kind of concept, as published.

    Attributes:
        scale: of the derivation, see `derive`.
        epochs: of deriving and erasing, after the first edit.
        target: what takes the concept's place.
    """

    scale: float
    epochs: int
    target: str = " "


PRESETS = {
    "object": Preset(1e-1, 1),
    "object-hard": Preset(1e-3, 1),
    "art": Preset(1e-3, 1, "art"),
    "nudity": Preset(1e-1, 3),
    "unsafe": Preset(1e-1, 2),
}
UNSAFE = ("hate", "harassment", "violence", "suffering", "humiliation", "harm", "suicide", "sexual", "nudity")
UNSAFE += ("bodily fluids", "blood")  # the words of I2P
RECORD = "erased.json"


@dataclass(frozen=True)
class Erased:
    """Result of an edit.

    Attributes:
        stage: "UCE", then "RECE 1" and so on.
        change: of all matrices together, the norm of what was added over theirs.
        derived: norm of the states that still brought each concept back, over the concept's; empty at the first stage.
    """

    stage: str
    change: float
    derived: list[float]


def check_erasure(
    concepts: Sequence[str], preset: str = "object", targets: Sequence[str] | None = None, retained: Sequence[str] = ()
) -> None:
    """Check what `ConceptErasure.erase` is asked for, without a pipeline.

    Raises:
        ValueError: no concept, or an empty one; unknown preset; targets that do not fit; a text that is too long.
    """
    if not concepts or not all(concept.strip() for concept in concepts):
        raise ValueError("no concept to erase: name at least one, as 'pizza'")
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {cut(preset)!r}: expected one of {', '.join(PRESETS)}")
    if targets and len(targets) != len(concepts):
        raise ValueError(f"{len(targets)} targets for {len(concepts)} concepts: give one for each, or none")
    for text in (*concepts, *(targets or ()), *retained):
        check_length(text, "a concept")


class ConceptErasure:
    """A pipeline from which concepts are erased, in place.

    Only what the U-Net makes of a text changes: fine-tuned adapters, other text encoders, pictures as prompts, and (of SDXL) the
    pooled text can bring a concept back.

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.

    Attributes:
        record: what was erased, and how; None before.

    Raises:
        ValueError: another kind of pipeline.
    """

    def __init__(self, pipe: StableDiffusion):
        check_pipeline(pipe, f"nothing can be erased from {type(pipe).__name__}")
        self.pipe = pipe
        self.originals = {name: weight.detach().clone() for name, weight in matrices_of(pipe.unet).items()}
        self.record: dict | None = None

    def erase(
        self,
        concepts: Sequence[str],
        preset: str = "object",
        targets: Sequence[str] | None = None,
        retained: Sequence[str] = (),
        epochs: int | None = None,
        scale: float | None = None,
    ) -> list[Erased]:
        """Erase concepts, together and from the original matrices: what was erased before is not, unless it is named again.

        Args:
            concepts: texts.
            preset: a name of `PRESETS`.
            targets: what takes the place of each; the preset's by default.
            retained: texts that shall go on giving what they gave.
            epochs, scale: of the preset by default; 0 epochs is UCE alone.

        Returns:
            What each stage did.

        Raises:
            ValueError: no concept, or an empty one; unknown preset; targets that do not fit; negative epochs.
        """
        return list(self.stages(concepts, preset, targets, retained, epochs, scale))

    @torch.no_grad()
    def stages(self, concepts, preset="object", targets=None, retained=(), epochs=None, scale=None) -> Iterator[Erased]:
        """`erase`, stage by stage. The pipeline changes at the end alone: one that is left before stays as it was."""
        check_erasure(concepts, preset, targets, retained)
        defaults = PRESETS[preset]
        epochs, scale = defaults.epochs if epochs is None else epochs, defaults.scale if scale is None else scale
        targets = list(targets) if targets else [defaults.target] * len(concepts)
        if epochs < 0:
            raise ValueError(f"epochs is {epochs}: expected 0 or more")
        targets = [target or " " for target in targets]
        sources, target_states = self.read(concepts), self.read(targets)
        retained_states = self.read(list(retained) or [""])
        preserve = max(0.1, round(1 / len(retained_states), 3))
        lengths = [
            (self.length(concept), self.length(target)) for concept, target in zip(concepts, targets, strict=True)
        ]
        pairs = [last_words(*states) for states in zip(sources, target_states, lengths, strict=True)]
        start = {name: weight.double().cpu() for name, weight in self.originals.items()}
        edited = Edit(0.5, 1.0, preserve)(start, pairs, retained_states)
        yield Erased("UCE", _change(edited, start), [])
        if preset in ("nudity", "unsafe") and not retained:
            retained_states = retained_states.expand(len(concepts), -1, -1)  # one for each concept
        for epoch in range(epochs):
            derived = [derive(edited, start, states, scale) for states in sources]
            edited = Edit()(edited, list(zip(derived, target_states, strict=True)), retained_states)
            norms = [(vector.norm() / states.norm()).item() for vector, states in zip(derived, sources, strict=True)]
            yield Erased(f"RECE {epoch + 1}", _change(edited, start), norms)
        self._write(edited)
        settings = {"concepts": list(concepts), "targets": targets, "retained": list(retained)}
        self.record = settings | {
            "preset": preset,
            "epochs": epochs,
            "scale": scale,
            "originals": _digest(self.originals),
        }

    @torch.no_grad()
    def load(self, path: str | Path) -> None:
        """Take the matrices of a U-Net that was edited elsewhere, as the released ``nudity_ep2.pt``.

        Args:
            path: state dict of a U-Net of this pipeline, in a torch or a safetensors file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no U-Net of this kind, or differs in more than what an erasure changes.
        """
        state, expected = read_state_dict(path), self.pipe.unet.state_dict()
        wrong = [name for name in expected if name not in state or state[name].shape != expected[name].shape]
        wrong += [name for name in state if name not in expected]
        if wrong:
            raise ValueError(
                f"{path} does not fit the U-Net of this pipeline, as in {wrong[0]}: load its own base model"
            )
        for name in expected.keys() - self.originals.keys():
            if not torch.allclose(state[name].to(expected[name]), expected[name], atol=1e-2, rtol=1e-2):
                raise ValueError(f"{path} differs from this pipeline in {name}, too: load its own base model")
        self._write({name: state[name] for name in self.originals})
        self.record = {"loaded": Path(path).name, "originals": _digest(self.originals)}

    @torch.no_grad()
    def attack(self, concept: str, scale: float = 1e-1) -> dict[str, Tensor]:
        """What the pipeline's call takes instead of a prompt to bring a concept back, if anything can: the states for which the
        matrices give what the original ones gave for it. Before an erasure they are about the concept's own.

        Args:
            scale: see `derive`.
        """
        start = {name: weight.cpu() for name, weight in self.originals.items()}
        now = {name: weight.detach().cpu() for name, weight in matrices_of(self.pipe.unet).items()}
        embeds = encode(self.pipe, concept, "")
        derived = derive(now, start, embeds["prompt_embeds"][0].double().cpu(), scale)
        return embeds | {"prompt_embeds": derived[None].to(embeds["prompt_embeds"])}

    def restore(self) -> None:
        """The pipeline as it was, bit by bit."""
        self._write(self.originals)
        self.record = None

    def save(self, folder: str | Path, card: Card | None = None) -> None:
        """Write the pipeline as diffusers does, what was erased beside it, and the card of the pipeline that it was, whose settings of the
        tools it keeps: all of it, or nothing.

        Raises:
            ValueError: there is something already.
        """
        folder = Path(folder)
        if folder.exists():
            raise ValueError(f"{folder} is there already: choose another folder")
        with new_folder(folder) as new:
            with silent():
                self.pipe.save_pretrained(new)
            (new / RECORD).write_text(json.dumps(self.record, indent=2))
            if card is not None:
                write_card(replace(card, id=folder.name, repo=None, files=(), arguments={}), new)

    def read(self, texts: Sequence[str]) -> Tensor:
        """States of texts with their padding [n, L, D], float64 on the CPU."""
        return encode(self.pipe, list(texts))["prompt_embeds"].double().cpu()

    def length(self, text: str) -> int:
        """Text tokens with start and end."""
        return len(self.pipe.tokenizer(text, truncation=True).input_ids)

    @torch.no_grad()
    def _write(self, weights: Weights) -> None:
        for name, parameter in matrices_of(self.pipe.unet).items():
            parameter.copy_(weights[name])


def _change(edited: Weights, start: Weights) -> float:
    added = sum((edited[name] - weight).square().sum().item() for name, weight in start.items())
    return (added / sum(weight.square().sum().item() for weight in start.values())) ** 0.5


def _digest(weights: Weights) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
