"""T5, the text encoder of the published generators: in memory, or read when a prompt must be encoded; its features are kept on disk.

Letters in shape comments: B texts, T text tokens, C width.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from argen.device import LOADING, ON_DEMAND, silent
from argen.models import prompt_cache

T5 = "google/flan-t5-xl"


class OffloadedT5(T5EncoderModel):
    """Stands for a T5 on the CPU that is in memory only while prompts are encoded.

    Args:
        source: a folder, or the name of a hub repository.

    """

    def __init__(self, source: str):
        nn.Module.__init__(self)
        self.config = T5Config.from_pretrained(source)
        self.config._name_or_path = source
        self.source, self.users = source, 0
        self.network: T5EncoderModel | None
        self.__dict__["network"] = None  # no part of this one, which has no weights
        self.cast: Callable[[nn.Module], None] | None = None
        self.precision = torch.bfloat16

    @property
    def dtype(self) -> torch.dtype:
        return self.precision

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def cast_when_read(self, cast: Callable[[nn.Module], None], dtypes: list[torch.dtype]) -> None:
        """What brings it into its precisions, the last of which is its own."""
        self.cast, self.precision = cast, dtypes[-1] if dtypes else self.precision

    @contextmanager
    def in_memory(self) -> Iterator[T5EncoderModel]:
        """The network, read when the first of those who use it comes, and released after the last one."""
        with LOADING:
            self.users += 1
            try:
                if self.__dict__["network"] is None:
                    with silent():
                        network = T5EncoderModel.from_pretrained(self.source, dtype=torch.bfloat16).eval()
                    if self.cast is not None:
                        self.cast(network)
                    self.__dict__["network"] = network
                yield self.__dict__["network"]
            finally:
                self.users -= 1
                if not self.users:
                    self.__dict__["network"] = None

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raises:
        ValueError: always.
        """
        raise ValueError("the text encoder is offloaded, so that the pipeline cannot be saved: load it without offload")


def read_t5(source: str = T5) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """Flan-T5 XL in bfloat16, as LlamaGen was trained: it overflows in float16. Where it is to be offloaded, only its settings are read."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if ON_DEMAND.get():
        return OffloadedT5(source), tokenizer
    return T5EncoderModel.from_pretrained(source, dtype=torch.bfloat16).eval(), tokenizer


@torch.no_grad()
def text_features(
    encoder: T5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    device: torch.device,
    length: int | None = None,
    stage: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, C] of texts, padded on the right, and mask [B, T] int64. Each text is encoded alone, so that its features depend on
    nothing else; those of before come from `argen.models.prompt_cache`.

    Args:
        length: T; None for the longest of the texts.
        stage: the context in which the encoder is where it runs.
    """
    padding = {"padding": "max_length", "max_length": length} if length else {}
    inputs = {text: tokenizer([text], truncation=True, return_tensors="pt", **padding) for text in dict.fromkeys(texts)}
    keys = {
        text: prompt_cache.key(encoder, device, encoding.input_ids, encoding.attention_mask)
        for text, encoding in inputs.items()
    }
    features = {text: prompt_cache.read(name) for text, name in keys.items()}
    if missing := [text for text, states in features.items() if states is None]:
        with stage(), encoder.in_memory() if isinstance(encoder, OffloadedT5) else nullcontext(encoder) as network:
            for text in missing:
                encoding = inputs[text].to(device)
                states = network(input_ids=encoding.input_ids, attention_mask=encoding.attention_mask)
                features[text] = states.last_hidden_state[0].cpu()
                if keys[text] is None:  # its files are here only now
                    keys[text] = prompt_cache.key(encoder, device, encoding.input_ids, encoding.attention_mask)
                prompt_cache.write(keys[text], features[text])
    longest = max(len(states) for states in features.values())
    states = torch.stack(
        [nn.functional.pad(features[text], (0, 0, 0, longest - len(features[text]))) for text in texts]
    )
    masks = [inputs[text].attention_mask[0].cpu() for text in texts]
    mask = torch.stack([nn.functional.pad(row, (0, longest - len(row))) for row in masks])
    return states.to(device), mask.to(device)
