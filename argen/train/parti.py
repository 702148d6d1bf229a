"""Recipe `emoji-parti`: text to the tokens of `emoji-vitvqgan`, conditioned on the text states of `emoji-clip`.

In three stages: `emoji-parti` learns with dropout, `emoji-parti-second` goes on from there without, `emoji-parti-third` with many coloured things.
"""

from pathlib import Path

from torch import Tensor, nn

from argen.models.parti import Parti
from argen.pipelines.parti import PartiPipeline
from argen.train.loop import Recipe, Schedule
from argen.train.tokens import TokensTask, initialised_from, near_codes

SCHEDULES = {
    "cpu": Schedule(
        steps=5000, batch_size=64, learning_rate=4e-3, warmup=120, weight_decay=0.03, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=30000, batch_size=512, learning_rate=1e-3, weight_decay=0.03, betas=(0.9, 0.98)),
}
SECOND_SCHEDULES = {
    "cpu": Schedule(
        steps=5000, batch_size=64, learning_rate=2.5e-3, warmup=100, weight_decay=0.03, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=10000, batch_size=512, learning_rate=5e-4, weight_decay=0.03, betas=(0.9, 0.98)),
}

THIRD_SCHEDULES = {
    "cpu": Schedule(
        steps=1000, batch_size=64, learning_rate=1.5e-3, warmup=50, weight_decay=0.03, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=5000, batch_size=512, learning_rate=3e-4, weight_decay=0.03, betas=(0.9, 0.98)),
}


class PartiTask(TokensTask):
    """Args:
    first_stage: folder of a trained `emoji-parti`, to go on from without dropout.
    others: see `TokensTask`.
    """

    def __init__(self, data: Path, scenes: Path, tokenizer: Path, clip: Path, first_stage: Path | None = None):
        super().__init__(data, scenes, tokenizer, clip)
        if first_stage is not None:
            model = initialised_from(first_stage, Parti, Parti, dropout=0.0)
        else:
            text_dim = self.clip.config.text_config.hidden_size
            model = Parti(text_dim, self.vq.config.n_embed, self.vq.grid)
            model.embed_tokens.weight.data[:-1] = near_codes(self.vq.quantizer.embedding.weight, model.config.dim)
        self.networks: dict[str, nn.Module] = {"model": model}

    def logits(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        states, mask = self.encode_text(batch)
        return network(states, mask.bool(), batch["read"])

    def pipeline(self) -> PartiPipeline:
        return PartiPipeline(self.clip, self.text_tokenizer, self._model(), self.vq)


class ThirdPartiTask(PartiTask):
    """Two of five pictures are scenes."""

    scenes_share = 0.4


RECIPE = Recipe(PartiTask, SCHEDULES, takes=("scenes", "tokenizer", "clip"))
SECOND_RECIPE = Recipe(
    PartiTask, SECOND_SCHEDULES, takes=("scenes", "tokenizer", "clip", "generator"), start="emoji-parti"
)
THIRD_RECIPE = Recipe(
    ThirdPartiTask, THIRD_SCHEDULES, takes=("scenes", "tokenizer", "clip", "generator"), start="emoji-parti"
)
