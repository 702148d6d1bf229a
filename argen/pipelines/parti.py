"""Text to image with a Parti-style generator (arXiv 2206.10789) over ViT-VQGAN tokens."""

import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast

from argen.files import WEIGHTS
from argen.models.clip import TextImageEncoder
from argen.models.files import load_network, read_encoder
from argen.models.parti import Parti
from argen.models.session import DecoderSession
from argen.pipelines.base import Defaults, TokenPipeline
from argen.pipelines.canvas import check_grids
from argen.pipelines.prompts import distinct
from argen.request import Control
from tokenizers_img.vit_vqgan import ViTVQGAN

logger = logging.getLogger(__name__)


class PartiPipeline(TokenPipeline):
    """Args:
    clip: its text encoder conditions the generator, both encoders rank candidates.
    tokenizer: of the text.
    transformer: the generator.
    image_tokenizer: decodes tokens to pixels.
    """

    official = Defaults(guidance_scale=1.5, temperature=0.9, top_k=256)
    model_cpu_offload_seq = "clip->transformer->image_tokenizer"

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: PreTrainedTokenizerFast,
        transformer: Parti,
        image_tokenizer: ViTVQGAN,
    ):
        super().__init__()
        check_grids(transformer, image_tokenizer)
        self.register_modules(clip=clip, tokenizer=tokenizer, transformer=transformer, image_tokenizer=image_tokenizer)

    @property
    def length(self) -> int:
        return self.transformer.length

    def encode_text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode prompts -> hidden states [B, T, text_dim] of the text encoder, mask [B, T] bool."""
        longest = self.tokenizer.model_max_length
        if any(len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids) > longest for prompt in prompts):
            logger.warning("the prompt is longer than %d text tokens: the rest of it is not read", longest)
        with self.stage("text"):
            states, mask = TextImageEncoder(self.clip, self.tokenizer).states(prompts)
        return states.to(self.transformer.dtype), mask

    def start(
        self,
        prompts: list[str],
        guided: bool,
        shape: tuple[int, int] | None = None,
        controls: list[Control] | None = None,
    ) -> DecoderSession:
        """See `TokenPipeline.start`."""
        texts, rows = distinct(prompts, guided)
        states, mask = self.encode_text(texts)
        encoded = self.transformer.encode_text(states, mask)
        return DecoderSession(self.transformer, encoded[rows], mask[rows], guided)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """See `TokenPipeline.decode_tokens`."""
        return self.image_tokenizer.decode(tokens.flatten(1)).clamp(0, 1)

    def blank_tokens(self, shape: tuple[int, int]) -> Tensor:
        """See `TokenPipeline.blank_tokens`: those of a white image."""
        size = self.image_tokenizer.config.image_size
        white = torch.ones(1, 3, size, size, device=self.device, dtype=self.image_tokenizer.dtype)
        return self.image_tokenizer.encode(white)[0].unflatten(0, shape)


def read_emoji(folder: Path) -> PartiPipeline:
    """argen/emoji-parti."""
    encoder = read_encoder(WEIGHTS / "emoji-clip")
    return PartiPipeline(
        clip=encoder.clip,
        tokenizer=encoder.tokenizer,
        transformer=load_network(Parti, folder),
        image_tokenizer=load_network(ViTVQGAN, WEIGHTS / "emoji-vitvqgan"),
    )
