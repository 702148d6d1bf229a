"""What the recipes of the generators share: pictures as a tokenizer has them, captions as states of `emoji-clip`."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel

from argen.data.emoji import GROUPS, caption, everyday
from argen.data.scenes import thing_of
from argen.data.tables import pixels, read_split
from argen.models.files import load_network
from argen.pipelines.base import TokenPipeline
from argen.pipelines.prompts import group_caption
from argen.train.loop import Task
from tokenizers_img.kl_vae import KLVAE
from tokenizers_img.pixels import from_uint8
from tokenizers_img.vit_vqgan import ViTVQGAN

TEXT_DROPOUT = 0.1
EVERYDAY = 3.0  # weight of a picture of something that people ask for, in the words of `argen.data.concepts`
MIRRORED = (
    "animal",
    "plant",
    "food",
    "drink",
    "transport-ground",
    "transport-air",
    "transport-water",
)  # subgroups that may be mirrored
CORRUPTION = 0.15  # at most this share of the tokens that are read is another picture's: sampling will slip, too


def initialised_from(folder: Path, saved: type[nn.Module], network: type[nn.Module], **changes) -> nn.Module:
    """Return a new `network` with the weights and configuration of the one `saved` in a folder, but for `changes`; weights that
    only the new one has are random."""
    start = load_network(saved, folder)
    config = {key: value for key, value in start.config.items() if not key.startswith("_")}
    model = network(**config | changes)
    model.load_state_dict(start.state_dict(), strict=network is saved)
    return model


def paired(above: Tensor, below: Tensor) -> Image.Image:
    """Pictures [n, H, W, 3] uint8, 8 in a row, and under each its partner; what is left of the last row is white."""
    pairs = torch.stack([above, below])
    pairs = torch.cat([pairs, pairs.new_full((2, -len(above) % 8, *above.shape[1:]), 255)], dim=1)
    rows = rearrange(pairs, "pair (r c) h w d -> (r pair h) (c w) d", c=8)
    return Image.fromarray(rows.numpy())


def slipped(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Ids [B, N], some of which are another picture's."""
    share = CORRUPTION * torch.rand(len(tokens), 1, generator=generator)
    wrong = torch.rand(tokens.shape, generator=generator) < share
    return torch.where(wrong, tokens[torch.randperm(len(tokens), generator=generator)], tokens)


def shares(combinations: Sequence[tuple[str, str]]) -> Tensor:
    """Weights of pictures by their concept and style: those of one combination, as skin tones are, share one picture's weight; what has
    everyday names counts `EVERYDAY` times."""
    tones = Counter(combinations)
    often = [EVERYDAY if concept in everyday() else 1.0 for concept, _ in combinations]
    return torch.tensor([weight / tones[each] for weight, each in zip(often, combinations, strict=True)])


def near_codes(codes: Tensor, dim: int) -> Tensor:
    """A table [K, dim] to start the embeddings of codes [K, C] with: near codes are near."""
    codes = F.normalize(codes.detach(), dim=-1)
    return 0.02 * (codes @ torch.randn(codes.shape[1], dim, generator=torch.Generator().manual_seed(0)))


