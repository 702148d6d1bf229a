"""Text to image with DALL-E mini or mega, from the published weights in PyTorch (``kuprel/min-dalle``)."""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from argen.models.dalle_mini import PAD, DalleMiniDecoder, DalleMiniEncoder, text_tokenizer, tokenize
from argen.models.session import DecoderSession
from argen.pipelines.base import Defaults, TokenPipeline
from argen.pipelines.prompts import distinct
from argen.request import Control
from tokenizers_img.vqgan import VQGANDetokenizer


class DalleMiniPipeline(TokenPipeline):
    """Args:
    tokenizer: of the text.
    encoder, transformer: text encoder and image-token decoder.
    image_tokenizer: decodes tokens to pixels.
    """

    official = Defaults(guidance_scale=16.0, top_k=256)
    model_cpu_offload_seq = "encoder->transformer->image_tokenizer"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        encoder: DalleMiniEncoder,
        transformer: DalleMiniDecoder,
        image_tokenizer: VQGANDetokenizer,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, encoder=encoder, transformer=transformer, image_tokenizer=image_tokenizer
        )

    @staticmethod
    def original_files(size: str) -> list[str]:
        """Names of the released files that `from_original` reads."""
        suffix = "_mini" if size == "mini" else ""
        return [
            f"vocab{suffix}.json",
            f"merges{suffix}.txt",
            f"encoder{suffix}.pt",
            f"decoder{suffix}.pt",
            "detoker.pt",
        ]

    @classmethod
    def from_original(cls, folder: str | Path, size: str = "mini") -> "DalleMiniPipeline":
        """Load the released files of `size` "mini" or "mega" out of a folder, with their released names."""
        vocab, merges, encoder, decoder, detokenizer = (Path(folder) / name for name in cls.original_files(size))
        return cls(
            tokenizer=text_tokenizer(vocab, merges),
            encoder=DalleMiniEncoder.from_original(encoder, size),
            transformer=DalleMiniDecoder.from_original(decoder, size),
            image_tokenizer=VQGANDetokenizer.from_original(detokenizer),
        )

    @property
    def length(self) -> int:
        return self.transformer.length

    def start(
        self,
        prompts: list[str],
        guided: bool,
        shape: tuple[int, int] | None = None,
        controls: list[Control] | None = None,
    ) -> DecoderSession:
        """See `TokenPipeline.start`."""
        texts, rows = distinct(prompts, guided)
        ids = tokenize(self.tokenizer, texts, self.encoder.config.max_length).to(self.device)
        with self.stage("text"):
            encoded = self.encoder(ids)
        return DecoderSession(self.transformer, encoded[rows], ids[rows] != PAD, guided)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Raises:
        ValueError: always; see `TokenPipeline.encode_images`.
        """
        raise ValueError("DALL-E mini was published without its image encoder: choose another model to edit with")

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """See `TokenPipeline.decode_tokens`."""
        return self.image_tokenizer.decode(tokens.flatten(1)).clamp(0, 1)
