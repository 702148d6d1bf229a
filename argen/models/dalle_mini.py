"""DALL-E mini and mega: a text encoder and a causal decoder of VQGAN tokens, BART-like with GLU and NormFormer norms.

Weights: github.com/borisdayma/dalle-mini (Apache-2.0), in PyTorch as ``kuprel/min-dalle`` (MIT); the layout is theirs.

Letters in shape comments: B images, T text tokens, n tokens of a forward pass, D width, H heads, K codes, R cache rows.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from emoji import demojize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from argen.models.decoding import Decoding
from argen.models.kv_cache import KeyValueCache
from argen.models.layers import Linear, check_heads, leave_unpacked, split_heads
from argen.models.session import KeysValues
from tokenizers_img.attention import DispatchedAttention
from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.mapped import unfilled

PAD = 1  # text id
SIZES = {
    "mini": {"dim": 1024, "depth": 12, "heads": 16, "mlp_dim": 2730, "text_vocab": 50264, "image_vocab": 16384},
    "mega": {"dim": 2048, "depth": 24, "heads": 32, "mlp_dim": 4096, "text_vocab": 50272, "image_vocab": 16415},
}
TEXT_TOKENS, IMAGE_TOKENS = 64, 256


class Attention(DispatchedAttention):
    """Multi-head attention of `hidden_states` [R, n, D] over given keys and values [R, m, H, D/H], without biases."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = check_heads(dim, heads)
        self.k_proj = Linear(dim, dim, bias=False)
        self.v_proj = Linear(dim, dim, bias=False)
        self.q_proj = Linear(dim, dim, bias=False)
        self.out_proj = Linear(dim, dim, bias=False)

    def keys_values(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return split_heads(self.k_proj(hidden_states), self.heads), split_heads(self.v_proj(hidden_states), self.heads)

    def forward(self, hidden_states: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        query = split_heads(self.q_proj(hidden_states), self.heads)
        return self.out_proj(self.attend(query, key, value, mask))


class GLU(nn.Module):
    """Gated feed-forward with a norm before and one inside, no biases."""

    def __init__(self, dim: int, mlp_dim: int):
        super().__init__()
        self.ln0, self.ln1 = nn.LayerNorm(dim), nn.LayerNorm(mlp_dim)
        self.fc0 = Linear(dim, mlp_dim, bias=False)
        self.fc1 = Linear(dim, mlp_dim, bias=False)
        self.fc2 = Linear(mlp_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln0(x)
        return self.fc2(self.ln1(F.gelu(self.fc0(x)) * self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_dim: int):
        super().__init__()
        self.pre_self_attn_layer_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.glu = GLU(dim, mlp_dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.pre_self_attn_layer_norm(x)
        x = x + self.self_attn_layer_norm(self.self_attn(normed, *self.self_attn.keys_values(normed), mask))
        return x + self.glu(x)


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_dim: int):
        super().__init__()
        self.pre_self_attn_layer_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.pre_encoder_attn_layer_norm = nn.LayerNorm(dim)
        self.encoder_attn = Attention(dim, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(dim)
        self.glu = GLU(dim, mlp_dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        text_keys_values: tuple[Tensor, Tensor],
        text_mask: Tensor,
        cache: KeyValueCache | None,
        layer: int,
    ) -> Tensor:
        normed = self.pre_self_attn_layer_norm(x)
        key, value = self.self_attn.keys_values(normed)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        x = x + self.self_attn_layer_norm(self.self_attn(normed, key, value, mask))
        normed = self.pre_encoder_attn_layer_norm(x)
        x = x + self.encoder_attn_layer_norm(self.encoder_attn(normed, *text_keys_values, text_mask))
        return x + self.glu(x)


class DalleMiniEncoder(ModelMixin, ConfigMixin):
    """Text ids -> states that the decoder attends to.

    Args:
        vocab_size: text vocabulary.
        max_length: positions, the most text tokens that fit.
    """

    @register_to_config
    def __init__(self, dim: int, depth: int, heads: int, mlp_dim: int, vocab_size: int, max_length: int = TEXT_TOKENS):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.embed_positions = nn.Embedding(max_length, dim)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, mlp_dim) for _ in range(depth))
        self.layernorm_embedding = nn.LayerNorm(dim)
        self.final_ln = nn.LayerNorm(dim)
        leave_unpacked(self)

    @classmethod
    def from_original(cls, path: str | Path, size: str) -> "DalleMiniEncoder":
        """Load ``encoder_mini.pt`` (`size` "mini") or ``encoder.pt`` ("mega") of min-dalle as released."""
        sizes = _sizes(size)
        model = unfilled(
            cls, vocab_size=sizes.pop("text_vocab"), **{k: v for k, v in sizes.items() if k != "image_vocab"}
        )
        return load_strict(model, read_state_dict(path), source=path)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids [R, T] int64, padded with `PAD` -> states [R, T, D]."""
        mask = (input_ids != PAD)[:, None, None, :]
        x = self.embed_tokens(input_ids) + self.embed_positions.weight[: input_ids.shape[1]]
        x = self.layernorm_embedding(x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_ln(x)


class DalleMiniDecoder(Decoding, ModelMixin, ConfigMixin):
    """Picture tokens, one after the other, with cross-attention to the text; a `CrossAttentionDecoder`.

    Args:
        image_vocab: size of the picture vocabulary; the embedding has one row more.
        codes: tokens that the picture tokenizer knows: logits are cut to them, and the last one is the start token.
        length: cells of a picture, row-major.
    """

    @register_to_config
    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        image_vocab: int,
        codes: int = 16384,
        length: int = IMAGE_TOKENS,
    ):
        super().__init__()
        self.length, self.depth, self.codes, self.start = length, depth, codes, codes - 1
        self.embed_tokens = nn.Embedding(image_vocab + 1, dim)
        self.embed_positions = nn.Embedding(length, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, mlp_dim) for _ in range(depth))
        self.layernorm_embedding = nn.LayerNorm(dim)
        self.final_ln = nn.LayerNorm(dim)
        self.lm_head = Linear(dim, image_vocab + 1, bias=False)

    @classmethod
    def from_original(cls, path: str | Path, size: str) -> "DalleMiniDecoder":
        """Load ``decoder_mini.pt`` (`size` "mini") or ``decoder.pt`` ("mega") of min-dalle as released."""
        model = unfilled(cls, **{key: value for key, value in _sizes(size).items() if key != "text_vocab"})
        return load_strict(model, read_state_dict(path), source=path)

    def project_text(self, encoded: Tensor) -> KeysValues:
        """Keys and values of every layer's cross-attention to `encoded` [R, T, D]."""
        return [layer.encoder_attn.keys_values(encoded) for layer in self.layers]

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        text_keys_values: KeysValues,
        text_mask: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits [R, n, codes] of the tokens that follow `tokens` [R, n] at `positions` [n] or [R, n].

        -1 stands for the start token and its place. `mask` is [R or 1, 1, n, m] bool, `text_mask` [R, T] bool.
        """
        x = self.embed_tokens(torch.where(tokens < 0, self.start, tokens))
        positions = (positions + 1).clamp(
            max=self.length - 1
        )  # the start token stands at 0; the last cell is read by nobody
        x = self.layernorm_embedding(x + self.embed_positions(positions))
        for index, layer in enumerate(self.layers):
            x = layer(x, mask, text_keys_values[index], text_mask[:, None, None, :], cache, index)
        return self.lm_head(self.final_ln(x))[..., : self.codes]


def _sizes(size: str) -> dict[str, int]:
    if size not in SIZES:
        raise ValueError(f"unknown DALL-E size {size!r}: expected one of {', '.join(SIZES)}")
    return dict(SIZES[size])


def text_tokenizer(vocab_file: str | Path, merges_file: str | Path) -> PreTrainedTokenizerFast:
    """Byte-pair merges inside the words between spaces, from ``vocab[_mini].json`` and ``merges[_mini].txt`` as released."""
    for file in (vocab_file, merges_file):
        if not Path(file).is_file():
            raise FileNotFoundError(f"no text vocabulary at {file}")
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab_file), str(merges_file), unk_token="<unk>"))
    except Exception as error:  # tokenizers raises bare exceptions
        raise ValueError(f"{vocab_file} and {merges_file} are no vocabulary and merges ({error})") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Metaspace("\u0120", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace("\u0120")
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_length: int = TEXT_TOKENS) -> Tensor:
    """Prompts -> ids [B, max_length] int64: emoji as words, lower case, ASCII only, between <s> and </s>.

    Rows are padded with `PAD`; a long one loses its end and the end mark with it, as in the released code.
    """
    rows = torch.full((len(prompts), max_length), PAD)
    for row, prompt in zip(rows, prompts, strict=True):
        text = demojize(prompt, delimiters=("", "")).lower().encode("ascii", errors="ignore").decode()
        words = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id][:max_length]
        row[: len(ids)] = torch.tensor(ids)
    return rows
