"""Recipes `emoji-seed-contrastive` and `emoji-seed`: the two stages of SEED's tokenizer (arXiv 2307.08041) on what `emoji-clip` and the
encoder of `argen.train.seed_encoder` see.

The first trains the causal queries so that the last of them knows the caption, the second the codebook and the way back to the picture's
embedding by `emoji-clip`. What is not published: the first also learns to name what a picture shows. In the second the queries go on
learning, and the codes shall tell what the encoder sees of the picture as it was varied, not the outputs of the queries: of the few
pictures there are, what they find would be memorised. The embedding of the codes shall find the caption, too. The codebook starts
from outputs of the queries, and codes that nothing uses are replaced, since with the official start most stay unused at this scale; the
first tokens alone are trained, too (nested dropout, arXiv 1402.0915), without which the order of the tokens says little.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from transformers import Blip2QFormerModel

from argen.eval.retrieval import held_out_sample, recall
from argen.models.files import load_network
from argen.train.loop import Recipe, Schedule
from argen.train.seed_encoder import halved, varied
from argen.train.tokens import CaptionsTask, paired
from argen.train.vit_vqgan import CodeUsage
from tokenizers_img.conv_encoder import ConvEncoder
from tokenizers_img.pixels import from_uint8
from tokenizers_img.seed.network import Seed, causal_mask, qformer

CONTRASTIVE_SCHEDULES = {
    "cpu": Schedule(steps=1600, batch_size=128, learning_rate=1e-3, warmup=100, weight_decay=0.05),
    "gpu": Schedule(steps=20000, batch_size=1024, learning_rate=5e-4, weight_decay=0.05),
}
SCHEDULES = {
    "cpu": Schedule(steps=1800, batch_size=128, learning_rate=1e-3, warmup=100, weight_decay=0.05),
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
FINDING, TEMPERATURE = 0.5, 0.07  # and of what is not: the caption found
UNNAMED = -1  # label of a scene
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
        names: so many concepts are named, too.
    """

    def __init__(
        self,
        qformer: Blip2QFormerModel,
        query_tokens: nn.Parameter,
        vocab: int,
        positions: int,
        width: int,
        names: int | None = None,
    ):
        super().__init__()
        dim = query_tokens.shape[-1]
        self.Qformer, self.query_tokens = qformer, query_tokens
        self.word_embeddings, self.position_embeddings = nn.Embedding(vocab, dim), nn.Embedding(positions, dim)
        self.vision_proj, self.text_proj = nn.Linear(dim, width), nn.Linear(dim, width)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.names = nn.Linear(dim, names) if names else None

    def query_outputs(self, features: Tensor) -> Tensor:
        """Features [B, P, V] -> output of each query [B, N, D]."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        mask = causal_mask(queries)
        return self.Qformer(query_embeds=queries, attention_mask=mask, encoder_hidden_states=features).last_hidden_state

    def image(self, features: Tensor) -> Tensor:
        """Features [B, P, V] -> a unit vector of each query [B, N, E]; the last of them stands for the picture."""
        return F.normalize(self.vision_proj(self.query_outputs(features)), dim=-1)

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids [B, T], mask [B, T] (1: a token) -> unit vectors [B, E], of the first token."""
        embedded = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]
        hidden = self.Qformer(query_embeds=embedded, query_length=0, attention_mask=mask).last_hidden_state
        return F.normalize(self.text_proj(hidden[:, 0]), dim=-1)

    def forward(
        self,
        features: Tensor,
        ids: Tensor,
        mask: Tensor,
        queries: Sequence[int] = (-1,),
        labels: Tensor | None = None,
    ) -> Tensor:
        """The mean of both cross-entropies, row i of the pictures belonging to row i of the texts, and, with the numbers of the
        concepts [B], of that of naming them; of the last query, as published, or of the queries given."""
        query_outputs, text_embeds, losses = self.query_outputs(features), self.text(ids, mask).float(), []
        image_embeds = F.normalize(self.vision_proj(query_outputs), dim=-1).float()
        for query in queries:
            losses += both_ways(image_embeds[:, query] @ text_embeds.T / self.temp)
            if labels is not None:
                logits = self.names(query_outputs[:, query]).float()
                losses.append(F.cross_entropy(logits, labels, label_smoothing=SMOOTHING, ignore_index=UNNAMED))
        return torch.stack(losses).mean()


