"""SEED: a picture as a few tokens of meaning in causal order, and back through a diffusion model.

Papers: "Planting a SEED of Vision in Large Language Model" (arXiv 2307.08041), "Making LLaMA SEE and Draw with SEED Tokenizer"
(arXiv 2310.01218). Weights: ``AILab-CVC/seed-tokenizer-2`` (Apache-2.0) and the vision transformer of EVA-CLIP, as BLIP-2 has it.
The vision transformer and the Q-Formers are those of transformers; the rest is named as published.

Letters in shape comments: B batch, P features of a picture, V their width, N tokens, D width, C width of a code, E width of the
generation embedding, which a diffusion model draws.
"""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, StableUnCLIPImg2ImgPipeline
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
)

from tokenizers_img.attention import DispatchedAttention
from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.conv_encoder import TwoEncoders
from tokenizers_img.hub import download
from tokenizers_img.pixels import CLIP_MEAN, CLIP_STD, from_pil, on_white, upright
from tokenizers_img.quantize import check_ids

logger = logging.getLogger(__name__)
DOWN = (256, 128, 32)  # widths of the "mlp" head, token by token
HEADS = {"mlp": "image", "reverse": "image", "text": "text"}  # how the embedding is made -> what it stands for
EVA = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
UNCLIP = os.environ.get("ARGEN_UNCLIP", "stabilityai/stable-diffusion-2-1-unclip")  # withdrawn in 2025: a copy will do
SMALLEST = 8  # pixels a side: in fewer there is nothing to recognise
NORM_EPS = 1e-5  # of the norm after the vision transformer, whose own are 1e-6


class Attention(DispatchedAttention):
    masked = False

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.proj(self.attend(query, key, value))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A layer of the decoders."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Codebook(nn.Module):
    """The nearest code by Euclidean distance, neither side normalised."""

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def nearest(self, z: Tensor) -> Tensor:
        """Ids [...] of vectors [..., C]."""
        codes = self.embedding.weight
        distance = z.square().sum(dim=-1, keepdim=True) + codes.square().sum(dim=-1) - 2 * z @ codes.T
        return distance.argmin(dim=-1)


