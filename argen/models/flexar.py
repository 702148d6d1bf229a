"""FlexAR: a decoder-only Transformer over the ordered tokens of FlexTok, after a class or a text.

Paper: "1D Ordered Tokens Enable Efficient Test-Time Search" (arXiv 2604.15453). Weights: ``EPFL-VILAB/FlexAR-*`` on the
hub (Apache-2.0), whose layout this file has. What their authors' code computes anew for every token is cached here.

Letters in shape comments: B images, R rows of the cache (2B under guidance), T text tokens, N tokens of a picture, n of
a forward pass, D width, K codes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from argen.models.decoding import Decoding
from argen.models.kv_cache import KeyValueCache
from argen.models.layers import Linear, RMSNorm, causal_mask, check_heads, split_heads
from argen.models.session import DecoderSession, KeysValues
from tokenizers_img.attention import DispatchedAttention
from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.mapped import unfilled

IGNORED = ("models.image_tokenizer.", "models.text_encoder.t5_embedder.")  # in some files; loaded from their own


class LayerNorm(nn.LayerNorm):
    """In float32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps).to(x.dtype)


def norm_of(kind: str, dim: int, eps: float) -> nn.Module:
    """A norm of the kind "layer" or "rms"."""
    return RMSNorm(dim, eps) if kind == "rms" else LayerNorm(dim, eps)


class SelfAttention(DispatchedAttention):
    """Args:
    qk_norm: kind and eps of the norm of queries and keys, see `norm_of`; None for none.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool, bias: bool, qk_norm: tuple[str, float] | None):
        super().__init__()
        self.heads = check_heads(dim, heads)
        self.qkv, self.proj = Linear(dim, 3 * dim, bias=qkv_bias), Linear(dim, dim, bias=bias)
        if qk_norm is not None:
            self.q_norm, self.k_norm = (norm_of(qk_norm[0], dim // heads, qk_norm[1]) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        return self.proj(self.attend(query, key, value, mask))


class CrossAttention(DispatchedAttention):
    """See `SelfAttention`."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, bias: bool, qk_norm: tuple[str, float] | None):
        super().__init__()
        self.heads = check_heads(dim, heads)
        self.Wq, self.Wk, self.Wv = (Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = Linear(dim, dim, bias=bias)
        if qk_norm is not None:
            self.q_norm, self.k_norm = (norm_of(qk_norm[0], dim // heads, qk_norm[1]) for _ in range(2))

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        key, value = split_heads(self.Wk(text), self.heads), split_heads(self.Wv(text), self.heads)
        return (self.k_norm(key) if hasattr(self, "k_norm") else key), value

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        query = split_heads(self.Wq(x), self.heads)
        if hasattr(self, "q_norm"):
            query = self.q_norm(query)
        return self.proj(self.attend(query, key, value, mask))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, bias: bool, gated: bool):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden, bias=bias), Linear(hidden, dim, bias=bias)
        if gated:
            self.fc3 = Linear(dim, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "fc3"):
            return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.ModuleDict):
    """A layer; `dropout` on what its parts add."""

    def __init__(self, parts: dict[str, nn.Module], dropout: float):
        super().__init__(parts)
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        text: tuple[Tensor, Tensor] | None,
        visible: Tensor,
        cache: KeyValueCache | None,
        layer: int,
    ) -> Tensor:
        """x [R, n, D]; `text`: keys and values of cross-attention, and `visible` which of them are seen."""
        attention, last = self["self_attn"] if "self_attn" in self else self["attn"], self["norm_2"]
        x = x + self._drop(attention(self["norm_1"](x), mask, cache, layer))
        if text is not None:
            x = x + self._drop(self["cross_attn"](self["norm_2"](x), *text, visible))
            last = self["norm_3"]
        return x + self._drop(self["mlp"](last(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Preprocessor(nn.Module):
    def __init__(self, n_embed: int, length: int, dim: int, classes: int | None):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, dim)
        self.sos_token_embed = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(length, dim))
        if classes is not None:
            self.cls_embedding = nn.Embedding(classes, dim)


class TextMLP(nn.Module):
    """Hidden states of the text encoder [R, T, text_dim] -> [R, T, D]."""

    def __init__(self, text_dim: int, dim: int, approximate: str):
        super().__init__()
        self.approximate = approximate
        self.fc1, self.fc2 = Linear(text_dim, text_dim, bias=False), Linear(text_dim, dim, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(states), approximate=self.approximate))