def both_ways(logits: Tensor) -> list[Tensor]:
    """The cross-entropies of pictures against captions [B, B], equal places belonging together, and of captions against pictures."""
    targets = torch.arange(len(logits), device=logits.device)
    return [F.cross_entropy(part, targets, label_smoothing=SMOOTHING) for part in (logits, logits.T)]


def quantised(
    network: Seed, query_outputs: Tensor, target: Tensor, num_codes: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """The weighted losses of the second stage, as published; what becomes codes [B, N, C], what is told by them [B, N, D] and the
    embedding they give [B, E].

    Args:
        query_outputs: outputs of the queries [B, N, D].
        target: embedding of each picture [B, E], not normalised.
        num_codes: number of first codes of each image that its embedding is computed from [B]; None: all, as published.
    """
    z = network.encode_task_layer(query_outputs).float()
    codes = network.quantize.embedding(network.quantize.nearest(z))
    embed = (codes.detach() - z).square().mean() + COMMIT * (codes - z.detach()).square().mean()
    through = z + (codes - z).detach()
    back = network.reconstruct(through).float()
    apart = 1 - F.cosine_similarity(back, query_outputs.float(), dim=-1).mean()
    if num_codes is not None:
        through = through * (torch.arange(z.shape[1], device=z.device) < num_codes[:, None])[..., None]
    image_embeds = network.embed(through).float()
    distil = F.mse_loss(image_embeds, target.float())
    return (
        {"embed": EMBED * embed, "reconstruct": RECONSTRUCT * apart, "distil": DISTIL * distil},
        z,
        back,
        image_embeds,
    )


class Quantised(nn.Module):
    """The second stage, as it is trained here: a tokenizer, and what tells by its codes what the encoder sees.

    Args:
        seed: the tokenizer, with what reconstructs.
        names: of the encoder, what names concepts by the mean of its features [V].
        mean, std: of these means [V].
    """

    def __init__(self, seed: Seed, names: nn.Linear, mean: Tensor, std: Tensor):
        super().__init__()
        self.seed, self.tell, self.names = seed, nn.Linear(seed.config.dim, len(mean)), names.requires_grad_(False)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(
        self, features: Tensor, mean_features: Tensor, target: Tensor, num_codes: Tensor, words: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses, and what becomes codes [B, N, C], without gradients.

        Args:
            features: what the queries read of each picture [B, P, V].
            mean_features: mean of the encoder's features of it [B, V].
            target: embedding of each picture [B, E], not normalised.
            num_codes: number of first codes of each image that its embedding is computed from [B].
            words: embedding of each picture's caption [B, E], which that of the codes shall find among all.
        """
        losses, z, back, image_embeds = quantised(self.seed, self.seed.queries(features), target, num_codes)
        del losses["reconstruct"]
        predicted = self.tell(back.mean(dim=1)).float()
        losses["features"] = F.mse_loss(predicted, (mean_features - self.mean) / self.std)
        guessed = self.names(predicted * self.std + self.mean).log_softmax(dim=-1)
        losses["names"] = F.kl_div(guessed, self.names(mean_features).softmax(dim=-1), reduction="batchmean")
        logits = F.normalize(image_embeds, dim=-1) @ F.normalize(words.float(), dim=-1).T / TEMPERATURE
        losses["caption"] = FINDING * torch.stack(both_ways(logits)).mean()
        return losses, z.detach()


class Mirrored(Sequence):
    """The mirror images of [B, H, W, 3]."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].flip(1)


class ImagesTask(CaptionsTask):
    """Base of the stages: captions, images as the encoder sees them, and their embeddings by `emoji-clip`.

    Args:
        encoder: folder of the picture encoder.
        others: see `CaptionsTask`.

    Attributes:
        strength: of what pictures are varied by, see `argen.train.seed_encoder.varied`.
    """

    null_caption = None
    scenes_share = 0.25
    strength = 0.7  # less than all, or their colours would not be those of the captions

    def __init__(self, data: Path, scenes: Path, encoder: Path, clip: Path):
        self.encoder = load_network(ConvEncoder, encoder).requires_grad_(False)
        self.count = 0
        super().__init__(data, scenes, clip)
        self.all = ConcatDataset([self.images, self.scene_images, Mirrored(self.images), self.held_out_images])

    def tokens(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 -> their places in `all`: what is seen of them is computed anew in each step."""
        start, self.count = self.count, self.count + len(images)
        return torch.arange(start, self.count)

    def at(self, places: Tensor) -> Tensor:
        """Places [B] -> pictures [B, H, W, 3] uint8, on the device of the places."""
        return torch.stack([self.all[place] for place in places.tolist()]).to(places.device)

    @torch.no_grad()
    def image_features(self, images: Tensor, seed: int | None = None) -> Tensor:
        """[B, H, W, 3] uint8 -> features [B, P, V] by `emoji-clip` and, of the pictures as they are or `varied` by chance, by the
        encoder."""
        pixels = halved(images)
        if seed is not None:
            pixels = varied(pixels, torch.Generator().manual_seed(seed), self.strength)
        vision = self.clip.vision_model.to(pixels.device)
        both = (
            vision(pixel_values=2 * from_uint8(images) - 1).last_hidden_state,
            self.encoder.to(pixels.device).look(2 * pixels - 1),
        )
        return torch.cat(both, dim=1)

    @torch.no_grad()
    def image_embeds(self, features: Tensor) -> Tensor:
        """Features [B, P, V], of which the first stands for the picture -> embeddings [B, E] by `emoji-clip`, not normalised."""
        clip = self.clip.to(features.device)
        return clip.visual_projection(clip.vision_model.post_layernorm(features[:, 0]))

    def pairs_image(self, queries: Tensor, matches: Tensor) -> Image.Image:
        """Held-out images by their indices [n], and under each its match."""
        return paired(self.held_out_images[queries], self.held_out_images[matches])


class SeedContrastiveTask(ImagesTask):
    """The first stage.

    Args: see `PicturesTask`.
    """

    strength = 0.4

    def __init__(self, data: Path, scenes: Path, encoder: Path, clip: Path):
        super().__init__(data, scenes, encoder, clip)
        names = sorted({row["concept"] for row in self.rows})
        numbers = {name: number for number, name in enumerate(names)}
        self.labels = torch.full((len(self.all),), UNNAMED)
        for first in (0, len(self.rows) + len(self.captions)):  # the single images, and their mirror images
            self.labels[first : first + len(self.rows)] = torch.tensor([numbers[row["concept"]] for row in self.rows])
        words = self.clip.text_model.embeddings.token_embedding.weight
        sizes = {name: SIZES[name] for name in ("dim", "layers", "heads", "hidden", "features")}
        queries = nn.Parameter(0.02 * torch.randn(1, SIZES["tokens"], SIZES["dim"]))
        positions = self.clip.config.text_config.max_position_embeddings
        model = Contrastive(
            qformer(**sizes, text=True, dropout=0.0), queries, len(words), positions, SIZES["embedding"], len(names)
        )
        model.word_embeddings.weight.data.copy_(words)
        nn.init.normal_(model.position_embeddings.weight, std=0.02)
        self.networks: dict[str, nn.Module] = {"model": model}

    def more(self, tokens: Tensor, images: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Index of a query beside the last that is trained on the caption, too, and the seed of the augmentation."""
        query = torch.randint(SIZES["tokens"] - 1, (1,), generator=generator)
        return {"query": query, "varied": torch.randint(2**31, (1,), generator=generator)}

    def error(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        places, queries = batch["tokens"], (-1, int(batch["query"]))
        features, labels = (
            self.image_features(self.at(places), int(batch["varied"])),
            self.labels.to(places.device)[places],
        )
        return network(features, batch["input_ids"], batch["attention_mask"], queries, labels)

    @torch.no_grad()
    def similarity(self) -> Tensor:
        """Similarity of held-out captions to held-out images [n, n]."""
        model, rows = self._model(), held_out_sample(len(self.held_out_captions))
        text = self.text([self.held_out_captions[row] for row in rows])
        words = model.text(text["input_ids"].to(model.temp.device), text["attention_mask"].to(model.temp.device))
        parts = self.held_out_images[rows].to(model.temp.device).split(64)
        return words @ torch.cat([model.image(self.image_features(part))[:, -1] for part in parts]).T

    def evaluate(self) -> dict[str, float]:
        """Recall of images by held-out captions."""
        return recall(self.similarity().cpu())

    def sample(self) -> Image.Image:
        """Held-out images, and under each the one that its caption ranks first."""
        rows = torch.tensor(held_out_sample(len(self.held_out_captions)))
        queries = rows[: len(rows) // 8 * 8][:16]
        return self.pairs_image(queries, rows[self.similarity()[: len(queries)].argmax(dim=1).cpu()])

    def save(self, folder: Path) -> None:
        """A tokenizer of which only the queries are trained."""
        model, seed = self._model(), Seed(**SIZES)
        state = {key: value for key, value in model.Qformer.state_dict().items() if key in seed.Qformer.state_dict()}
        seed.Qformer.load_state_dict(state)
        seed.query_tokens.data.copy_(model.query_tokens)
        seed.to(torch.bfloat16).save_pretrained(folder)
        self.encoder.to(torch.bfloat16).save_pretrained(folder / "vision")


class SeedTask(ImagesTask):
    """The second stage.

    Args:
        tokenizer: folder of the first, with its encoder.
        others: see `CaptionsTask`.
    """

    def __init__(self, data: Path, scenes: Path, tokenizer: Path, clip: Path, total: int):
        super().__init__(data, scenes, tokenizer / "vision", clip)
        if self.encoder.head is None:
            raise ValueError(
                f"the encoder in {tokenizer} cannot name anything: give what emoji-seed-contrastive has saved"
            )
        model = load_network(Seed, tokenizer)
        self.total, self.usage = total, CodeUsage(SIZES["n_embed"])
        self.extra_state = (self.usage,)
        generator = torch.Generator().manual_seed(0)
        features = self.image_features(self.images[torch.randint(len(self.images), (256,), generator=generator)], 0)
        self.begin(model, features, generator)
        mean_features = self.mean_encoder_features(features)
        network = Quantised(
            model, self.encoder.head, mean_features.mean(dim=0), mean_features.std(dim=0).clamp(min=1e-3)
        )
        self.networks: dict[str, nn.Module] = {"model": network}

    @torch.no_grad()
    def begin(self, model: Seed, features: Tensor, generator: torch.Generator) -> None:
        """Start the codebook from outputs of the queries."""
        z = model.eval().encode_task_layer(model.queries(features)).flatten(0, 1)
        indices = torch.randperm(len(z), generator=generator)[: SIZES["n_embed"]]
        model.quantize.embedding.weight.copy_(z[indices])
        model.train()

    def mean_encoder_features(self, features: Tensor) -> Tensor:
        """Features [B, P, V] -> the mean of those that are the encoder's [B, V]."""
        return features[:, -((self.encoder.config.image_size // 32) ** 2) :].mean(dim=1)

    def more(self, tokens: Tensor, images: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Number of codes that each image is decoded from, and the seed of its augmentation."""
        few = torch.randint(1, SIZES["tokens"], (len(tokens),), generator=generator)
        shortened = torch.rand(len(tokens), generator=generator) < SHORTENED
        num_codes = torch.where(shortened, few, SIZES["tokens"])
        return {"num_codes": num_codes, "varied": torch.randint(2**31, (1,), generator=generator)}

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        model = self._model()
        model.Qformer.eval()  # without dropout
        states, mask = self.encode_text(batch)
        words = self.clip.text_projection(states[torch.arange(len(states)), mask.sum(dim=1) - 1])
        features = self.image_features(self.at(batch["tokens"]), int(batch["varied"]))
        mean_features, target = self.mean_encoder_features(features), self.image_embeds(features)
        losses, z = self.networks["model"](features, mean_features, target, batch["num_codes"], words)
        log |= {name: value.item() for name, value in losses.items()}
        yield "model", sum(losses.values())
        self._revive(z.flatten(0, 1), step)

    def _model(self) -> Seed:
        return super()._model().seed

    @torch.no_grad()
    def _revive(self, z: Tensor, step: int) -> None:
        """Count which codes are nearest to z [n, C], and replace those that are to none."""
        model = self._model()
        self.usage.count += torch.bincount(model.quantize.nearest(z).cpu(), minlength=len(self.usage.count))
        if (step + 1) % REVIVE_EVERY == 0:
            dead = (self.usage.count == 0).nonzero().flatten()
            if step < self.total / 2:
                indices = torch.randperm(len(z), generator=torch.Generator().manual_seed(step))[: len(dead)]
                model.quantize.embedding.weight[dead[: len(indices)]] = z[indices]
            self.usage.count.zero_()

    @torch.no_grad()
    def embedded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of held-out images and those decoded from their ids, both [n, E] of length 1, and the ids."""
        model, targets, decoded, ids = self._model(), [], [], []
        for part in self.held_out_images.split(64):
            features = self.image_features(part.to(model.device))
            ids.append(model.ids(features))
            decoded.append(F.normalize(model.decode(ids[-1]).float(), dim=-1))
            targets.append(F.normalize(self.image_embeds(features).float(), dim=-1))
        return torch.cat(targets).cpu(), torch.cat(decoded).cpu(), torch.cat(ids).cpu()

    def evaluate(self) -> dict[str, float]:
        """Recall of the image by its decoded embedding among 100, and the share of codes in use."""
        targets, decoded, ids = self.embedded()
        rows = held_out_sample(len(targets))
        scores = recall(decoded[rows] @ targets[rows].T)
        return scores | {"codes in use": ids.unique().numel() / SIZES["n_embed"]}

    def sample(self) -> Image.Image:
        """Held-out pictures, and those whose embedding is nearest to the decoded one of each."""
        targets, decoded, _ = self.embedded()
        queries = torch.arange(len(targets) // 8 * 8)[:32]
        return self.pairs_image(queries, (decoded[queries] @ targets.T).argmax(dim=1))

    def save(self, folder: Path) -> None:
        without(self._model(), reconstruct=False).to(torch.bfloat16).save_pretrained(folder)
        without(self.encoder, names=None).to(torch.bfloat16).save_pretrained(folder / "vision")


def without(model: Seed | ConvEncoder, **changes) -> Seed | ConvEncoder:
    """The same network without what only training needs, by its configuration."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    smaller = type(model)(**config | changes)
    smaller.load_state_dict({key: value for key, value in model.state_dict().items() if key in smaller.state_dict()})
    return smaller


CONTRASTIVE_RECIPE = Recipe(
    SeedContrastiveTask, CONTRASTIVE_SCHEDULES, takes=("scenes", "tokenizer", "clip"), tokenizer="emoji-seed-encoder"
)
RECIPE = Recipe(SeedTask, SCHEDULES, takes=("scenes", "tokenizer", "clip", "total"), tokenizer="emoji-seed-contrastive")
