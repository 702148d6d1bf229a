"""Class- and text-to-image with LlamaGen (arXiv 2406.06525)."""

from functools import partial
from pathlib import Path

import torch
from diffusers import VQModel
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast, T5EncoderModel

from argen.files import WEIGHTS
from argen.models.drafter import Drafter
from argen.models.files import emoji_text, load_network
from argen.models.llamagen import LlamaGen
from argen.models.llamagen_files import read_generator
from argen.models.session import LlamaGenSession
from argen.models.t5 import read_t5, text_features
from argen.pipelines.base import Defaults, TokenPipeline
from argen.pipelines.canvas import check_grids
from argen.request import Control
from tokenizers_img.checkpoint import read_state_dict
from tokenizers_img.llamagen_vq import LlamaGenVQ
from tokenizers_img.vit_vqgan import ViTVQGAN


class LlamaGenPipeline(TokenPipeline):
    """Args:
    transformer: the generator.
    vq: the network of its image tokenizer.
    text_encoder, tokenizer: for a model of captions; None for a model of classes. They are flan-t5-xl's as published;
        the shipped model has a CLIP, which can rank candidates, too.
    groups: names that a model of captions takes as "class:NAME".
    class_names: those of a model of classes; None for ImageNet's, or numbers.
    drafter: of the generator, for the samplers "speculative" and "lantern".
    """

    model_cpu_offload_seq = "text_encoder->transformer->vq"
    _optional_components = ["text_encoder", "tokenizer", "drafter"]

    def __init__(
        self,
        transformer: LlamaGen,
        vq: VQModel | ViTVQGAN,
        text_encoder: T5EncoderModel | CLIPModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        groups: list[str] | None = None,
        drafter: Drafter | None = None,
        class_names: list[str] | None = None,
    ):
        super().__init__()
        check_grids(transformer, vq)
        self.register_to_config(groups=groups, class_names=class_names)
        self.register_modules(
            transformer=transformer, vq=vq, text_encoder=text_encoder, tokenizer=tokenizer, drafter=drafter
        )

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
    def official(self) -> Defaults:
        """Those of the official scripts."""
        by_class = self.transformer.config.classes is not None
        return Defaults(guidance_scale=4.0, top_k=2000) if by_class else Defaults(guidance_scale=7.5, top_k=1000)

    @property
    def length(self) -> int:
        return self.transformer.length

    @property
    def looks_ahead(self) -> bool:
        return self.transformer.config.looks_ahead

    @property
    def image_tokenizer(self) -> LlamaGenVQ | ViTVQGAN:
        return self.vq if isinstance(self.vq, ViTVQGAN) else LlamaGenVQ(self.vq)

    def start(
        self,
        prompts: list[str],
        guided: bool,
        shape: tuple[int, int] | None = None,
        controls: list[Control] | None = None,
        grid: Tensor | None = None,
    ) -> LlamaGenSession:
        """See `TokenPipeline.start`. A prompt is a class (`argen.data.imagenet.class_id`) or a caption.

        Raises:
            ValueError: there is no such class.
        """
        if self.transformer.config.classes is not None:
            condition = torch.tensor([self.class_of(prompt) for prompt in prompts], device=self.device)
            mask = torch.ones(len(prompts), 1, dtype=torch.bool, device=self.device)
        else:
            condition, mask = self.encode_text(prompts)
        control_states = self.control(controls) if controls else None
        if guided:
            condition = torch.cat([condition, self.transformer.unconditional(condition)])
            mask = torch.cat([mask, mask])  # the caption's mask hides "none", too
            control_states = (
                None if control_states is None else torch.cat([control_states, torch.zeros_like(control_states)], dim=1)
            )
        columns = (shape or self.shape_of())[1]
        embedded = self.transformer.cls_embedding(condition)
        return LlamaGenSession(
            self.transformer,
            embedded,
            mask,
            guided,
            control_states,
            columns,
            self.drafter,
            self.image_tokenizer.codebook.to(self.device),
            grid,
        )

    def control(self, controls: list[Control]) -> Tensor:
        """Encode prepared controls to hidden states that are added to the stream, as `LlamaGenSession` takes them."""
        raise NotImplementedError

    def encode_text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode captions -> left-padded text features [B, T, C], mask [B, T] bool."""
        length = self.transformer.config.caption_length
        if not isinstance(self.text_encoder, CLIPModel):
            states, mask = self.text_features([clean_caption(prompt) for prompt in prompts])
            return left_padded(states.to(self.transformer.dtype), mask)
        texts = [self.caption(prompt) for prompt in prompts]
        text = self.tokenizer(texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        with self.stage("text"):
            text = text.to(self.device)
            encoder = self.text_encoder.text_model
            states = encoder(input_ids=text.input_ids, attention_mask=text.attention_mask).last_hidden_state
        return left_padded(states.to(self.transformer.dtype), text.attention_mask)

    def text_features(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode cleaned captions by T5 -> right-padded text features [B, T, C], mask [B, T]."""
        length = self.transformer.config.caption_length
        stage = partial(self.stage, "text")
        return text_features(self.text_encoder, self.tokenizer, texts, self.device, length, stage)

    def encode_ahead(self, prompts: list[str]) -> None:
        """See `TokenPipeline.encode_ahead`."""
        if isinstance(self.text_encoder, T5EncoderModel):
            self.text_features([clean_caption(prompt) for prompt in prompts])

    @property
    def image_size(self) -> int:
        fixed = isinstance(self.vq, ViTVQGAN)
        return self.vq.config.image_size if fixed else self.image_tokenizer.stride * self.transformer.config.grid

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """See `TokenPipeline.decode_tokens`. The shipped image tokenizer has one size: smaller grids are padded with blanks."""
        _, rows, columns = tokens.shape
        if not isinstance(self.vq, ViTVQGAN):
            return LlamaGenVQ(self.vq).decode(tokens.flatten(1), (rows, columns)).clamp(0, 1)
        side, cell = self.vq.grid, self.vq.stride
        grid = self.blank_tokens((side, side)).repeat(len(tokens), 1, 1)
        grid[:, :rows, :columns] = tokens
        return self.vq.decode(grid.flatten(1))[..., : cell * rows, : cell * columns].clamp(0, 1)

    def blank_tokens(self, shape: tuple[int, int]) -> Tensor:
        """See `TokenPipeline.blank_tokens`: those of a white image."""
        fixed = isinstance(self.vq, ViTVQGAN)
        size = (self.vq.config.image_size,) * 2 if fixed else [self.image_tokenizer.stride * side for side in shape]
        white = torch.ones(1, 3, *size, device=self.device, dtype=self.vq.dtype)
        ids = self.image_tokenizer.encode(white)[0]
        return ids.unflatten(0, (self.vq.grid, -1))[: shape[0], : shape[1]] if fixed else ids.unflatten(0, shape)


