"""Recipe `emoji-llamagen`: a decoder-only generator of the tokens of `emoji-vitvqgan`, after a caption or a group of emoji.

In two stages: `emoji-llamagen` learns with dropout and, as the published models, from the mean of a caption's words;
`emoji-llamagen-second` goes on from there without dropout, and each word attends and is attended to.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from argen.models.llamagen import LlamaGen
from argen.pipelines.llamagen import LlamaGenPipeline, left_padded
from argen.train.loop import Recipe, Schedule
from argen.train.tokens import TokensTask, initialised_from, near_codes

SCHEDULES = {
    "cpu": Schedule(
        steps=5000, batch_size=64, learning_rate=3e-3, warmup=120, weight_decay=0.03, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=30000, batch_size=512, learning_rate=1e-3, weight_decay=0.03, betas=(0.9, 0.98)),
}
SECOND_SCHEDULES = {
    "cpu": Schedule(
        steps=5000, batch_size=64, learning_rate=2.5e-3, warmup=100, weight_decay=0.03, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=20000, batch_size=512, learning_rate=5e-4, weight_decay=0.03, betas=(0.9, 0.98)),
}
SIZES = {"caption_length": 24, "dim": 256, "depth": 6, "heads": 4, "multiple_of": 32, "dropout": 0.05}


class LlamaGenTask(TokensTask):
    """Args:
    first_stage: folder of a trained `emoji-llamagen`, to go on from.
    others: see `TokensTask`.
    """

    null_caption = None
    scenes_share, group_share = 0.35, 0.06

    def __init__(self, data: Path, scenes: Path, tokenizer: Path, clip: Path, first_stage: Path | None = None):
        super().__init__(data, scenes, tokenizer, clip)
        if first_stage is not None:
            model = initialised_from(first_stage, LlamaGen, LlamaGen, dropout=0.0, caption_attention=True)
        else:
            text_dim = self.clip.config.text_config.hidden_size
            model = LlamaGen(self.vq.config.n_embed, self.vq.grid, caption_dim=text_dim, **SIZES)
            model.tok_embeddings.weight.data = near_codes(self.vq.quantizer.embedding.weight, model.config.dim)
        self.networks: dict[str, nn.Module] = {"model": model}

    def generator(self) -> LlamaGen:
        """The network that reads captions."""
        return self._model()

    def text(self, captions: list[str]) -> dict[str, Tensor]:
        fixed = {"padding": "max_length", "max_length": SIZES["caption_length"]}
        text = self.text_tokenizer(captions, truncation=True, return_tensors="pt", **fixed)
        return {"input_ids": text.input_ids, "attention_mask": text.attention_mask}

    def condition(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features [B, T, C] with the words last, those of dropped captions replaced by "none"; mask [B, T]."""
        features, mask = left_padded(*self.encode_text(batch))
        none = self.generator().unconditional(features)
        return torch.where(batch["dropped"][:, None, None], none, features), mask

    def logits(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return network(*self.condition(batch), batch["read"])

    def pipeline(self) -> LlamaGenPipeline:
        return LlamaGenPipeline(self._model(), self.vq, self.clip, self.text_tokenizer, list(self.groups))


RECIPE = Recipe(LlamaGenTask, SCHEDULES, takes=("scenes", "tokenizer", "clip"))
SECOND_RECIPE = Recipe(
    LlamaGenTask, SECOND_SCHEDULES, takes=("scenes", "tokenizer", "clip", "generator"), start="emoji-llamagen"
)
