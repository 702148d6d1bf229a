"""ControlAR: a LlamaGen that follows a control picture (edges, depth, segments), token by token.

Paper: "ControlAR: Controllable Image Generation with Autoregressive Models" (arXiv 2410.02705). Code and weights:
github.com/hustvl/ControlAR (Apache-2.0).

A vision Transformer turns the control picture into one vector for each cell of the token grid. Three small networks make of
it what is added to the stream at three depths, at the position that predicts the cell. All of it is computed once, before
the first token, belongs to the call, and is zero for the unguided half. (In the authors' code the strength acts under guidance
only, and the control of one call stays behind for the next.)

Letters in shape comments: B images, H W pixels, h w token grid, N = h*w cells (row-major), D width.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

# the loader of pipelines looks for this name beside the class
from diffusers import ModelMixin  # noqa: F401
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from argen.models.llamagen import MLP, SIZES, LlamaGen
from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.mapped import unfilled

ENCODERS = {  # the published control encoders
    "dinov2-small": {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14},
    "dinov2-base": {"hidden_size": 768, "num_attention_heads": 12, "image_size": 518, "patch_size": 14},
    "vit-small": {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "image_size": 224,
        "patch_size": 16,
    },
}
CELL = 16  # pixels on a side
RENAMED = [  # published (transformers 4) -> transformers 5
    (r"\.attention\.attention\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
]
RENAMED_VIT = [
    (r"\.encoder\.layer\.(\d+)\.", r".layers.\1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
]
UNUSED = ("condition_embeddings.weight", "condition_norm.weight", "adapter.model.pooler.", "freqs_cis")


class ControlEncoder(nn.Module):
    """Control pictures [B, 3, H, W] in [-1, 1] -> features [B, N, C].

    Args:
        kind: "dinov2" or "vit".
        resize: how DINOv2's input is made, "nearest" or "bicubic"; a matter of the checkpoint, not of the picture.
        sizes: of the transformers configuration.
    """

    def __init__(self, kind: str, resize: str, sizes: dict):
        super().__init__()
        self.kind, self.resize = kind, resize
        if kind == "dinov2":
            self.model = Dinov2Model(Dinov2Config(**sizes))
        else:
            self.model = ViTModel(ViTConfig(layer_norm_eps=1e-12, **sizes), add_pooling_layer=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "vit":
            return self.model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        patch = self.model.config.patch_size
        size = [side // CELL * patch for side in images.shape[2:]]
        aligned = {"mode": "bicubic", "align_corners": True} if self.resize == "bicubic" else {"mode": "nearest"}
        resized = F.interpolate(images.float(), size, **aligned).to(images.dtype)
        return self.model(pixel_values=resized).last_hidden_state[:, 1:]


class NullCondition(nn.Module):
    """`cap_proj`, beside a table of zeros whose length is the only trace of the grid in a published file."""

    def __init__(self, dim: int, length: int):
        super().__init__()
        self.cap_proj = MLP(dim, dim)
        self.register_buffer("uncond_embedding", torch.zeros(length, dim))


class ControlAR(LlamaGen):
    """A `LlamaGen` with a control encoder.

    Args:
        encoder: "dinov2" or "vit".
        encoder_sizes: of its transformers configuration.
        resize: see `ControlEncoder`.
        others: see `LlamaGen`; `depth` must be a multiple of 3.
    """

    @register_to_config
    def __init__(
        self,
        encoder: str = "dinov2",
        encoder_sizes: dict | None = None,
        resize: str = "bicubic",
        n_embed: int = 16384,
        grid: int = 32,
        classes: int | None = None,
        caption_dim: int = 2048,
        caption_length: int = 120,
        dim: int = 1280,
        depth: int = 36,
        heads: int = 20,
        multiple_of: int = 256,
        dropout: float = 0.1,
        caption_attention: bool = False,
        looks_ahead: bool = False,
    ):
        if depth % 3:
            raise ValueError(
                f"depth is {depth}: expected a multiple of 3, control enters before each third of the layers"
            )
        super().__init__(
            n_embed=n_embed,
            grid=grid,
            classes=classes,
            caption_dim=caption_dim,
            caption_length=caption_length,
            dim=dim,
            depth=depth,
            heads=heads,
            multiple_of=multiple_of,
            dropout=dropout,
            caption_attention=caption_attention,
            looks_ahead=looks_ahead,
        )
        self.adapter = ControlEncoder(encoder, resize, encoder_sizes or ENCODERS["dinov2-small"])
        self.adapter_mlp = MLP(self.adapter.model.config.hidden_size, dim)
        self.condition_mlp = NullCondition(dim, grid * grid)
        self.condition_layers = nn.ModuleList(MLP(dim, dim) for _ in range(3))

    @classmethod
    def from_original(
        cls, path: str | Path, encoder: str, grid: int, resize: str, size: str = "XL", classes: int | None = None
    ) -> "ControlAR":
        """Load a published file, which holds generator and encoder.

        Args:
            path: as ``canny_MR.safetensors`` or ``edge_base.safetensors``.
            encoder: a name in `ENCODERS`.
            grid: 48 for the files of many resolutions (``*_MR``), else 32.
            resize: "nearest" for ``canny_MR`` and ``seg_cocostuff``, "bicubic" for the others.
        """
        kind = encoder.partition("-")[0]
        sizes = ENCODERS[encoder]
        model = unfilled(cls, kind, sizes, resize, grid=grid, classes=classes, **SIZES[size])
        return load_strict(model, converted(read_state_dict(path, averaged=False), kind), source=path)

    def control(self, images: Tensor, strength: float = 1.0) -> Tensor:
        """Features that control images [B, 3, H, W] in [-1, 1] add to the stream: [3, B, N, D].

        Args:
            strength: multiplies it; 0 is no control.

        Raises:
            ValueError: a side is no multiple of 16, or there are more cells than the grid has.
        """
        height, width = images.shape[2:]
        if height % CELL or width % CELL:
            raise ValueError(f"the control image is {width} x {height}: expected multiples of {CELL}")
        if height * width > self.length * CELL**2:
            most = f"{self.length} cells of {CELL} x {CELL} pixels"
            raise ValueError(f"the control image is {width} x {height}: this model has at most {most}")
        tokens = self.condition_mlp.cap_proj(self.adapter_mlp(self.adapter(images)))
        return strength * torch.stack([layer(tokens) for layer in self.condition_layers])

    def forward(
        self,
        condition: Tensor,
        mask: Tensor,
        tokens: Tensor,
        images: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """See `LlamaGen.forward`.

        Args:
            images: control images [R, 3, H, W] in [-1, 1]; None is no control.
            dropped: [R] bool, the rows whose control picture is not looked at.
        """
        control = None if images is None else self.control(images)
        if control is not None and dropped is not None:
            control = control.masked_fill(dropped[None, :, None, None], 0)
        return super().forward(condition, mask, tokens, control)


def converted(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Tensors under their published names -> under ours, without those that nothing reads."""
    out = {}
    for key, value in state.items():
        if key.startswith(UNUSED):
            continue
        if key.startswith("adapter."):
            for published, ours in [*RENAMED, *(RENAMED_VIT if kind == "vit" else [])]:
                key = re.sub(published, ours, key)
        out[key] = value
    return out