class Head(nn.Module):
    def __init__(self, dim: int, n_embed: int, bias: bool):
        super().__init__()
        self.linear = Linear(dim, n_embed, bias=bias)


class FlexAR(Decoding, ModelMixin, ConfigMixin):
    """A condition and tokens so far -> logits of the tokens that follow.

    Args:
        n_embed: K.
        length: N at most.
        dim, depth, heads: sizes.
        classes: how many there are, for a model of classes; else None.
        text_dim: width of the text encoder's hidden states, for a model of texts; else None.
        norm, eps: "layer" or "rms".
        qk_norm, cross_qk_norm: eps of the norm of queries and keys, of self- and of cross-attention; None for none.
        qk_norm_kind, cross_qk_norm_kind: "layer" or "rms".
        gated, hidden: whether the feed-forward layer is gated, and its width.
        bias, qkv_bias, head_bias: which matrices and norms have one.
        final_norm: there is one after the last layer.
        text_gelu: "tanh" or "none".
        dropout: in training, on what a layer adds.
    """

    @register_to_config
    def __init__(
        self,
        n_embed: int = 64000,
        length: int = 256,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        classes: int | None = None,
        text_dim: int | None = 2048,
        norm: str = "layer",
        eps: float = 1e-5,
        qk_norm: float | None = None,
        gated: bool = True,
        hidden: int = 2048,
        bias: bool = False,
        qkv_bias: bool = False,
        head_bias: bool = False,
        final_norm: bool = True,
        text_gelu: str = "tanh",
        dropout: float = 0.0,
        qk_norm_kind: str = "rms",
        cross_qk_norm: float | None = None,
        cross_qk_norm_kind: str = "rms",
    ):
        super().__init__()
        self.length, self.depth = length, depth

        def normed() -> nn.Module:
            return norm_of(norm, dim, eps)

        def block() -> Block:
            self_qk_norm = None if qk_norm is None else (qk_norm_kind, qk_norm)
            attention = SelfAttention(dim, heads, qkv_bias, bias, self_qk_norm)
            mlp = MLP(dim, hidden, bias, gated)
            if text_dim is None:
                return Block({"norm_1": normed(), "attn": attention, "norm_2": normed(), "mlp": mlp}, dropout)
            of_cross = None if cross_qk_norm is None else (cross_qk_norm_kind, cross_qk_norm)
            cross = CrossAttention(dim, heads, qkv_bias, bias, of_cross)
            parts = {"norm_1": normed(), "self_attn": attention, "norm_2": normed(), "cross_attn": cross}
            return Block(parts | {"norm_3": normed(), "mlp": mlp}, dropout)

        trunk = {"blocks": nn.ModuleList(block() for _ in range(depth))}
        if final_norm:
            trunk["post_trunk_norm"] = normed()
        generator = {
            "preprocessor": Preprocessor(n_embed, length, dim, classes),
            "trunk": nn.ModuleDict(trunk),
            "head": Head(dim, n_embed, head_bias),
        }
        models = {"ar_image_model": nn.ModuleDict(generator)}
        if text_dim is not None:
            models["text_encoder"] = nn.ModuleDict({"mlp": TextMLP(text_dim, dim, text_gelu)})
        self.models = nn.ModuleDict(models)

    @classmethod
    def from_original(cls, path: str | Path) -> "FlexAR":
        """Load a published ``model.safetensors``, its ``config.yaml`` beside it.

        Raises:
            ValueError: the configuration names something that argen does not know, or the file does not fit it.
        """
        path = Path(path)
        config = read_config((path if path.is_dir() else path.parent) / "config.yaml")
        state = {key: value for key, value in read_state_dict(path).items() if not key.startswith(IGNORED)}
        return load_strict(unfilled(cls, **sizes_of(config)), state, source=path)

    def encode_text(self, states: Tensor) -> Tensor:
        """Hidden states of the text encoder [R, T, text_dim] -> [R, T, D]."""
        return self.models["text_encoder"]["mlp"](states)

    def encode_class(self, ids: Tensor) -> Tensor:
        """Class ids [R], -1 for none -> [R, 1, D]."""
        embeds = self.models["ar_image_model"]["preprocessor"].cls_embedding(ids.clamp(min=0))
        return torch.where(ids[:, None] < 0, 0, embeds)[:, None]

    def project_text(self, encoded: Tensor) -> KeysValues | Tensor:
        """What the layers read of the condition: keys and values of each layer; of a class what joins the start token."""
        if self.config.text_dim is None:
            return encoded
        blocks = self.models["ar_image_model"]["trunk"]["blocks"]
        return [block["cross_attn"].keys_values(encoded) for block in blocks]

    def embed(self, tokens: Tensor, positions: Tensor, condition: KeysValues | Tensor) -> Tensor:
        """Tokens [R, n], of which -1 is the start token, at `positions` [n] or [R, n] -> [R, n, D]."""
        parts = self.models["ar_image_model"]["preprocessor"]
        start = parts.sos_token_embed + condition if isinstance(condition, Tensor) else parts.sos_token_embed
        x = torch.where(tokens[..., None] < 0, start.to(parts.embedding.weight), parts.embedding(tokens.clamp(min=0)))
        return x + parts.positional_embedding[(positions + 1).clamp(max=self.length - 1)]

    def hidden(
        self,
        x: Tensor,
        mask: Tensor,
        condition: KeysValues | Tensor,
        text_mask: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Embedded tokens [R, n, D] -> what the head reads [R, n, D]."""
        trunk, visible = self.models["ar_image_model"]["trunk"], text_mask[:, None, None]
        for index, block in enumerate(trunk["blocks"]):
            x = block(x, mask, None if isinstance(condition, Tensor) else condition[index], visible, cache, index)
        return trunk["post_trunk_norm"](x) if "post_trunk_norm" in trunk else x

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        condition: KeysValues | Tensor,
        text_mask: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits [R, n, K] of the tokens that follow, see `argen.models.session.CrossAttentionDecoder`."""
        hidden = self.hidden(self.embed(tokens, positions, condition), mask, condition, text_mask, cache)
        return self.models["ar_image_model"]["head"].linear(hidden)

    def forward(self, condition: Tensor, text_mask: Tensor, tokens: Tensor) -> Tensor:
        """Teacher forcing: text states [B, T, text_dim] or class ids [B], mask [B, T] bool, tokens [B, n] -> logits [B, n, K]."""
        encoded = self.encode_class(condition) if self.config.text_dim is None else self.encode_text(condition)
        n = tokens.shape[1]
        input_tokens, positions = F.pad(tokens[:, :-1], (1, 0), value=-1), torch.arange(-1, n - 1, device=tokens.device)
        return self.decode(
            input_tokens, positions, causal_mask(n, n, tokens.device), self.project_text(encoded), text_mask
        )


class FlexARSession(DecoderSession):
    """`samplers.steps.Session` of a `FlexAR`.

    Args:
        encoded, text_mask: as in `DecoderSession`, from `FlexAR.encode_text` or (T = 1) `encode_class`.
        length: tokens that are written; the model's N at most.
        official_null: of a model of classes: from the second token on "no class" is class 0, as the authors' code has it by an
            oversight. Published pictures of that code need it.
    """

    def __init__(
        self,
        model: FlexAR,
        encoded: Tensor,
        text_mask: Tensor,
        guided: bool,
        length: int | None = None,
        official_null: bool = False,
    ):
        super().__init__(model, encoded, text_mask, guided)
        self.length = self.columns = length or model.length
        self.replaced = not (official_null and guided and model.config.text_dim is None)

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `samplers.steps.Session.forward`."""
        if not self.replaced and int(positions.min()) >= 0:
            self.replaced, half = True, len(self.text_keys_values) // 2
            tench = self.decoder.encode_class(torch.zeros(half, dtype=torch.int64, device=tokens.device))
            self.text_keys_values = torch.cat([self.text_keys_values[:half], tench])
            start = torch.full_like(tokens[:, :1], -1)
            super().forward(start, torch.tensor([-1]))
        return super().forward(tokens, positions, mask, seen)


NORMS = {"LayerNormFP32": "layer", "LayerNorm": "layer", "RMSNorm": "rms"}
EPS = {"layer": 1e-5, "rms": 1e-6}  # where the configuration names none
FEED_FORWARDS = {"MLP": False, "SwiGLUFFN": True}


def read_config(path: Path) -> dict:
    """A published ``config.yaml``.

    Raises:
        FileNotFoundError, ValueError: there is none; it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}: put the model's config.yaml beside its file")
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} could not be read ({' '.join(str(error).split())}): fetch it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no configuration: fetch it again")
    return config