class CaptionsTask(Task):
    """A generator of pictures after a caption; a subclass has the picture tokenizer and the network.

    Args:
        data, scenes: folders made by ``argen data emoji`` and ``argen data scenes``.
        clip: folder of the trained `emoji-clip`.

    Attributes:
        null_caption: what is read where the caption is dropped; None where the network has its own "none".
        scenes_share: of the pictures are scenes.
        group_share: of the single pictures are shown with the name of their group instead of a caption.
        groups: by name.
        image_size: side of the pictures that `tokens` takes.
        only: the single pictures are of these things alone, see `argen.data.scenes.thing_of`; None for all.
    """

    null_caption: str | None = ""
    scenes_share, group_share = 0.2, 0.0
    image_size = 128
    groups = tuple(GROUPS)
    only: tuple[str, ...] | None = None

    def __init__(self, data: Path, scenes: Path, clip: Path):
        self.text_tokenizer = AutoTokenizer.from_pretrained(clip)
        self.clip = CLIPModel.from_pretrained(clip, dtype=torch.float32).eval().requires_grad_(False)

        table = self.read_split(data, "train")
        self.rows, self.images = (
            table.remove_columns("image").to_list(),
            torch.from_numpy(pixels(table, self.image_size)),
        )
        table = read_split(scenes, "train")
        self.captions = list(table["caption"])
        self.scene_images = torch.from_numpy(pixels(table, self.image_size))
        self.image_tokens, self.scene_tokens = self.tokens(self.images), self.tokens(self.scene_images)
        self.mirrored_tokens = self.tokens(self.images.flip(2))
        self.mirrors = torch.tensor([row["subgroup"].startswith(MIRRORED) for row in self.rows])
        table = self.read_split(data, "validation")
        self.held_out_captions, self.held_out_images = (
            list(table["caption"]),
            torch.from_numpy(pixels(table, self.image_size)),
        )
        self.held_out_tokens = self.tokens(self.held_out_images)

        self.weights = shares([(row["concept"], row["style"]) for row in self.rows])

    def read_split(self, data: Path, split: str):
        """A split of the single pictures.

        Raises:
            ValueError: none of them shows what is to be learned.
        """
        table = read_split(data, split)
        if self.only is None:
            return table
        rows = [row for row, concept in enumerate(table["concept"]) if thing_of(concept, self.only)]
        if not rows:
            raise ValueError(f"{data} shows none of {', '.join(self.only)} in its {split} split: give all the images")
        return table.select(rows)

    def tokens(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 -> what is learned of them [B, ...]: ids or latents."""
        raise NotImplementedError

    def caption(self, row: dict, rng: random.Random) -> str:
        """A caption of a single picture, drawn at random; that of a group which has no name is never one of groups."""
        if self.group_share and rng.random() < self.group_share and row["group"] in self.groups:
            return group_caption(f"class:{row['group']}", self.groups)
        return caption(row, rng)

    def text(self, captions: list[str]) -> dict[str, Tensor]:
        text = self.text_tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        return {"input_ids": text.input_ids, "attention_mask": text.attention_mask}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        scenes = int(size * self.scenes_share)
        indices = torch.multinomial(self.weights, size - scenes, generator=generator)
        scene_indices = torch.randint(len(self.captions), (scenes,), generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        captions = [self.caption(self.rows[index], rng) for index in indices.tolist()]
        captions += [self.captions[index] for index in scene_indices.tolist()]
        dropped = [rng.random() < TEXT_DROPOUT for _ in captions]
        if self.null_caption is not None:
            captions = [self.null_caption if drop else text for text, drop in zip(captions, dropped, strict=True)]
        mirror = self.mirrors[indices] & (torch.rand(len(indices), generator=generator) < 0.5)
        singles, images = self.image_tokens[indices], self.images[indices]
        singles[mirror], images[mirror] = self.mirrored_tokens[indices[mirror]], images[mirror].flip(2)
        tokens = torch.cat([singles, self.scene_tokens[scene_indices]])
        batch = {"tokens": tokens, "dropped": torch.tensor(dropped), **self.text(captions)}
        return batch | self.more(tokens, images, scene_indices, generator)

    def more(self, tokens: Tensor, images: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Further entries of a batch, from its tokens, its single images [n, H, W, 3] uint8 and the indices of its scenes."""
        return {}

    def encode_text(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, C] of the captions, mask [B, T] (1: a token)."""
        encoder = self.clip.text_model.to(batch["input_ids"].device)
        with torch.no_grad():
            states = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return states.last_hidden_state, batch["attention_mask"]

    def held_out(self, rows: slice) -> dict[str, Tensor]:
        """A batch of held-out combinations."""
        tokens = self.held_out_tokens[rows]
        dropped = torch.zeros(len(tokens), dtype=torch.bool)
        return {"tokens": tokens, "dropped": dropped, **self.text(self.held_out_captions[rows])}

    def error(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Error of every token of a batch, in nats or squared [...]."""
        raise NotImplementedError

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        loss = self.error(self.networks["model"], batch).mean()
        log["loss"] = loss.item()
        yield "model", loss

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean error on held-out (style, concept) combinations."""
        model, errors = self._model(), []
        for first in range(0, len(self.held_out_captions), 64):
            batch = {key: value.to(model.device) for key, value in self.held_out(slice(first, first + 64)).items()}
            errors.append(self.error(model, batch).flatten())
        return {"held-out loss": torch.cat(errors).mean().item()}

    def pipeline(self) -> TokenPipeline:
        """The network as it will be called."""
        raise NotImplementedError

    def pipeline_kwargs(self) -> dict:
        """Arguments of the pipeline's call in `sample`: the prompts of 32 held-out combinations."""
        return {"prompt": self.held_out_captions[:: max(1, len(self.held_out_captions) // 32)][:32]}

    def sample(self) -> Image.Image:
        """32 pictures of what the held-out split shows, 8 in a row."""
        pipe, kwargs = self.pipeline().to(self._model().device), self.pipeline_kwargs()
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(index) for index in range(len(kwargs["prompt"]))]
        images = pipe(**kwargs, generator=generators, output_type="pt").images.float().cpu()
        missing = torch.ones(-len(images) % 8, *images.shape[1:])
        sheet = rearrange(torch.cat([images, missing]), "(r c) d h w -> (r h) (c w) d", c=8)
        return Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())

    def save(self, folder: Path) -> None:
        self._model().to(torch.bfloat16).save_pretrained(folder)


class LatentsTask(CaptionsTask):
    """A generator of the latents of `emoji-vae` out of noise, which `more` draws.

    Args:
        vae: folder of the trained `emoji-vae`.
        others: see `CaptionsTask`.
    """

    def __init__(self, data: Path, scenes: Path, vae: Path, clip: Path):
        self.vae = KLVAE(load_network(AutoencoderKL, vae).requires_grad_(False))
        self.image_size = self.vae.config.image_size
        super().__init__(data, scenes, clip)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 -> latents [B, C, h, w]."""
        return torch.cat([self.vae.encode(from_uint8(part)) for part in images.split(64)])

    def held_out(self, rows: slice) -> dict[str, Tensor]:
        batch, generators = super().held_out(rows), torch.Generator().manual_seed(rows.start)
        return batch | self.more(batch["tokens"], None, None, generators)


class TokensTask(CaptionsTask):
    """A generator of the tokens of `emoji-vitvqgan`.

    Args:
        tokenizer: folder of the trained `emoji-vitvqgan`.
        others: see `CaptionsTask`.
    """

    def __init__(self, data: Path, scenes: Path, tokenizer: Path, clip: Path):
        self.vq = load_network(ViTVQGAN, tokenizer).requires_grad_(False)
        self.image_size = self.vq.config.image_size
        super().__init__(data, scenes, clip)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 -> ids [B, N]; in fp32, because bf16 changes every fifth id."""
        return torch.cat([self.vq.encode(from_uint8(part)) for part in images.split(128)])

    def more(self, tokens: Tensor, images: Tensor, scenes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The tokens that are read."""
        return {"read": slipped(tokens, generator)}

    def held_out(self, rows: slice) -> dict[str, Tensor]:
        return super().held_out(rows) | {"read": self.held_out_tokens[rows]}

    def logits(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """[B, N, K] of the tokens that `batch["read"]` leads to."""
        raise NotImplementedError

    def error(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = self.logits(network, batch).float()
        return F.cross_entropy(logits.flatten(0, 1), batch["tokens"].flatten(), reduction="none")
