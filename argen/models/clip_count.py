"""CLIP-Count: how densely a picture is filled with the things that a text names (arXiv 2305.07304).

Weights: ``clipcount_pretrained.ckpt`` of songrise/CLIP-Count (MIT), a Lightning checkpoint without the frozen CLIP, which is
OpenAI's ViT-B/16. The modules are named as there.

Letters in shape comments: B images, L text ids, D width of the common space, V of the picture's transformer, P patches.
"""

import re
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from argen.models.layers import split_heads
from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.pixels import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from transformers import CLIPModel

SIZE, DENSITY = 224, 384  # sides of what is looked at and of the answer
SCALE = 60  # the density of one thing sums up to it


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """A layer of OpenAI's CLIP."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        parts = {"c_fc": nn.Linear(dim, 4 * dim), "gelu": QuickGELU(), "c_proj": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(dim, heads) for _ in range(depth))


class VisionTransformer(nn.Module):
    def __init__(self, dim: int, depth: int, output: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.positional_embedding = nn.Parameter(torch.zeros((SIZE // 16) ** 2 + 1, dim))
        self.conv1 = nn.Conv2d(3, dim, 16, stride=16, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = Transformer(dim, depth, dim // 64)
        self.proj = nn.Parameter(torch.zeros(dim, output))


class CLIP(nn.Module):
    def __init__(self, dim: int, vision_dim: int, vision_depth: int, length: int, vocab: int, heads: int, depth: int):
        super().__init__()
        self.visual = VisionTransformer(vision_dim, vision_depth, dim)
        self.transformer = Transformer(dim, depth, heads)
        self.token_embedding = nn.Embedding(vocab, dim)
        self.positional_embedding = nn.Parameter(torch.zeros(length, dim))
        self.ln_final = nn.LayerNorm(dim)
        self.text_projection = nn.Parameter(torch.zeros(dim, dim))
        self.logit_scale = nn.Parameter(torch.zeros(()))


class Prompted(nn.Module):
    """Learned vectors beside the patches."""

    def __init__(self, dim: int, count: int, depth: int):
        super().__init__()
        self.visual_prompt = nn.Parameter(torch.zeros(depth, count, dim))
        self.vpt_proj, self.vpt_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-6)


class Context(nn.Module):
    """Learned vectors before the words."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.learnable_context = nn.Parameter(torch.zeros(count, dim))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.heads).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Cross-attention to one text vector: its softmax is 1, so the output does not depend on the query; wq and wk have no effect."""

    def __init__(self, dim: int):
        super().__init__()
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, text: Tensor) -> Tensor:
        return self.proj(self.wv(text))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Interaction(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.selfattn, self.attn, self.mlp = SelfAttention(dim, heads), CrossAttention(dim), MLP(dim, hidden)
        self.conv0 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x [B, P, D], text [B, 1, D]."""
        x = x + self.selfattn(self.norm0(x))
        x = x + self.attn(text)
        return x + self.mlp(self.norm2(x))


def doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class DensityDecoder(nn.Module):
    """Two maps of features, 14 x 14 and 28 x 28, -> the density."""

    def __init__(self, dim: int, groups: int):
        super().__init__()

        def level(inputs: int, outputs: int, side: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, side, padding=side // 2), nn.GroupNorm(groups, outputs), nn.GELU()
            )

        widths = [dim >> index for index in range(5)]
        self.convs = nn.ModuleList(level(*pair, 3) for pair in zip(widths, widths[1:], strict=False))
        self.pyradim_conv = level(dim, dim // 2, 1)
        self.final_conv = nn.Sequential(nn.Conv2d(widths[-1], 1, 1))

    def forward(self, small: Tensor, large: Tensor) -> Tensor:
        x = small
        for index, conv in enumerate(self.convs):
            if index == 1:
                x = x + self.pyradim_conv(large)
            x = conv(x)
            x = doubled(x) if index < 3 else F.interpolate(x, (DENSITY, DENSITY), mode="bilinear", align_corners=False)
        return self.final_conv(x).sigmoid()


class CLIPCount(ModelMixin, ConfigMixin):
    """Pictures and class names -> densities.

    Args:
        dim, vision_dim, vision_depth, length, vocab, text_heads, text_depth: sizes of the CLIP.
        heads, hidden, groups: of the layers that join text and picture, and of the decoder.
        context, prompts, prompt_depth: learned vectors before the words, and beside the patches of the first layers.
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 512,
        vision_dim: int = 768,
        vision_depth: int = 12,
        length: int = 77,
        vocab: int = 49408,
        text_heads: int = 8,
        text_depth: int = 12,
        heads: int = 8,
        hidden: int = 2048,
        groups: int = 8,
        context: int = 2,
        prompts: int = 20,
        prompt_depth: int = 10,
    ):
        super().__init__()
        self.clip = CLIP(dim, vision_dim, vision_depth, length, vocab, text_heads, text_depth)
        self.img_encoder = Prompted(vision_dim, prompts, prompt_depth)
        self.text_encoder = Context(dim, context)
        self.patch_feat_proj = nn.Linear(vision_dim, dim)
        self.patch_feat_proj_contrast = nn.Linear(vision_dim, dim)
        self.patch_emb_pos_embed = nn.Parameter(torch.zeros(1, (SIZE // 16) ** 2, dim), requires_grad=False)
        self.decoder_ln_pre, self.decoder_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)  # without influence
        self.fim_blocks = nn.ModuleList(Interaction(dim, heads, hidden) for _ in range(2))
        self.density_decoder = DensityDecoder(dim, groups)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)

    @classmethod
    def from_original(cls, path: str | Path, clip: "CLIPModel") -> "CLIPCount":
        """Load the released checkpoint; `clip` is OpenAI's ViT-B/16 as transformers has it."""
        state = {key.removeprefix("model."): value for key, value in read_state_dict(path).items()}
        state = {key: value for key, value in state.items() if not key.startswith(FROZEN)}
        frozen = {f"clip.{key}": value for key, value in from_transformers(clip).items()}
        return load_strict(cls(), state | frozen, source=path)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Ids [B, L], of which the end has the highest -> [B, 1, D].

        The learned vectors stand after the start and the end is looked up where it stood before, as in the authors' code: of a
        name of one piece nothing but they is read.
        """
        clip = self.clip
        words = clip.token_embedding(ids)
        context = self.text_encoder.learnable_context.expand(len(ids), -1, -1)
        x = torch.cat([words[:, :1], context, words[:, 1:]], dim=1)[:, : ids.shape[1]] + clip.positional_embedding
        hidden = torch.full((ids.shape[1],) * 2, float("-inf"), device=ids.device, dtype=x.dtype).triu(1)
        for block in clip.transformer.resblocks:
            x = block(x, hidden)
        ends = clip.ln_final(x)[torch.arange(len(ids)), ids.argmax(dim=-1)]
        return (ends @ clip.text_projection)[:, None]

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, 224, 224] in [0, 1] -> [B, P, V]."""
        visual, prompted = self.clip.visual, self.img_encoder
        patches = visual.conv1((pixels - self.mean) / self.std).flatten(2).transpose(1, 2)
        first = visual.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], dim=1) + visual.positional_embedding
        prompts = prompted.vpt_proj(prompted.visual_prompt)[:, None].expand(-1, len(pixels), -1, -1)
        depth, count = prompts.shape[0], prompts.shape[2]
        x = visual.ln_pre(torch.cat([x[:, :1], prompts[0], x[:, 1:]], dim=1))
        for index, block in enumerate(visual.transformer.resblocks):
            if 0 < index < depth:
                x = torch.cat([x[:, :1], prompts[index - 1], x[:, 1 + count :]], dim=1)
            elif index == depth:
                x = torch.cat([x[:, :1], x[:, 1 + count :]], dim=1)
            x = block(x)
        return prompted.vpt_norm(x)[:, 1:]

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Densities [B, 384, 384] in (0, 1), of which `SCALE` is one thing.

        Args:
            pixels: [B, 3, H, W] in [0, 1].
            ids: see `encode_text`.
        """
        if pixels.shape[2:] != (SIZE, SIZE):
            pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        x = self.patch_feat_proj(self.encode_patches(pixels)) + self.patch_emb_pos_embed
        text, maps = self.encode_text(ids), []
        for index, block in enumerate(self.fim_blocks):
            side = round(x.shape[1] ** 0.5)
            if index:
                grid = x.transpose(1, 2).unflatten(2, (side, side))
                x = doubled(grid + F.gelu(block.conv0(grid))).flatten(2).transpose(1, 2)
                side *= 2
            x = block(x, text)
            maps.append(x.transpose(1, 2).unflatten(2, (side, side)))
        return self.density_decoder(*maps)[:, 0]


def from_transformers(clip: "CLIPModel") -> dict[str, Tensor]:
    """The weights of a CLIP of transformers under OpenAI's names."""
    state, converted = clip.state_dict(), {}
    for key, value in state.items():
        if key.endswith(("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "position_ids")):
            continue
        if ".q_proj." in key:
            value = torch.cat([state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        for theirs, ours in OPENAI:
            key = re.sub(theirs, ours, key)
        converted[key] = value.T if key in ("text_projection", "visual.proj") else value
    return converted


OPENAI = [  # names of transformers -> of OpenAI
    (r"^text_model\.", ""),
    (r"^vision_model\.", "visual."),
    (r"embeddings\.", ""),
    (r"position_embedding\.weight", "positional_embedding"),
    (r"patch_embedding\.", "conv1."),
    (r"encoder\.layers\.", "transformer.resblocks."),
    (r"self_attn\.q_proj\.", "attn.in_proj_"),
    (r"self_attn\.", "attn."),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"final_layer_norm", "ln_final"),
    (r"pre_layrnorm", "ln_pre"),
    (r"post_layernorm", "ln_post"),
    (r"text_projection\.weight", "text_projection"),
    (r"visual_projection\.weight", "visual.proj"),
]
FROZEN = ("clip.", "img_encoder.vit.", "text_encoder.clip_model.")
