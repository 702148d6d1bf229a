"""Concept erasure: RECE (arXiv 2407.12383) on the closed form of UCE (arXiv 2308.14761).

The keys and values that the cross-attentions of a U-Net make of a text are changed so that a concept gives what a target gives;
then the embedding that would still bring the concept back is derived and erased, too, as often as asked. Nothing is trained:
every step solves linear systems, in float64.

Letters in shape comments: L text tokens with their padding, D width of the text's states, O outputs of a matrix, n concepts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

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
        kept = self.lamb * torch.eye(some.shape[1], dtype=torch.float64, device=some.device)
        kept = kept + self.preserve_scale * sum(states.T @ states for states in map(torch.Tensor.double, retained))
        pairs = [(source.double(), target.double()) for source, target in pairs]
        right = kept + self.erase_scale * sum(source.T @ source for source, _ in pairs)
        edited = {}
        for name, weight in weights.items():
            weight = weight.double()
            left = weight @ kept
            for source, target in pairs:
                left = left + self.erase_scale * self._wanted(weight, source, target).T @ source
            edited[name] = torch.linalg.solve(right, left.T).T  # `right` is symmetric
        return edited

    def _wanted(self, weight: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """What a matrix is to give for the tokens of a concept, [l, O]."""
        wanted = target @ weight.T
        if self.technique == "replace":
            return wanted
        along = source @ weight.T
        along = along / along.norm()
        return wanted - (along * wanted).sum() * along


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
    one = torch.eye(some.shape[1], dtype=torch.float64, device=some.device)
    gram, cross = torch.zeros_like(one), torch.zeros_like(one)
    for name, weight in weights.items():
        weight = weight.double()
        gram, cross = gram + weight.T @ weight, cross + weight.T @ originals[name].double()
    left = {
        "zero": scale * one + gram,
        "target": scale * one + gram,
        "surrogate-1st": (1 + scale) * gram,
        "surrogate-2nd": scale * one + gram,
        "surrogate-both": scale * one + (1 + scale) * gram,
    }
    right = {
        "zero": cross,
        "target": cross,
        "surrogate-1st": cross + scale * gram,
        "surrogate-2nd": cross + scale * one,
        "surrogate-both": cross + scale * (one + gram),
    }
    wanted = right[regulariser] @ concept.double().T
    if regulariser == "target":
        wanted = wanted + scale * target.double().T
    return torch.linalg.solve(left[regulariser], wanted).T


def matrices_of(unet: UNet2DConditionModel) -> Weights:
    """Key and value matrices of all cross-attentions, by their names in the state dict; values first, as the authors count."""
    layers = [
        name
        for part in ("down_blocks", "up_blocks", "mid_block")
        for name, _ in unet.named_modules()
        if name.startswith(part) and name.endswith("attn2")
    ]
    found = dict(unet.named_parameters())
    return {f"{name}.{kind}.weight": found[f"{name}.{kind}.weight"] for kind in ("to_v", "to_k") for name in layers}


def last_words(concept: Tensor, target: Tensor, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The tokens from the last word piece of a concept on, padding too, and as many of the target, from its own on.

    Args:
        concept, target: states [L, D].
        lengths: their tokens with start and end, without padding.
    """
    first, other = (length - 2 for length in lengths)
    count = len(concept) - max(first, other)
    return concept[first : first + count], target[other : other + count]
