"""Recipe `emoji-parti`: text to the tokens of `emoji-vitvqgan`, conditioned on the text states of `emoji-clip`."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel

from argen.data.emoji import caption
from argen.data.tables import pixels, read_split
from argen.models.parti import Parti
from argen.models.session import DecoderSession
from argen.train.loop import Schedule, Task
from samplers.logits import Sampling, uniforms
from samplers.steps import Plain
from tokenizers_img.pixels import from_uint8
from tokenizers_img.vit_vqgan import ViTVQGAN

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
SCENES_SHARE = 0.12
TEXT_DROPOUT = 0.1
CORRUPTION = 0.15  # at most this share of the tokens that are read is another picture's: sampling will slip, too


class PartiTask(Task):
    """Args:
    data, scenes: folders made by ``argen data emoji`` and ``argen data scenes``.
    tokenizer, clip: folders of the trained `emoji-vitvqgan` and `emoji-clip`.
    first_stage: folder of a trained `emoji-parti`, to go on from without dropout.
    """

    def __init__(self, data: Path, scenes: Path, tokenizer: Path, clip: Path, first_stage: Path | None = None):
        self.vq = ViTVQGAN.from_pretrained(tokenizer).float().eval()
        self.text_tokenizer = AutoTokenizer.from_pretrained(clip)
        self.text_encoder = CLIPTextModel.from_pretrained(clip, dtype=torch.float32).eval().requires_grad_(False)

        table = read_split(data, "train")
        self.rows, pictures = table.remove_columns("image").to_list(), torch.from_numpy(pixels(table))
        self.picture_tokens = self.tokens(pictures)
        table = read_split(scenes, "train")
        self.scene_captions = list(table["caption"])
        self.scene_tokens = self.tokens(torch.from_numpy(pixels(table)))
        table = read_split(data, "validation")
        self.held_out_captions = list(table["caption"])
        self.held_out_tokens = self.tokens(torch.from_numpy(pixels(table)))

        tones = Counter((row["concept"], row["style"]) for row in self.rows)  # these share one picture's weight
        self.weights = torch.tensor([1 / tones[row["concept"], row["style"]] for row in self.rows])

        if first_stage is not None:
            model = Parti.from_pretrained(first_stage, dropout=0.0).float()
            self.networks: dict[str, nn.Module] = {"model": model}
            return
        config = self.vq.config
        model = Parti(self.text_encoder.config.hidden_size, config.n_embed, config.image_size // config.patch_size)
        codes = F.normalize(self.vq.quantizer.embedding.weight.detach(), dim=-1)
        spread = torch.randn(codes.shape[1], model.config.dim, generator=torch.Generator().manual_seed(0))
        model.embed_tokens.weight.data[:-1] = 0.02 * (codes @ spread)  # near codes start as near embeddings
        self.networks: dict[str, nn.Module] = {"model": model}

    @torch.no_grad()
    def tokens(self, pictures: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 -> ids [B, N]; in fp32, because bf16 changes every fifth id."""
        return torch.cat([self.vq.encode(from_uint8(part)) for part in pictures.split(128)])

    def text(self, captions: list[str]) -> dict[str, Tensor]:
        text = self.text_tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        return {"input_ids": text.input_ids, "attention_mask": text.attention_mask}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        scenes = int(size * SCENES_SHARE)
        chosen = torch.multinomial(self.weights, size - scenes, generator=generator)
        others = torch.randint(len(self.scene_captions), (scenes,), generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        rows = [self.rows[index] for index in chosen.tolist()]
        captions = [caption(row["name"], row["style"], row["keywords"], rng) for row in rows]
        captions += [self.scene_captions[index] for index in others.tolist()]
        captions = ["" if rng.random() < TEXT_DROPOUT else text for text in captions]
        tokens = torch.cat([self.picture_tokens[chosen], self.scene_tokens[others]])
        share = CORRUPTION * torch.rand(size, 1, generator=generator)
        slipped = torch.rand(tokens.shape, generator=generator) < share
        read = torch.where(slipped, tokens[torch.randperm(size, generator=generator)], tokens)
        return {"tokens": tokens, "read": read, **self.text(captions)}

    def encode_text(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        self.text_encoder.to(batch["input_ids"].device)
        with torch.no_grad():
            states = self.text_encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return states.last_hidden_state, batch["attention_mask"].bool()

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        logits = self.networks["model"](*self.encode_text(batch), batch["read"])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["tokens"].flatten())
        log["loss"] = loss.item()
        yield "model", loss

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Nats a token on held-out (style, concept) combinations."""
        model = self._model()
        losses = []
        for first in range(0, len(self.held_out_captions), 64):
            batch = {
                **self.text(self.held_out_captions[first : first + 64]),
                "tokens": self.held_out_tokens[first : first + 64],
            }
            batch = {key: value.to(model.device) for key, value in batch.items()}
            logits = model(*self.encode_text(batch), batch["tokens"])
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), batch["tokens"].flatten(), reduction="none"))
        return {"held-out loss": torch.cat(losses).mean().item()}

    @torch.no_grad()
    def sample(self) -> Image.Image:
        """32 held-out combinations, drawn with guidance 3."""
        model, step = self._model(), max(1, len(self.held_out_captions) // 32)
        captions = self.held_out_captions[::step][:32]
        both = {key: value.to(model.device) for key, value in self.text([*captions, *[""] * len(captions)]).items()}
        states, mask = self.encode_text(both)
        half = len(captions)
        session = DecoderSession(model, model.encode_text(states, mask), mask, guided=True)
        grid = torch.full((half, model.length), -1, device=model.device)
        luck = uniforms([torch.Generator().manual_seed(i) for i in range(half)], model.length)
        for state in Plain()(session, grid, Sampling(top_k=256), 3.0, luck):
            grid = state.tokens
        pictures = self.vq.decode(grid.to(self.vq.device)).float().clamp(0, 1).cpu()
        sheet = rearrange(pictures, "(r c) d h w -> (r h) (c w) d", c=8)
        return Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())

    def _model(self) -> Parti:
        return getattr(self.networks["model"], "module", self.networks["model"])

    def save(self, folder: Path) -> None:
        self._model().to(torch.bfloat16).save_pretrained(folder)
