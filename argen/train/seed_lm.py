"""Recipe `emoji-seed-lm`: one small Llama that writes captions and the codes of `emoji-seed` in one sequence (arXiv 2310.01218).

Half of the sequences begin with the caption, half with the picture, so that it draws and describes. `emoji-seed-lm-second` goes on
from there: the loss was still falling.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from argen.eval.retrieval import held_out_sample
from argen.models.files import load_network
from argen.models.seed_llama import Vocabulary, add_words, likelihoods
from argen.train.loop import Recipe, Schedule
from argen.train.seed import ImagesTask
from argen.train.tokens import near_codes
from tokenizers_img.seed.network import Seed

SCHEDULES = {
    "cpu": Schedule(
        steps=2000, batch_size=64, learning_rate=2e-3, warmup=100, weight_decay=0.05, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=40000, batch_size=512, learning_rate=1e-3, weight_decay=0.05, betas=(0.9, 0.98)),
}
SECOND_SCHEDULES = {
    "cpu": Schedule(
        steps=3000, batch_size=64, learning_rate=1.5e-3, warmup=100, weight_decay=0.05, betas=(0.9, 0.98), muon=True
    ),
    "gpu": Schedule(steps=20000, batch_size=512, learning_rate=5e-4, weight_decay=0.05, betas=(0.9, 0.98)),
}
SIZES = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 4}
IGNORED = -100  # label of padding
SHOWN = 8  # captions of the sample


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of ids -> [B, L], filled with -1 at their ends."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])


def word_errors(network: nn.Module, ids: Tensor) -> Tensor:
    """Ids [B, L], padded with -1 -> the cross-entropy of each but the first [B, L - 1], in nats, 0 for padding."""
    logits = network(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits[:, :-1].float()
    targets = torch.where(ids < 0, IGNORED, ids)[:, 1:]
    wrong = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return wrong.view(targets.shape)


class SeedLMTask(ImagesTask):
    """Args:
    tokenizer: folder of the trained `emoji-seed`.
    first_stage: folder of a trained `emoji-seed-lm`, to go on from.
    others: see `CaptionsTask`.
    """

    scenes_share, group_share = 0.25, 0.1

    def __init__(self, data: Path, scenes: Path, tokenizer: Path, clip: Path, first_stage: Path | None = None):
        super().__init__(data, scenes, tokenizer / "vision", clip)
        self.seed = load_network(Seed, tokenizer).requires_grad_(False)
        self.both = AutoTokenizer.from_pretrained(clip)
        add_words(self.both, self.seed.config.n_embed)
        self.words = Vocabulary.of(self.both)
        if first_stage is not None:
            model = LlamaForCausalLM.from_pretrained(first_stage, dtype=torch.float32)
        else:
            ends = {"bos_token_id": self.both.bos_token_id, "eos_token_id": self.both.eos_token_id}
            longest = self.both.model_max_length + self.seed.config.tokens + 4
            fixed = {"max_position_embeddings": longest, "tie_word_embeddings": True, **SIZES, **ends}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(self.both), **fixed))
            codes = near_codes(self.seed.quantize.embedding.weight, SIZES["hidden_size"])
            model.get_input_embeddings().weight.data[self.words.shift : self.words.shift + len(codes)] = codes
        self.networks: dict[str, nn.Module] = {"model": model}

    def text(self, captions: list[str]) -> dict[str, Tensor]:
        """Ids without start and end, padded with -1; there is nothing else to read."""
        rows = self.text_tokenizer(captions, add_special_tokens=False, truncation=True, max_length=28).input_ids
        width = max(1, *map(len, rows))
        return {"input_ids": torch.tensor([row + [-1] * (width - len(row)) for row in rows])}

    def more(self, tokens: Tensor, images: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Seed of the augmentation, and whether the image or the caption comes first."""
        return {
            "varied": torch.randint(2**31, (1,), generator=generator),
            "first": torch.rand(len(tokens), generator=generator) < 0.5,
        }

    def held_out(self, rows: slice) -> dict[str, Tensor]:
        batch = super().held_out(rows)
        return batch | {"varied": torch.tensor([-1]), "first": torch.zeros(len(batch["tokens"]), dtype=torch.bool)}

    def codes(self, batch: dict[str, Tensor]) -> Tensor:
        """Ids of a batch's pictures [B, N]."""
        seed = int(batch["varied"])
        features = self.image_features(self.at(batch["tokens"]), None if seed < 0 else seed)
        return self.seed.to(features.device).ids(features)

    def sequences(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, L]: the start, then the caption and the picture or the other way round, the end, and -1."""
        rows, start, end = [], self.both.bos_token_id, self.both.eos_token_id
        examples = zip(
            batch["input_ids"].tolist(),
            self.codes(batch).tolist(),
            *(batch[k].tolist() for k in ("first", "dropped")),
            strict=True,
        )
        for words, codes, image_first, dropped in examples:
            image = [self.words.begin, *(code + self.words.shift for code in codes), self.words.end]
            caption = [] if dropped else [word for word in words if word >= 0]
            rows.append([start, *(image + caption if image_first else caption + image), end])
        return padded(rows).to(batch["tokens"].device)

    def error(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        ids = self.sequences(batch)
        return word_errors(network, ids)[ids[:, 1:] >= 0]

    def evaluate(self) -> dict[str, float]:
        """The loss on held-out combinations, and how often a picture's own caption is the most probable of 100."""
        rows = held_out_sample(len(self.held_out_captions))[:100]
        model = self._model()
        codes = self.codes(
            {"tokens": self.held_out_tokens[rows].to(model.device), "varied": torch.tensor([-1])}
        ).tolist()
        log_probs = likelihoods(model, self.both, self.words, codes, [self.held_out_captions[row] for row in rows])
        accuracy = (log_probs.argmax(dim=1) == torch.arange(len(rows))).float().mean().item()
        return super().evaluate() | {"caption of 100": accuracy}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """Real images whose embeddings are nearest to those of the images generated for held-out captions."""
        model, parts = self._model(), []
        for part in self.images[::8].split(64):
            parts.append(F.normalize(self.image_embeds(self.image_features(part.to(model.device))).float(), dim=-1))
        image_embeds, base = torch.cat(parts), self.images[::8]
        captions = self.held_out_captions[:: max(1, len(self.held_out_captions) // SHOWN)][:SHOWN]
        generated = []
        for words in captions:
            ids = self.text_tokenizer(words, add_special_tokens=False).input_ids
            row = torch.tensor([[self.both.bos_token_id, *ids, self.words.begin]], device=model.device)
            for _ in range(self.seed.config.tokens):
                logits = model(input_ids=row).logits[:, -1, self.words.shift : self.words.shift + self.words.codes]
                row = torch.cat([row, logits.argmax(dim=-1, keepdim=True) + self.words.shift], dim=1)
            codes = row[:, -self.seed.config.tokens :] - self.words.shift
            generated.append(F.normalize(self.seed.decode(codes).float(), dim=-1))
        nearest = (torch.cat(generated) @ image_embeds.T).argmax(dim=1).cpu()
        return Image.fromarray(torch.cat(list(base[nearest]), dim=1).numpy())

    def save(self, folder: Path) -> None:
        self._model().to(torch.bfloat16).save_pretrained(folder)
        self.both.save_pretrained(folder)


RECIPE = Recipe(SeedLMTask, SCHEDULES, takes=("scenes", "tokenizer", "clip"), tokenizer="emoji-seed")
SECOND_RECIPE = Recipe(
    SeedLMTask,
    SECOND_SCHEDULES,
    takes=("scenes", "tokenizer", "clip", "generator"),
    start="emoji-seed-lm",
    tokenizer="emoji-seed",
)
