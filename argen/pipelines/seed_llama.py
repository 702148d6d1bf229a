"""Text to image and image to text with SEED-LLaMA (arXiv 2310.01218): one language model over both."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase, TextIteratorStreamer

from argen.bounds import check
from argen.files import WEIGHTS
from argen.hub.cards import list_models
from argen.models.files import complete
from argen.models.seed_llama import (
    CLOSE,
    OPEN,
    SeedLlamaSession,
    Vocabulary,
    image_text,
    likelihoods,
    read_tokenizer,
)
from argen.models.tokenizers import SEED_FILE, read_emoji_seed, read_saved_seed, read_seed
from argen.pipelines.base import Defaults, TokenPipeline
from argen.pipelines.canvas import TokenSequence
from argen.request import Control
from argen.words import check_length
from tokenizers_img.hub import hub_folder
from tokenizers_img.seed.tokenizer import SeedTokenizer

REQUEST = "Please generate an image of {}."  # a template of the instruction tuning


@dataclass(frozen=True)
class Format:
    """Prompt format of a model.

    Attributes:
        ask: template of a user turn; the model continues it.
        answer: template of a past model turn, in a longer conversation.
        request: template of an image request; the tuned models expect a sentence.
    """

    ask: str
    answer: str = "{}"
    request: str = "{}"

    @property
    def answers(self) -> bool:
        """Whether the model was trained to answer."""
        return self.ask != "{}"


FORMATS = {
    "8b-sft": Format("USER: {}\nASSISTANT:", " {}\n", REQUEST),
    "14b-sft": Format("[INST] {} [/INST]\n", "{}\n", REQUEST),
    "pretrain": Format("{}"),
    "emoji": Format("{}"),  # supports guidance, since it was trained without captions, too
}


class SeedLlamaPipeline(TokenPipeline):
    """Args:
    transformer: the language model.
    tokenizer: of its words, from `argen.models.seed_llama.read_tokenizer`.
    image_tokenizer: of its images.
    format: a name of `FORMATS`.

    Raises:
        ValueError: an unknown format; a language model without image tokens, or with those of another tokenizer.
    """

    canvas = TokenSequence()
    samplers = ("auto", "sequential")  # its tokens form no grid, and it has no drafter
    model_cpu_offload_seq = "transformer->image_tokenizer"

    def __init__(
        self,
        transformer: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        image_tokenizer: SeedTokenizer,
        format: str = "8b-sft",
    ):
        super().__init__()
        if format not in FORMATS:
            raise ValueError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
        self.register_to_config(format=format)
        self.register_modules(transformer=transformer, tokenizer=tokenizer, image_tokenizer=image_tokenizer)
        self.words = Vocabulary.of(tokenizer)
        if self.words.codes != image_tokenizer.config.n_embed:
            raise ValueError(
                f"the language model has words for {self.words.codes} codes, the image tokenizer {image_tokenizer.config.n_embed}: "
                "expected a model of this tokenizer"
            )

    def save_pretrained(self, save_directory: str | Path, **arguments) -> None:
        """See `TokenPipeline.save_pretrained`; diffusers knows no such image tokenizer, so that it saves itself."""
        logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
        level = logger.level
        logger.setLevel(logging.ERROR)  # or it warns that it cannot save what is saved here
        try:
            super().save_pretrained(save_directory, **arguments)
            self.image_tokenizer.save_pretrained(Path(save_directory) / "image_tokenizer")
        finally:
            logger.setLevel(level)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> TokenPipeline:
        """See `TokenPipeline.from_pretrained`."""
        images = Path(pretrained_model_name_or_path) / "image_tokenizer"
        if "image_tokenizer" not in arguments and images.is_dir():
            arguments["image_tokenizer"] = read_saved_seed(images)
        return super().from_pretrained(pretrained_model_name_or_path, **arguments)

    @property
    def format(self) -> Format:
        return FORMATS[self.config.format]

    @property
    def official(self) -> Defaults:
        """Those of the authors' scripts, which do not guide."""
        tuned = self.config.format not in ("pretrain", "emoji")
        return Defaults(guidance_scale=1.0, top_k=50, top_p=0.5 if tuned else 1.0)

    @property
    def length(self) -> int:
        return self.image_tokenizer.network.config.tokens

    def shape_of(self, control: Control | None = None, num_tokens: int | None = None) -> tuple[int, int]:
        """See `TokenPipeline.shape_of`: one row."""
        super().shape_of(control, num_tokens)
        return 1, self.length

    def start(
        self,
        prompts: list[str],
        guided: bool,
        shape: tuple[int, int] | None = None,
        controls: list[Control] | None = None,
    ) -> SeedLlamaSession:
        """See `TokenPipeline.start`; without a prompt any image is requested."""
        rows = [self.encode_text(self.format.ask.format(self.request(prompt))) for prompt in prompts]
        rows += [self.encode_text("")] * len(prompts) if guided else []
        return SeedLlamaSession(self.transformer, rows, guided, self.words, self.length)

    def request(self, prompt: str) -> str:
        """Format a caption as a request; sentences are returned unchanged."""
        caption = prompt.strip()
        return caption if re.search(r"[.?!]$", caption) else self.format.request.format(caption)

    def encode_text(self, text: str) -> list[int]:
        """Tokenize a text, which may hold image tokens -> ids that begin with the BOS token."""
        return self.tokenizer("<s>" + text, add_special_tokens=False).input_ids

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Ids [B, 1, N] -> pixels [B, 3, H, W] in [0, 1]."""
        return self.image_tokenizer.decode(tokens[:, 0]).clamp(0, 1)

    @torch.no_grad()
    def read(self, image: Image.Image) -> list[int]:
        """Encode an image to its codes."""
        pixels = self.image_tokenizer.prepare(image)[None].to(self.device)
        with self.stage("image"):
            return self.image_tokenizer.encode(pixels)[0].tolist()

    def likelihoods(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Return the gain in log-likelihood of each caption by each image, in nats [B, captions]; the largest of a row is the best caption.
        For models that caption without a question, e.g. argen/emoji-seed-lm."""
        parts, codes = (self.transformer, self.tokenizer, self.words), [self.read(image) for image in images]
        self.bring("tokens")
        return likelihoods(*parts, codes, captions) - likelihoods(*parts, [()], captions)

    def describe(self, image: Image.Image, question: str = "", **settings) -> str:
        """Describe an image.

        Args:
            question: about the image; without one it is captioned.
            settings: of `chat`.

        Raises:
            ValueError: a question to a model that was not trained to answer any.
        """
        check_length(question, "the question")
        if question.strip() and not self.format.answers:
            name = self.card.id if self.card else "this model"
            raise ValueError(
                f"{name} only writes captions: leave the question out, or choose a model that answers, {' or '.join(answering())}"
            )
        return "".join(part for part in self.chat([[image, question]], **settings) if isinstance(part, str)).strip()

    def chat(
        self,
        turns: Sequence[Sequence[str | Image.Image]],
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 0.5,
        seed: int = 0,
    ) -> Iterator[str | Image.Image]:
        """Generate the next turn of the model; yields pieces of text as they are written, and images.

        Args:
            turns: of the conversation, alternating and the user first, each a list of texts and images.
            max_new_tokens, temperature, top_p: of the answer; 0 takes the most probable word each time.

        Raises:
            ValueError: a number is out of bounds, or a text of the user longer than `argen.words.MAX_PROMPT` characters.
        """
        for name, value in {"temperature": temperature, "top_p": top_p, "seed": seed}.items():
            check(name, value)
        for part in [part for turn in turns[::2] for part in turn if isinstance(part, str)]:
            check_length(part, "the question")
        text = ""
        for index, turn in enumerate(turns):
            content = "".join(part if isinstance(part, str) else image_text(self.read(part)) for part in turn)
            text += (self.format.answer if index % 2 else self.format.ask).format(content)
        ids = torch.tensor([self.encode_text(text)], device=self.device)
        torch.manual_seed(seed)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
        )
        tokenizer = self.tokenizer  # its ids, since those in the 8B's config are wrong
        special_tokens = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id or 0,
        }
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=False)
        inputs = {
            "inputs": ids,
            "attention_mask": torch.ones_like(ids),
            "streamer": streamer,
            **sampling,
            **special_tokens,
        }
        failure: list[Exception] = []

        def write() -> None:
            try:
                self.transformer.generate(**inputs, max_new_tokens=max_new_tokens)
            except Exception as error:
                failure.append(error)
                streamer.end()  # else the reader waits for ever

        self.bring("tokens")
        thread = Thread(target=write, daemon=True)
        thread.start()
        yield from self._parts(streamer)
        thread.join()
        if failure:
            raise failure[0]

    def _parts(self, pieces: Iterator[str]) -> Iterator[str | Image.Image]:
        """Convert streamed text to text without image tokens, and images."""
        buffer = ""
        for piece in pieces:
            buffer += piece.replace(self.tokenizer.eos_token, "")
            while OPEN in buffer:
                before, _, rest = buffer.partition(OPEN)
                if before:
                    yield before
                inside, closed, after = rest.partition(CLOSE)
                buffer = OPEN + inside
                if not closed:
                    break
                codes = [int(code) for code in re.findall(r"<img_(\d+)>", inside)]
                if len(codes) == self.length:
                    yield self.images(torch.tensor([[codes]], device=self.device))[0]
                buffer = after
            if buffer and OPEN not in buffer:
                yield buffer
                buffer = ""


def answering() -> list[str]:
    """Ids of the models that answer questions about images."""
    forms = {card.id: card.arguments.get("form") for card in list_models("generator")}
    return [id for id, form in forms.items() if form in FORMATS and FORMATS[form].answers]


def read_emoji(folder: Path) -> SeedLlamaPipeline:
    """argen/emoji-seed-lm."""
    loaded: Any = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )  # and what is missing
    text_tokenizer = AutoTokenizer.from_pretrained(folder)
    return SeedLlamaPipeline(complete(*loaded), text_tokenizer, read_emoji_seed(WEIGHTS / "emoji-seed"), "emoji")


def read_release(folder: Path, form: str) -> SeedLlamaPipeline:
    """A released SEED-LLaMA; `form` of its prompts is "8b-sft", "14b-sft" or "pretrain"."""
    files = hub_folder("AILab-CVC/seed-tokenizer-2", (SEED_FILE, "tokenizer.model", "*.json"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return SeedLlamaPipeline(model, read_tokenizer(files), read_seed(files), form)
