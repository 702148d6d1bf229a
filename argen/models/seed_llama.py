"""SEED-LLaMA: a Llama whose words include the codes of SEED, so that it reads and writes pictures (arXiv 2310.01218).

Weights: ``AILab-CVC/seed-llama-{8b,14b}-{sft,pretrain}`` (Llama 2's licence), with the text tokenizer of
``AILab-CVC/seed-tokenizer-2``. The network is transformers' own.

Letters in shape comments: B images, R rows (2B under guidance), N codes of a picture, T text tokens, K codes there are.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerBase

OPEN, CLOSE = "<img>", "</img>"


def code_word(code: int) -> str:
    """How a code is written in a prompt."""
    return f"<img_{code:05}>"


def codes_among(words: Iterable[str]) -> int:
    """How many of some words are codes."""
    return sum(bool(re.fullmatch(r"<img_\d+>", word)) for word in words)


def image_text(ids: Sequence[int]) -> str:
    """Codes of a picture -> its words, for a prompt."""
    return OPEN + "".join(map(code_word, ids)) + CLOSE


def read_tokenizer(folder: str | Path) -> LlamaTokenizer:
    """The text tokenizer of a published folder, with the ids that the authors' code had (transformers 4.30): white space beside the words
    of a picture falls away.

    Raises:
        ModuleNotFoundError: sentencepiece is not installed.
    """
    import sentencepiece  # noqa: F401, which transformers reads the file with

    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True)
    add_words(tokenizer, codes_among(tokenizer.get_added_vocab()))
    return tokenizer


def add_words(tokenizer: PreTrainedTokenizerBase, codes: int) -> None:
    """Give a tokenizer the words of pictures of so many codes; those that it has keep their ids."""
    words = [*map(code_word, range(codes)), OPEN, CLOSE]
    tokenizer.add_tokens([AddedToken(word, lstrip=True, rstrip=True, normalized=False) for word in words])


@dataclass(frozen=True)
class Vocabulary:
    """Where the words of pictures stand.

    Attributes:
        shift: id of code 0; the others follow.
        codes: how many there are.
        begin, end: ids of the words before and after a picture.
    """

    shift: int
    codes: int
    begin: int
    end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        """Raises:
        ValueError: the tokenizer has no words of pictures.
        """
        words = tokenizer.get_vocab()
        codes = codes_among(words)
        if not codes or OPEN not in words or CLOSE not in words:
            raise ValueError("this language model has no words of images, as <img_00000>: choose a SEED-LLaMA")
        return cls(words[code_word(0)], codes, words[OPEN], words[CLOSE])

    def images(self, ids: Sequence[int], count: int) -> list[list[int]]:
        """The codes of all pictures in a text, each of `count`; what is no whole picture is left out."""
        images, codes = [], None
        for word in ids:
            if word == self.begin:
                codes = []
            elif word == self.end:
                if codes is not None and len(codes) == count:
                    images.append(codes)
                codes = None
            elif codes is not None:
                codes = [*codes, word - self.shift] if self.shift <= word < self.shift + self.codes else None
        return images


@torch.no_grad()
def likelihoods(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    words: Vocabulary,
    images: Sequence[Sequence[int]],
    captions: Sequence[str],
) -> Tensor:
    """Log-probabilities of each caption, and its end token, after each image, in nats [B, captions].

    Args:
        images: codes of each; without any it is the caption alone.
        captions: of 28 text tokens at most; what is longer is cut.
    """
    rows = tokenizer(list(captions), add_special_tokens=False, truncation=True, max_length=28).input_ids
    end, width = tokenizer.eos_token_id, max(map(len, rows)) + 1
    text = torch.tensor([row + [end] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.arange(width) <= torch.tensor([[len(row)] for row in rows])
    log_probs = []
    for codes in images:
        image_ids = [words.begin, *(code + words.shift for code in codes), words.end] if len(codes) else []
        prefix = torch.tensor([tokenizer.bos_token_id, *image_ids], device=model.device).expand(len(text), -1)
        logits = model(input_ids=torch.cat([prefix, text], dim=1)).logits[:, prefix.shape[1] - 1 : -1].float()
        token_log_probs = logits.log_softmax(dim=-1).gather(2, text[..., None])[..., 0]
        log_probs.append((token_log_probs * mask.to(token_log_probs)).sum(dim=1))
    return torch.stack(log_probs).cpu()


class SeedLlamaSession:
    """`samplers.steps.Session` of a language model that writes the codes of one picture for each prompt.

    Args:
        prompts: ids of each row; under guidance those of all pictures, then what stands for no prompt as often.
        length: N.
    """

    def __init__(
        self, model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], guided: bool, words: Vocabulary, length: int
    ):
        self.model, self.guided, self.words = model, guided, words
        self.length = self.columns = length
        width = max(map(len, prompts))
        self.prompts: Tensor | None = torch.tensor(
            [[0] * (width - len(row)) + list(row) for row in prompts], device=model.device
        )  # until they are read, with the first tokens
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
        self.cache = DynamicCache(config=model.config)
        parameters = signature(model.forward).parameters
        # its name in transformers has changed
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        kwargs = {"attention_mask": mask, "position_ids": positions, self.cache_name: self.cache, "use_cache": True}
        return self.model(input_ids=ids, **kwargs).logits

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `samplers.steps.Session.forward`; chains alone, at the same cells of all pictures."""
        if mask is not None or seen is not None or positions.ndim != 1:
            raise ValueError("this model writes its codes in order: choose the sampler auto or sequential")
        ids = torch.where(tokens < 0, self.words.begin, tokens + self.words.shift)
        ids = torch.cat([ids, ids]) if self.guided else ids
        width, first = self.mask.shape[1], int(positions[0]) + 1
        positions = self.mask.sum(dim=1, keepdim=True) + (positions.to(ids.device) + 1)
        visible, n = torch.cat([self.mask, self.mask.new_ones(len(ids), first + ids.shape[1])], dim=1), ids.shape[1]
        if self.prompts is not None:
            ids = torch.cat([self.prompts, ids], dim=1)
            positions = torch.cat([(self.mask.cumsum(dim=1) - 1).clamp(min=0), positions], dim=1)
            self.prompts = None
        elif late := self.cache.get_seq_length() - width - first:
            self.cache.crop(-late)
        logits = self._forward(ids, positions, visible)[:, -n:]
        logits = logits[..., self.words.shift : self.words.shift + self.words.codes]
        return logits.chunk(2) if self.guided else (logits, None)

    def keep(self, nodes: Tensor) -> None:
        """See `samplers.steps.Session.keep`; there are no trees."""
