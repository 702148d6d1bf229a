"""Recipes `emoji-seed-contrastive` and `emoji-seed`: the two stages of SEED's tokenizer (arXiv 2307.08041) on what `emoji-clip` sees.

The first trains the causal queries so that the last of them knows the caption; the second, with them frozen, the codebook and
the way back to the picture's embedding. The codebook starts from outputs of the encoder, and codes that nothing uses are
replaced: with the official start most stay unused at this scale. Both stages also train the first tokens alone (nested dropout,
arXiv 1402.0915), without which the order of the tokens says little.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import Blip2QFormerModel

from argen.eval.retrieval import held_out_sample, recall
from argen.train.loop import Schedule
from argen.train.tokens import CaptionsTask, paired
from argen.train.vit_vqgan import CodeUsage
from tokenizers_img.pixels import from_uint8
from tokenizers_img.seed import Seed, causal_mask, qformer

CONTRASTIVE_SCHEDULES = {
    "cpu": Schedule(steps=2500, batch_size=128, learning_rate=1e-3, warmup=100, weight_decay=0.05),
    "gpu": Schedule(steps=20000, batch_size=1024, learning_rate=5e-4, weight_decay=0.05),
}
SCHEDULES = {
    "cpu": Schedule(steps=4000, batch_size=128, learning_rate=1e-3, warmup=100, weight_decay=0.05),
    "gpu": Schedule(steps=20000, batch_size=512, learning_rate=5e-4, weight_decay=0.05),
}
SIZES = {
    "features": 192,
    "dim": 192,
    "layers": 4,
    "heads": 4,
    "hidden": 768,
    "tokens": 16,
    "n_embed": 1024,
    "embed_dim": 16,
    "depth": 2,
    "block_heads": 4,
    "embedding": 192,
    "nested": True,
}
SMOOTHING = 0.1  # of the contrastive loss's labels
EMBED, COMMIT, RECONSTRUCT, DISTIL = 5.0, 0.25, 2.0, 0.5  # weights of the second stage, as published
SCENES_SHARE = 0.25
SHORTENED = (
    0.5  # of the pictures are decoded from their first codes alone, so that these hold the most (nested dropout)
)
REVIVE_EVERY = 20  # steps; codes that were not used in so many are replaced, until half of the schedule


class Contrastive(nn.Module):
    """The first stage: one transformer over queries and, apart, over words.

    Args:
        qformer: with a text side; it is shared by both.
        query_tokens: [1, N, D], the queries.
        vocab, positions: sizes of the word and position tables.
        width: of the common space.
    """

    def __init__(self, qformer: Blip2QFormerModel, query_tokens: nn.Parameter, vocab: int, positions: int, width: int):
        super().__init__()
        dim = query_tokens.shape[-1]
        self.Qformer, self.query_tokens = qformer, query_tokens
        self.word_embeddings, self.position_embeddings = nn.Embedding(vocab, dim), nn.Embedding(positions, dim)
        self.vision_proj, self.text_proj = nn.Linear(dim, width), nn.Linear(dim, width)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def picture(self, features: Tensor) -> Tensor:
        """Features [B, P, V] -> a unit vector of each query [B, N, E]; the last of them stands for the picture."""
        asked = self.query_tokens.expand(len(features), -1, -1)
        mask = causal_mask(asked)
        found = self.Qformer(query_embeds=asked, attention_mask=mask, encoder_hidden_states=features).last_hidden_state
        return F.normalize(self.vision_proj(found), dim=-1)

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids [B, T], mask [B, T] (1: a token) -> unit vectors [B, E], of the first token."""
        embedded = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        found = self.Qformer(query_embeds=embedded, query_length=0, attention_mask=mask).last_hidden_state
        return F.normalize(self.text_proj(found[:, 0]), dim=-1)

    def forward(self, features: Tensor, ids: Tensor, mask: Tensor, queries: Sequence[int] = (-1,)) -> Tensor:
        """The mean of both cross-entropies, row i of the pictures belonging to row i of the texts; of the last query, as published,
        or of those named."""
        seen, words, losses = self.picture(features).float(), self.text(ids, mask).float(), []
        for query in queries:
            logits = seen[:, query] @ words.T / self.temp
            right = torch.arange(len(logits), device=logits.device)
            losses += [F.cross_entropy(part, right, label_smoothing=SMOOTHING) for part in (logits, logits.T)]
        return torch.stack(losses).mean()