def qformer(
    dim: int, layers: int, heads: int, hidden: int, features: int, text: bool = False, dropout: float = 0.1
) -> Blip2QFormerModel:
    """A Q-Former of BLIP-2 that looks at features [B, P, features] in every other layer; `text` gives it feed-forward layers for
    words, too."""
    config = Blip2QFormerConfig(
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden,
        encoder_hidden_size=features,
        cross_attention_frequency=2,
        layer_norm_eps=1e-12,
        use_qformer_text_input=text,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return Blip2QFormerModel(config)


def causal_mask(queries: Tensor) -> Tensor:
    """[B, N, D] -> which queries each may see, [B, 1, N, N] bool: itself and those before."""
    count = queries.shape[1]
    mask = torch.ones(count, count, dtype=torch.bool, device=queries.device).tril()
    return mask.expand(len(queries), 1, -1, -1)


class Seed(ModelMixin, ConfigMixin):
    """Features of a picture <-> causal ids -> generation embedding.

    Args:
        features: V, of the picture encoder.
        dim, layers, heads, hidden: of the causal Q-Former.
        tokens: N.
        n_embed, embed_dim: of the codebook.
        depth, block_heads: of each decoder.
        head: how the generation embedding is made: "mlp" (SEED-2 as published), "reverse" (a second Q-Former with one query, as the
            training code has it) or "text" (SEED-1: with 77, in place of a text's states).
        embedding: E.
        reverse_layers: of the second Q-Former.
        reconstruct: also the decoder of the Q-Former's output, which only training needs.
        nested: trained so that the first tokens alone can be decoded, too; not in the paper, nor in published files.
    """

    @register_to_config
    def __init__(
        self,
        features: int = 1408,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        tokens: int = 32,
        n_embed: int = 8192,
        embed_dim: int = 32,
        depth: int = 4,
        block_heads: int = 12,
        head: str = "mlp",
        embedding: int = 1024,
        reverse_layers: int = 4,
        reconstruct: bool = True,
        nested: bool = False,
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}: expected one of {', '.join(HEADS)}")
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.Qformer = qformer(dim, layers, heads, hidden, features)
        self.encode_task_layer = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, embed_dim))
        self.quantize = Codebook(n_embed, embed_dim)
        self.decode_task_layer = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.Tanh(), nn.Linear(embed_dim, dim))
        if reconstruct:
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
            self.blocks = nn.ModuleList(Block(dim, block_heads) for _ in range(depth))
        kind = HEADS[head]
        self.register_parameter(f"pos_embed_{kind}", nn.Parameter(torch.zeros(1, tokens, dim)))
        self.add_module(f"blocks_{kind}", nn.ModuleList(Block(dim, block_heads) for _ in range(depth)))
        if head == "mlp":
            widths = zip((dim, *DOWN), DOWN, strict=False)
            layers_down = [part for pair in widths for part in (nn.Linear(*pair, bias=False), nn.ReLU())]
            self.image_down = nn.Sequential(*layers_down[:-1])
            joined = tokens * DOWN[-1]
        else:
            self.reverse_tokens = nn.Parameter(0.02 * torch.randn(1, 77 if head == "text" else 1, dim))
            self.Reverse_Qformer = qformer(dim, reverse_layers, heads, hidden, dim)
            joined = dim
        self.add_module(f"distill_{kind}_proj", nn.Linear(joined, embedding))

    def queries(self, features: Tensor) -> Tensor:
        """Features [B, P, V] -> what the causal queries found [B, N, D]: none has seen those after it."""
        asked = self.query_tokens.expand(len(features), -1, -1)
        mask = causal_mask(asked)
        return self.Qformer(query_embeds=asked, attention_mask=mask, encoder_hidden_states=features).last_hidden_state

    def ids(self, features: Tensor) -> Tensor:
        """Features [B, P, V] -> ids [B, N]."""
        return self.quantize.nearest(self.encode_task_layer(self.queries(features)))

    def embed(self, codes: Tensor) -> Tensor:
        """Codes [B, N, C] -> generation embedding [B, E], of SEED-1 [B, 77, E]; as large as it comes, never normalised. A code
        that is zero counts as missing, where training was nested."""
        kind = HEADS[self.config.head]
        x = self.decode_task_layer(codes) + getattr(self, f"pos_embed_{kind}")
        for block in getattr(self, f"blocks_{kind}"):
            x = block(x)
        if self.config.head == "mlp":
            return self.distill_image_proj(self.image_down(x).flatten(1))
        queries = self.reverse_tokens.expand(len(x), -1, -1)
        found = self.Reverse_Qformer(query_embeds=queries, encoder_hidden_states=x).last_hidden_state
        made = getattr(self, f"distill_{kind}_proj")(found)
        return made if kind == "text" else made.squeeze(1)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Codes [B, N, C] -> the output of the causal Q-Former, about [B, N, D]."""
        x = self.decode_task_layer(codes) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x

    def decode(self, ids: Tensor) -> Tensor:
        """Ids [B, N], nested also the first K of them [B, K] -> generation embedding, see `embed`.

        Raises:
            ValueError: too few ids or too many, or one outside the codebook.
        """
        most = self.config.tokens
        for row in ids:
            check_ids(row, self.config.n_embed, 1 if self.config.nested else most, most)
        return self.embed(F.pad(self.quantize.embedding(ids), (0, 0, 0, most - ids.shape[1])))


def vision_network(
    image_size: int = 224, dim: int = 1408, depth: int = 39, heads: int = 16, mlp_ratio: float = 4.3637
) -> Blip2VisionModel:
    """The picture encoder, by default ViT-g without its last block; its last norm is SEED's own."""
    config = Blip2VisionConfig(
        hidden_size=dim,
        intermediate_size=int(dim * mlp_ratio),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=14,
        layer_norm_eps=1e-6,
        qkv_bias=True,
    )
    network = Blip2VisionModel(config)
    network.post_layernorm.eps = NORM_EPS
    return network


VISION_NAMES = [  # of the published file -> of transformers
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^ln_vision\.", "post_layernorm."),
]
QFORMER_NAMES = [
    (r"(Q|Reverse_Q)former\.bert\.", r"\1former."),
    (r"former\.embeddings\.LayerNorm\.", "former.layernorm."),
    (r"\.(cross)?attention\.self\.", r".\1attention.attention."),
]


