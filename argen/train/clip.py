"""Recipe `emoji-clip`: a small CLIP (arXiv 2103.00020) in transformers' own classes, on singles and scenes."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from argen.data.emoji import STYLES, caption
from argen.data.tables import pixels, read_split
from argen.eval.retrieval import held_out_sample, recall
from argen.models.clip import TextImageEncoder
from argen.train.loop import Recipe, Schedule, Task
from argen.train.tokens import shares
from argen.words import text_normalizer
from tokenizers_img.pixels import from_uint8

SCHEDULES = {
    "cpu": Schedule(steps=1500, batch_size=192, learning_rate=1e-3, warmup=100, weight_decay=0.05, betas=(0.9, 0.98)),
    "gpu": Schedule(steps=8000, batch_size=1024, learning_rate=1e-3, weight_decay=0.05, betas=(0.9, 0.98)),
}
MAX_LENGTH = 32
SIZE = 128  # pixels of an image's side
VOCABULARY = 2048
SCENES_SHARE = 0.25


def text_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A lower-case byte-level BPE of `VOCABULARY` pieces, trained on `captions`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = text_normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<unk>", "</s>"]  # not </s> at 2: transformers pools elsewhere then
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
    )


def network() -> CLIPModel:
    tower = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
    return CLIPModel(
        CLIPConfig(
            text_config={
                **tower,
                "num_hidden_layers": 3,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": MAX_LENGTH,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 3,
            },
            vision_config={**tower, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": 16},
            projection_dim=192,
        )
    )


class CLIPTask(Task):
    """Args:
    data, scenes: folders made by ``argen data emoji`` and ``argen data scenes``.
    """

    def __init__(self, data: Path, scenes: Path):
        self.singles = {split: read_split(data, split) for split in ("train", "test")}
        self.images = torch.from_numpy(pixels(self.singles["train"], SIZE))
        self.rows = self.singles["train"].remove_columns("image").to_list()
        table = read_split(scenes, "train")
        self.scene_images, self.scene_captions = torch.from_numpy(pixels(table, SIZE)), list(table["caption"])
        self.weights = shares([(row["concept"], row["style"]) for row in self.rows])
        rng = random.Random(0)
        captions = [caption(row, rng) for row in self.rows for _ in range(3)]
        self.tokenizer = text_tokenizer(captions + self.scene_captions)
        self.networks: dict[str, nn.Module] = {"model": network()}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        scenes = int(size * SCENES_SHARE)
        indices = torch.multinomial(self.weights, size - scenes, generator=generator).tolist()
        scene_indices = torch.randint(len(self.scene_captions), (scenes,), generator=generator).tolist()
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        captions, keys = [], []
        for row in (self.rows[index] for index in indices):
            captions.append(caption(row, rng))
            keys.append((row["name"], row["style"]))
        captions += [self.scene_captions[index] for index in scene_indices]
        keys += [(text, "") for text in captions[len(indices) :]]
        text = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        images = torch.cat([self.images[indices], self.scene_images[scene_indices]])
        return {
            "input_ids": text.input_ids,
            "attention_mask": text.attention_mask,
            "pixel_values": 2 * from_uint8(images) - 1,
            "positive": positives(captions, keys),
        }

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        positive = batch.pop("positive").float()
        out = self.networks["model"](**batch)
        by_text = out.logits_per_text.float()
        targets = [p / p.sum(dim=1, keepdim=True) for p in (positive, positive.T)]
        loss = (F.cross_entropy(by_text, targets[0]) + F.cross_entropy(by_text.T, targets[1])) / 2
        log |= {"loss": loss.item(), "accuracy": (by_text.argmax(1) == positive.argmax(1)).float().mean().item()}
        yield "model", loss

    def _held_out(self) -> tuple[list[int], Tensor]:
        """Return rows [n] of held-out images, and the cosines [n, n] of their captions with them."""
        model = self._model()
        picked = held_out_sample(len(self.singles["test"]))
        rows = self.singles["test"].select(picked)
        text, images = TextImageEncoder(model, self.tokenizer).embed(list(rows["caption"]), list(rows["image"]))
        return picked, (text @ images.T).cpu()

    def evaluate(self) -> dict[str, float]:
        """Recall on held-out concepts."""
        return recall(self._held_out()[1])

    def sample(self) -> Image.Image:
        """Eight held-out images, each before the seven that its caption ranks first."""
        rows, cosines = self._held_out()
        ranking = torch.cat([torch.arange(8)[:, None], cosines[:8].topk(7, dim=1).indices], dim=1)
        images = torch.from_numpy(pixels(self.singles["test"], SIZE))[torch.tensor(rows)[ranking]]  # [8, 8, H, W, 3]
        return Image.fromarray(rearrange(images, "r c h w d -> (r h) (c w) d").numpy())

    def save(self, folder: Path) -> None:
        model = self._model()
        model.to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def positives(captions: list[str], keys: list[tuple[str, str]]) -> Tensor:
    """[B, B] bool: does caption i describe picture j too (same name; same style where the caption says one)?"""
    prompts = tuple(style.prompt for style in STYLES.values())
    names = [key[0] for key in keys]
    same = torch.tensor([[a == b for b in names] for a in names])
    styles = [key[1] for key in keys]
    free = torch.tensor([not text.endswith(prompts) for text in captions])
    same_style = torch.tensor([[a == b for b in styles] for a in styles])
    return same & (same_style | free[:, None])


RECIPE = Recipe(CLIPTask, SCHEDULES, takes=("scenes",))
