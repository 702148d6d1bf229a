"""Recipe `emoji-drafter`: the EAGLE drafter of `emoji-llamagen`, trained on the hidden states of that generator."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argen.models.drafter import Drafter
from argen.models.files import load_network
from argen.models.layers import causal_mask
from argen.models.llamagen import LlamaGen
from argen.pipelines.llamagen import LlamaGenPipeline
from argen.train.llamagen import LlamaGenTask
from argen.train.loop import Recipe, Schedule

SCHEDULES = {
    "cpu": Schedule(steps=2000, batch_size=64, learning_rate=2e-3, warmup=60, weight_decay=0.01, betas=(0.9, 0.95)),
    "gpu": Schedule(steps=10000, batch_size=512, learning_rate=1e-3, weight_decay=0.01, betas=(0.9, 0.95)),
}
HIDDEN = 512  # of the feed-forward layer
NOISE = 0.2  # what the hidden states that are read are off by lies in a range so wide, as guesses will be off, too
TOKENS_SHARE = 1.0  # of the loss on the tokens' distribution, beside that on the hidden states


class DraftTask(LlamaGenTask):
    """Args:
    generator: folder of a trained `emoji-llamagen`.
    others: see `TokensTask`.
    """

    def __init__(self, data: Path, scenes: Path, tokenizer: Path, clip: Path, generator: Path):
        super().__init__(data, scenes, tokenizer, clip)
        self.target = load_network(LlamaGen, generator).requires_grad_(False)
        config = self.target.config
        model = Drafter(config.n_embed, config.grid, config.dim, config.heads, HIDDEN)
        model.embed_tokens.weight.data = self.target.tok_embeddings.weight.data.clone()
        self.networks: dict[str, nn.Module] = {"model": model}

    def generator(self) -> LlamaGen:
        return self.target

    @torch.no_grad()
    def hidden(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The target's hidden states of the condition [B, T, D], and those [B, N, D] that lead to each token of the batch."""
        target, tokens = self.target.to(batch["tokens"].device), batch["tokens"]
        features, mask = self.condition(batch)
        prefix, scores, prefixes = target.condition(target.cls_embedding(features), mask)
        input_tokens, n = batch["read"][:, :-1], tokens.shape[1] - 1
        visible = causal_mask(n, n, tokens.device)
        hidden = target.decode(input_tokens, torch.arange(n, device=tokens.device), visible, scores, prefixes)
        return prefix, torch.cat([prefix[:, -1:], hidden], dim=1)

    def more(self, tokens: Tensor, images: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Also the noise that is added to the hidden states."""
        batch = super().more(tokens, images, scenes, generator)
        shape = len(images) + len(scenes), self.target.length, self.target.config.dim
        return batch | {"noise": NOISE * (torch.rand(shape, generator=generator) - 0.5)}

    def held_out(self, rows: slice) -> dict[str, Tensor]:
        return super().held_out(rows) | {"noise": torch.zeros(1)}

    def parts(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Smooth L1 distance of the guesses [B, N - 1], cross-entropy of their distribution to the target's [B, N - 1], and how
        often [B, N - 1] the most probable tokens agree."""
        prefix, hidden = self.hidden(batch)
        noisy_hidden = hidden + batch["noise"]
        guesses, targets = network(prefix, noisy_hidden[:, :-1], batch["read"][:, :-1]), hidden[:, 1:]
        distance = F.smooth_l1_loss(guesses.float(), targets.float(), reduction="none").mean(dim=-1)
        logits, guess = self.target.output(targets).float(), self.target.output(guesses).float()
        cross_entropy = -(logits.softmax(dim=-1) * guess.log_softmax(dim=-1)).sum(dim=-1)
        return distance, cross_entropy, (logits.argmax(dim=-1) == guess.argmax(dim=-1)).float()

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        distance, surprise, agreed = (part.mean() for part in self.parts(self.networks["model"], batch))
        log |= {"distance": distance.item(), "surprise": surprise.item(), "agreement": agreed.item()}
        yield "model", distance + TOKENS_SHARE * surprise

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Share of tokens whose most probable value drafter and target agree on, on held-out (style, concept) combinations."""
        agreement, model = [], self._model()
        for first in range(0, len(self.held_out_captions), 64):
            batch = {key: value.to(model.device) for key, value in self.held_out(slice(first, first + 64)).items()}
            agreement.append(self.parts(model, batch)[2])
        return {"held-out agreement": torch.cat(agreement).mean().item()}

    def pipeline(self) -> LlamaGenPipeline:
        return LlamaGenPipeline(self.target, self.vq, self.clip, self.text_tokenizer, list(self.groups), self._model())

    def pipeline_kwargs(self) -> dict:
        return super().pipeline_kwargs() | {"sampler": "speculative"}


RECIPE = Recipe(DraftTask, SCHEDULES, takes=("scenes", "tokenizer", "clip", "generator"), start="emoji-llamagen")