def _renamed(key: str, names: list[tuple[str, str]]) -> str:
    for published, ours in names:
        key = re.sub(published, ours, key)
    return key


def vision_state(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The tensors of a vision transformer and of ``ln_vision`` under the names of transformers; blocks from `depth` on are left out."""
    state = {key.removeprefix("visual_encoder."): value for key, value in state.items()}
    converted = {}
    for key, value in state.items():
        block = re.match(r"blocks\.(\d+)\.", key)
        if key.endswith(("attn.q_bias", "attn.v_bias")) or (block and int(block[1]) >= depth):
            continue
        converted[_renamed(key, VISION_NAMES)] = value
        if key.endswith("attn.qkv.weight"):
            query, other = (state[key.replace("qkv.weight", f"{part}_bias")] for part in "qv")
            bias = torch.cat([query, torch.zeros_like(query), other])
            converted[_renamed(key, VISION_NAMES).replace(".weight", ".bias")] = bias
    return converted


def seed_state(state: dict[str, Tensor], network: Seed) -> dict[str, Tensor]:
    """The tensors that `network` has, out of a published file, under our names; the others are counted in the log."""
    renamed = {_renamed(key, QFORMER_NAMES): value for key, value in state.items()}
    wanted = network.state_dict().keys()
    left = len([key for key in renamed if key not in wanted])
    if left:
        logger.info("%d tensors of the file are not part of the tokenizer", left)
    return {key: value for key, value in renamed.items() if key in wanted}


def head_of(state: dict[str, Tensor]) -> str:
    """Which head a published file has, see `Seed`.

    Raises:
        ValueError: none that is known.
    """
    if "image_down.0.weight" in state:
        return "mlp"
    if "distill_image_proj.weight" in state:
        return "reverse"
    if "distill_text_proj.weight" in state:
        return "text"
    raise ValueError("the file has no head of SEED: expected image_down, distill_image_proj or distill_text_proj")


def from_original(path: str | Path, vision: str | Path | None = None) -> tuple[Seed, Blip2VisionModel]:
    """Load the published ``seed_quantizer.pt`` and the vision transformer.

    Args:
        vision: ``eva_vit_g.pth``; None where the first file has it, too.

    Raises:
        ValueError: a tensor is missing or of another shape.
    """
    state = read_state_dict(path)
    with torch.device("meta"):
        network, encoder = Seed(**sizes_of(state)), vision_network()
    network = load_strict(network, seed_state(state, network), source=path)
    seen = state if vision is None else read_state_dict(vision)
    own = {key: value.float() for key, value in seen.items() if vision or key.startswith("visual_encoder.")}
    own = {key: value for key, value in own.items() if not re.match(r"(norm|fc_norm|head)\.", key)}
    own |= {key: value for key, value in state.items() if key.startswith("ln_vision.")}
    return network, load_strict(encoder, vision_state(own, encoder.config.num_hidden_layers), source=vision or path)


def eva_file() -> Path:
    """The published vision transformer, out of torch's cache or fetched into it (1.9 GB, MIT).

    Raises:
        ConnectionError: it is not here and cannot be fetched.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / EVA.rpartition("/")[2]
    refusal = f"the picture encoder of SEED is not on this machine and could not be fetched: get {EVA} and put it into {path.parent}"
    return download(EVA, path, refusal)


def sizes_of(state: dict[str, Tensor]) -> dict:
    """The sizes of `Seed` that a published file does not share with all others."""
    head = head_of(state)
    layers = {
        int(found[1]) for key in state if (found := re.match(r"Reverse_Qformer\.bert\.encoder\.layer\.(\d+)", key))
    }
    own = {"head": head, "reconstruct": "pos_embed" in state}
    return (
        own | ({"reverse_layers": max(layers) + 1} if layers else {}) | ({"embedding": 768} if head == "text" else {})
    )


class UnCLIP(StableUnCLIPImg2ImgPipeline):
    """Pictures after embeddings, which can be guided away from the embedding of another picture.

    Attributes:
        away: embeddings [B, E] that are not wanted; None guides away from no picture at all, which is all zeros.
    """

    away: Tensor | None = None

    def _encode_image(
        self,
        image: None,
        device: torch.device,
        batch_size: int,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        noise_level: Tensor,
        generator: torch.Generator | None,
        image_embeds: Tensor,
    ) -> Tensor:
        wanted = self.noise_image_embeddings(image_embeds, noise_level, generator=generator)
        wanted = wanted.repeat_interleave(num_images_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            return wanted
        if self.away is None:
            return torch.cat([torch.zeros_like(wanted), wanted])
        away = self.noise_image_embeddings(self.away.to(wanted), 0, generator=generator)
        return torch.cat([away.expand_as(wanted), wanted])


class SeedTokenizer(nn.Module):
    """Pixels <-> causal ids; what comes back shows the same thing, not the same pixels.

    Args:
        network: of the tokens.
        vision: the picture encoder, of BLIP-2 or of `argen/emoji-seed`.
        decoder: draws generation embeddings, or gives what does when it is first needed; None where pictures are only read.
        steps, guidance_scale: of the decoder; as published.
        seed: of the noise that every picture starts from, so that decoding repeats.
        mean, std: of the colours, for the picture encoder.
        squashed: whether pictures that are no squares are squashed, as published, or padded.
    """

    def __init__(
        self,
        network: Seed,
        vision: Blip2VisionModel | TwoEncoders,
        decoder: UnCLIP | Callable[[], UnCLIP] | None = None,
        steps: int = 20,
        guidance_scale: float = 10.0,
        seed: int = 0,
        mean: tuple[float, float, float] = CLIP_MEAN,
        std: tuple[float, float, float] = CLIP_STD,
        squashed: bool = True,
    ):
        super().__init__()
        self.network, self.vision, self.decoder = network, vision, decoder
        self.steps, self.guidance_scale, self.seed = steps, guidance_scale, seed
        self.mean, self.std, self.squashed = mean, std, squashed
        own = {"tokens": network.config.tokens} if network.config.nested else {}  # of which the first alone will do
        self.config = FrozenDict(image_size=vision.config.image_size, n_embed=network.config.n_embed, **own)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def prepare(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
        """A picture -> pixels [3, S, S] in [0, 1], as in training; the authors' scripts have it bilinear.

        Raises:
            ValueError: it is too small to show anything.
        """
        if min(image.size) < SMALLEST:
            raise ValueError(
                f"the picture is {image.width} x {image.height}: SEED expects at least {SMALLEST} pixels a side"
            )
        size = self.config.image_size
        if not self.squashed:
            return from_pil(image, size)
        small = on_white(upright(image)).resize((size, size), resample)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] -> ids [B, N]."""
        return self.network.ids(self.features(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] -> features [B, P, V].

        Raises:
            ValueError: they are of another size.
        """
        size = self.config.image_size
        if tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"images are {list(pixels.shape[1:])}: expected [3, {size}, {size}]")
        return self.vision(self.normalised(pixels).to(self.vision.dtype)).last_hidden_state.to(self.dtype)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] -> as the picture encoder wants them."""
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    @torch.no_grad()
    def decode(self, ids: Tensor, away: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Ids [B, N] -> pixels [B, 3, H, W] in [0, 1].

        Args:
            away: ids [1 or B, N] of what is not wanted, as the language model writes without a prompt.
            generator: of the noise; None is the tokenizer's own, the same for all pictures.

        Raises:
            ValueError: bad ids, see `Seed.decode`; there is no decoder.
        """
        wanted = self.network.decode(ids)
        if self.decoder is None:
            raise ValueError(
                f"these tokens were read without a decoder, so nothing can be drawn: {UNCLIP} draws them, or a copy of it"
            )
        if not isinstance(self.decoder, UnCLIP):
            self.decoder = self.decoder()
        self.decoder.set_progress_bar_config(disable=True)
        pipe, size = self.decoder.to(self.device), self.decoder.unet.config.sample_size
        generator = torch.Generator().manual_seed(self.seed) if generator is None else generator
        shape = 1, pipe.unet.config.in_channels, size, size
        noise = randn_tensor(shape, generator, pipe.device, pipe.unet.dtype).expand(len(ids), -1, -1, -1)
        pipe.away = None if away is None else self.network.decode(away)
        made = pipe(
            image_embeds=wanted.to(pipe.unet.dtype),
            prompt=[""] * len(ids),
            latents=noise.clone() * pipe.scheduler.init_noise_sigma,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=generator,
            output_type="pt",
        )
        return made.images