def quantised(network: Seed, found: Tensor, target: Tensor, kept: Tensor | None = None) -> dict[str, Tensor]:
    """The weighted losses of the second stage.

    Args:
        found: what the queries found [B, N, D], without gradients: they are not trained.
        target: embedding of each picture [B, E], not normalised.
        kept: the embedding is made of so many first codes of each picture alone [B]; None of all, as published.
    """
    z = network.encode_task_layer(found).float()
    codes = network.quantize.embedding(network.quantize.nearest(z))
    embed = (codes.detach() - z).square().mean() + COMMIT * (codes - z.detach()).square().mean()
    through = z + (codes - z).detach()
    apart = 1 - F.cosine_similarity(network.reconstruct(through).float(), found.float(), dim=-1).mean()
    if kept is not None:
        through = through * (torch.arange(z.shape[1], device=z.device) < kept[:, None])[..., None]
    distil = F.mse_loss(network.embed(through).float(), target.float())
    return {"embed": EMBED * embed, "reconstruct": RECONSTRUCT * apart, "distil": DISTIL * distil}


class PicturesTask(CaptionsTask):
    """What both stages share: captions, and pictures as `emoji-clip` sees them."""

    null_caption = None
    scenes_share = SCENES_SHARE

    def tokens(self, pictures: Tensor) -> Tensor:
        """[B, H, W, 3] uint8, as they are: what is seen of them is computed anew in each step."""
        return pictures

    @torch.no_grad()
    def seen(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, W, 3] uint8 -> features [B, P, V] and embeddings [B, E], which are not normalised."""
        vision = self.clip.vision_model.to(pictures.device)
        found = vision(pixel_values=2 * from_uint8(pictures) - 1)
        return found.last_hidden_state, self.clip.visual_projection.to(pictures.device)(found.pooler_output)

    def shown(self, asked: Tensor, found: Tensor) -> Image.Image:
        """Held-out pictures by their numbers [n], and under each what was found for it."""
        return paired(self.held_out_pictures[asked], self.held_out_pictures[found])


class SeedContrastiveTask(PicturesTask):
    """The first stage.

    Args: see `CaptionsTask`.
    """

    def __init__(self, data: Path, scenes: Path, clip: Path):
        super().__init__(data, scenes, clip)
        words = self.clip.text_model.embeddings.token_embedding.weight
        own = {name: SIZES[name] for name in ("dim", "layers", "heads", "hidden", "features")}
        queries = nn.Parameter(0.02 * torch.randn(1, SIZES["tokens"], SIZES["dim"]))
        positions = self.clip.config.text_config.max_position_embeddings
        model = Contrastive(qformer(**own, text=True, dropout=0.0), queries, len(words), positions, SIZES["embedding"])
        model.word_embeddings.weight.data.copy_(words)
        nn.init.normal_(model.position_embeddings.weight, std=0.02)
        self.networks: dict[str, nn.Module] = {"model": model}

    def more(self, tokens: Tensor, pictures: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Which query beside the last shall know the caption, too."""
        return {"query": torch.randint(SIZES["tokens"] - 1, (1,), generator=generator)}

    def error(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        features, _ = self.seen(batch["tokens"])
        return network(features, batch["input_ids"], batch["attention_mask"], (-1, int(batch["query"])))

    @torch.no_grad()
    def similarity(self) -> Tensor:
        """Of held-out captions to held-out pictures [n, n]."""
        model, rows = self._model(), held_out_sample(len(self.held_out_captions))
        text = self.text([self.held_out_captions[row] for row in rows])
        words = model.text(text["input_ids"].to(model.temp.device), text["attention_mask"].to(model.temp.device))
        parts = self.held_out_pictures[rows].to(model.temp.device).split(64)
        return words @ torch.cat([model.picture(self.seen(part)[0])[:, -1] for part in parts]).T

    def evaluate(self) -> dict[str, float]:
        """How often the picture of a held-out caption comes first."""
        return recall(self.similarity().cpu())

    def sample(self) -> Image.Image:
        """What captions of held-out pictures find."""
        rows = torch.tensor(held_out_sample(len(self.held_out_captions)))
        asked = rows[: len(rows) // 8 * 8][:16]
        return self.shown(asked, rows[self.similarity()[: len(asked)].argmax(dim=1).cpu()])

    def save(self, folder: Path) -> None:
        """A tokenizer of which only the queries are trained."""
        model, seed = self._model(), Seed(**SIZES)
        own = {key: value for key, value in model.Qformer.state_dict().items() if key in seed.Qformer.state_dict()}
        seed.Qformer.load_state_dict(own)
        seed.query_tokens.data.copy_(model.query_tokens)
        seed.to(torch.bfloat16).save_pretrained(folder)


class SeedTask(PicturesTask):
    """The second stage.

    Args:
        tokenizer: folder of the first.
        others: see `CaptionsTask`.
    """

    def __init__(self, data: Path, scenes: Path, tokenizer: Path, clip: Path, total: int):
        super().__init__(data, scenes, clip)
        model = Seed.from_pretrained(tokenizer, torch_dtype=torch.float32)
        for part in (model.Qformer, model.query_tokens):
            part.requires_grad_(False)
        self.total, self.usage = total, CodeUsage(SIZES["n_embed"])
        self.kept = (self.usage,)
        self.networks: dict[str, nn.Module] = {"model": model}
        self.begin(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """Start the codebook from outputs of the encoder."""
        model = self._model().eval()
        chosen = torch.randint(len(self.pictures), (256,), generator=generator)
        found = model.queries(self.seen(self.pictures[chosen])[0])
        z = model.encode_task_layer(found).float().flatten(0, 1)
        chosen = torch.randperm(len(z), generator=generator)[: SIZES["n_embed"]]
        model.quantize.embedding.weight.copy_(z[chosen])
        model.train()

    def more(self, tokens: Tensor, pictures: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Of how many codes each picture is decoded."""
        few = torch.randint(1, SIZES["tokens"], (len(tokens),), generator=generator)
        shortened = torch.rand(len(tokens), generator=generator) < SHORTENED
        return {"kept": torch.where(shortened, few, SIZES["tokens"])}

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        network = self.networks["model"]
        self._model().Qformer.eval()  # without dropout, so that targets repeat
        features, target = self.seen(batch["tokens"])
        with torch.no_grad():
            found = network.queries(features)
        losses = quantised(network, found, target, batch["kept"])
        log |= {name: value.item() for name, value in losses.items()}
        yield "model", sum(losses.values())
        self._revive(found, step)

    @torch.no_grad()
    def _revive(self, found: Tensor, step: int) -> None:
        """Count which codes are used, and replace those that are not; `found` as in `quantised`."""
        model = self._model()
        z = model.encode_task_layer(found).float().flatten(0, 1)
        self.usage.count += torch.bincount(model.quantize.nearest(z).cpu(), minlength=len(self.usage.count))
        if (step + 1) % REVIVE_EVERY == 0:
            dead = (self.usage.count == 0).nonzero().flatten()
            if step < self.total / 2:
                chosen = torch.randperm(len(z), generator=torch.Generator().manual_seed(step))[: len(dead)]
                model.quantize.embedding.weight[dead[: len(chosen)]] = z[chosen]
            self.usage.count.zero_()

    @torch.no_grad()
    def embedded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of held-out pictures: their embeddings, those decoded from their ids, both [n, E] of length 1, and the ids."""
        model, wanted, made, ids = self._model(), [], [], []
        for part in self.held_out_pictures.split(64):
            features, target = self.seen(part.to(model.device))
            ids.append(model.ids(features))
            made.append(F.normalize(model.decode(ids[-1]).float(), dim=-1))
            wanted.append(F.normalize(target.float(), dim=-1))
        return torch.cat(wanted).cpu(), torch.cat(made).cpu(), torch.cat(ids).cpu()

    def evaluate(self) -> dict[str, float]:
        """How often a decoded embedding finds its own picture among 100, and the share of codes in use."""
        wanted, made, ids = self.embedded()
        rows = held_out_sample(len(wanted))
        found = recall(made[rows] @ wanted[rows].T)
        return found | {"codes in use": ids.unique().numel() / SIZES["n_embed"]}

    def sample(self) -> Image.Image:
        """Held-out pictures, and those whose embedding is nearest to the decoded one of each."""
        wanted, made, _ = self.embedded()
        asked = torch.arange(len(wanted) // 8 * 8)[:32]
        return self.shown(asked, (made[asked] @ wanted.T).argmax(dim=1))

    def save(self, folder: Path) -> None:
        model = self._model()
        own = {name: value for name, value in model.config.items() if not name.startswith("_")}
        shipped = Seed(**own | {"reconstruct": False})
        shipped.load_state_dict(
            {key: value for key, value in model.state_dict().items() if key in shipped.state_dict()}
        )
        shipped.to(torch.bfloat16).save_pretrained(folder)
