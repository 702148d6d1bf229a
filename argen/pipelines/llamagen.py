"""Pictures from classes or captions with LlamaGen (arXiv 2406.06525)."""

from pathlib import Path

import torch
from diffusers import PixArtAlphaPipeline, VQModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from argen.data.imagenet import class_id
from argen.models.llamagen import LlamaGen, LlamaGenSession
from argen.pipelines.base import Defaults, TokenPipeline
from argen.request import check_prompt
from tokenizers_img.llamagen_vq import LlamaGenVQ


class LlamaGenPipeline(TokenPipeline):
    """Args:
    transformer: the generator.
    vq: the network of its picture tokenizer.
    text_encoder, tokenizer: flan-t5-xl's, for a model of captions; None for a model of classes.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vq"
    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: LlamaGen,
        vq: VQModel,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vq=vq, text_encoder=text_encoder, tokenizer=tokenizer)

    @classmethod
    def from_original(
        cls,
        generator: str | Path,
        image_tokenizer: str | Path,
        size: str,
        grid: int,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> "LlamaGenPipeline":
        """Load released files, as ``c2i_L_384.pt`` and ``vq_ds16_c2i.pt``; `size` and `grid` as in `LlamaGen.from_original`.

        With a text encoder the generator is one of captions.
        """
        classes = 1000 if text_encoder is None else None
        transformer = LlamaGen.from_original(generator, size, grid, classes)
        return cls(transformer, LlamaGenVQ.from_original(image_tokenizer).vq, text_encoder, tokenizer)

    @property
    def defaults(self) -> Defaults:
        """Those of the official scripts."""
        by_class = self.transformer.config.classes is not None
        return Defaults(guidance_scale=4.0, top_k=2000) if by_class else Defaults(guidance_scale=7.5, top_k=1000)

    @property
    def length(self) -> int:
        return self.transformer.length

    def start(self, prompts: list[str], guided: bool) -> LlamaGenSession:
        """See `TokenPipeline.start`. A prompt is a class (`argen.data.imagenet.class_id`) or a caption.

        Raises:
            ValueError: an empty or endless prompt, or no such class.
        """
        for prompt in dict.fromkeys(prompts):
            check_prompt(prompt)
        embed = self.transformer.cls_embedding
        if self.transformer.config.classes is not None:
            ids = torch.tensor([class_id(prompt) for prompt in prompts], device=self.device)
            embedded, none = embed(ids), embed(torch.full_like(ids, self.transformer.config.classes))
            mask = torch.ones(len(ids), 1, dtype=torch.bool, device=self.device)
        else:
            features, mask = self.encode_text(prompts)
            embedded, none = embed(features), embed(embed.uncond_embedding.expand(len(prompts), -1, -1))
        if guided:
            embedded, mask = (
                torch.cat([embedded, none]),
                torch.cat([mask, mask]),
            )  # the caption's mask hides "none", too
        return LlamaGenSession(self.transformer, embedded, mask, guided)

    def encode_text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> T5 features [B, T, C] with the words at the end and zeros before, mask [B, T] bool."""
        length = self.transformer.config.caption_length
        texts = [clean_caption(prompt) for prompt in prompts]
        text = self.tokenizer(texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        text = text.to(self.device)
        states = self.text_encoder(input_ids=text.input_ids, attention_mask=text.attention_mask).last_hidden_state
        return left_padded(states.to(self.transformer.dtype), text.attention_mask)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """See `TokenPipeline.decode_tokens`."""
        return LlamaGenVQ(self.vq).decode(tokens).clamp(0, 1)

    def blank_tokens(self) -> Tensor:
        """See `TokenPipeline.blank_tokens`: those of a white picture."""
        tokenizer, side = LlamaGenVQ(self.vq), int(self.length**0.5)
        size = side * tokenizer.stride
        return tokenizer.encode(torch.ones(1, 3, size, size, device=self.device, dtype=self.vq.dtype))[0]


def clean_caption(text: str) -> str:
    """What the official code hands to T5: the PixArt clean-up, twice (it needs ftfy and beautifulsoup4)."""
    for _ in range(2):
        text = PixArtAlphaPipeline._clean_caption(PixArtAlphaPipeline, text)
    return text


def left_padded(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, T, C] and mask [B, T] with the words first -> with the words last, and zeros elsewhere."""
    rows = [torch.roll(row, -int(words.sum()), dims=0) for row, words in zip(features, mask, strict=True)]
    flipped = mask.flip(1).bool()
    return torch.stack(rows) * flipped[..., None], flipped