def _known(part: dict, names: dict, what: str):
    target = part["_target_"]
    name = target.rpartition(".")[2]
    if name not in names:
        raise ValueError(f"the configuration names {what} {target}: argen knows {', '.join(names)}")
    return names[name]


def _norm(part: dict | None, what: str) -> tuple[float | None, str]:
    """Eps and kind of a norm of a published configuration; None where there is none."""
    if part is None:
        return None, "rms"
    kind = _known(part, NORMS, what)
    return part.get("eps", EPS[kind]), kind


def sizes_of(config: dict) -> dict:
    """Arguments of `FlexAR` from a published configuration.

    Raises:
        ValueError: it lacks something, or names a part that argen does not know.
    """
    try:
        models = config["model"]["meta_model"]["models"]
        generator = models["ar_image_model"]
        before, trunk, head = generator["preprocessor"], generator["trunk"], generator["head"]
        text = "text_encoder" in models
        _known(trunk, {"TransformerDecoder": 1} if text else {"Transformer": 1}, "the trunk")
        attention = trunk["self_attn_target" if text else "attn_target"]
        _known(attention, {"EfficientAttention": 1}, "the attention")
        gated = _known(trunk["ffn_target"], FEED_FORWARDS, "the feed-forward layer")
        dim, hidden = trunk["embed_dim"], int(trunk["embed_dim"] * trunk.get("mlp_ratio", 4))
        if gated:
            multiple = trunk["ffn_target"].get("multiple_of", 256)
            hidden = multiple * -(-int(2 * hidden / 3) // multiple)
        qk_norm, gelu = _norm(attention.get("qk_norm"), "the norm of queries"), {}
        cross = _norm(trunk["cross_attn_target"].get("qk_norm"), "the norm of queries") if text else (None, "rms")
        norm, eps = _norm(trunk["norm_layer"], "the norm")[::-1]
        if text:
            gelu = models["text_encoder"]["mlp"].get("act_layer") or {"approximate": "tanh"}
        return {
            "n_embed": before["codebook_size"],
            "length": before["token_grid_size"][0] * before["token_grid_size"][1],
            "dim": dim,
            "depth": trunk["num_blocks"],
            "heads": attention["num_heads"],
            "classes": None if text else before["num_classes"],
            "text_dim": models["text_encoder"]["mlp"]["text_dim"] if text else None,
            "norm": norm,
            "eps": eps,
            "qk_norm": qk_norm[0],
            "qk_norm_kind": qk_norm[1],
            "cross_qk_norm": cross[0],
            "cross_qk_norm_kind": cross[1],
            "gated": gated,
            "hidden": hidden,
            "bias": trunk.get("use_bias", True),
            "qkv_bias": attention.get("qkv_bias", False),
            "head_bias": head.get("use_bias", True),
            "final_norm": trunk.get("post_trunk_norm", False),
            "text_gelu": gelu.get("approximate", "none"),
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"the configuration lacks {error}: expected that of a FlexAR") from error