def clean_caption(text: str) -> str:
    """Clean a caption as the official code does for T5: PixArt's clean-up, twice (needs ftfy and beautifulsoup4)."""
    from diffusers import PixArtAlphaPipeline

    for _ in range(2):
        text = PixArtAlphaPipeline._clean_caption(PixArtAlphaPipeline, text)
    return text


def left_padded(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Convert right-padded features [B, T, C] and mask [B, T] to left-padded ones, with zeros as padding."""
    rows = [torch.roll(row, -int(words.sum()), dims=0) for row, words in zip(features, mask, strict=True)]
    flipped = mask.flip(1).bool()
    return torch.stack(rows) * flipped[..., None], flipped


def read_emoji(folder: Path) -> LlamaGenPipeline:
    """argen/emoji-llamagen, with its drafter."""
    vq, drafter = load_network(ViTVQGAN, WEIGHTS / "emoji-vitvqgan"), load_network(Drafter, WEIGHTS / "emoji-drafter")
    return LlamaGenPipeline(load_network(LlamaGen, folder), vq, **emoji_text(), drafter=drafter)


def read_release(folder: Path, name: str) -> LlamaGenPipeline:
    """`name` is that of the released file, e.g. "c2i_L_384"; its image tokenizer lies beside it."""
    kind, size, *_, pixels = name.split("_")
    text = read_t5() if kind == "t2i" else (None, None)
    files = folder / f"{name}.pt", folder / f"vq_ds16_{kind}.pt"
    return LlamaGenPipeline.from_original(*files, size, int(pixels) // 16, *text)


def read_checkpoint(
    path: Path, tokenizer: str | Path | None = None, image_size: int | None = None
) -> LlamaGenPipeline | LlamaGenVQ:
    """Load a LlamaGen with its tokenizer, or a tokenizer alone, from checkpoints of any size and name."""
    names = read_state_dict(path, averaged=False).keys()
    if any(name.endswith(".qweight") for name in names):
        raise ValueError(f"{path} is the network of a quantized pipeline: load the folder that `argen quantize` wrote")
    if "encoder.conv_in.weight" in names:
        return LlamaGenVQ.from_checkpoint(path)
    kind = "t2i" if any("cap_proj" in name for name in names) else "c2i"
    beside = (path if path.is_dir() else path.parent) / f"vq_ds16_{kind}.pt"
    if tokenizer is None and not beside.is_file():
        raise ValueError(f"no {beside.name} lies beside {path}: give its image tokenizer, --tokenizer FILE")
    images = LlamaGenVQ.from_checkpoint(tokenizer or beside)
    generator = read_generator(path, images.stride, image_size)
    if tokenizer is not None and images.config.n_embed != generator.config.n_embed:
        raise ValueError(
            f"the tokenizer {tokenizer} has {images.config.n_embed} codes, {path} writes "
            f"{generator.config.n_embed}: give --tokenizer the one it was trained with"
        )
    return LlamaGenPipeline(generator, images.vq, *(read_t5() if kind == "t2i" else ()))
