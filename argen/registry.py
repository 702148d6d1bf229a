"""What exists: the weights that ship with argen and the published ones that it loads; `load` gives any of them."""

import difflib
import json
import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ModelMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPModel, LlamaForCausalLM, PreTrainedTokenizerFast, T5EncoderModel

from argen.data.emoji import GROUPS, STYLES, with_article
from argen.data.scenes import COMMON, NUMBERS
from argen.device import LOADING, silent
from argen.diffusion.count_token import ONE_STEP
from argen.diffusion.counters import (
    CLIPCountDensity,
    CLIPRelevance,
    Detected,
    EmojiDensity,
    EmojiRelevance,
    components,
)
from argen.diffusion.emoji import DRAWN, EMOJI_SEED, assembled, unclip
from argen.eval.reconstruction import Tokenizer
from argen.models.clip import TextImageEncoder
from argen.models.controlar import ControlAR
from argen.models.counter import Counter
from argen.models.draft import Drafter
from argen.models.flexar import FlexAR
from argen.models.judge import Judge
from argen.models.llamagen import LlamaGen
from argen.models.llamagen_files import read_generator
from argen.models.parti import Parti
from argen.models.seed_llama import read_tokenizer
from argen.models.xar import XAR
from argen.pipelines.base import TokenPipeline
from argen.pipelines.controlar import ControlARPipeline
from argen.pipelines.dalle_mini import DalleMiniPipeline
from argen.pipelines.flexar import FlexARPipeline
from argen.pipelines.llamagen import LlamaGenPipeline
from argen.pipelines.parti import PartiPipeline
from argen.pipelines.seed_llama import SeedLlamaPipeline
from argen.pipelines.xar import XARPipeline
from argen.words import caption_names, cut, mentions, split_names, visible
from tokenizers_img import seed
from tokenizers_img.checkpoint import read_state_dict, refuse_placeholder
from tokenizers_img.conv_encoder import ConvEncoder, TwoEncoders
from tokenizers_img.flextok import FlexTok, FlexTokenizer
from tokenizers_img.hub import hub_file, hub_folder
from tokenizers_img.kl_vae import KLVAE
from tokenizers_img.llamagen_vq import LlamaGenVQ
from tokenizers_img.seed import Seed, SeedTokenizer, UnCLIP
from tokenizers_img.vit_vqgan import ViTVQGAN

NOT_READ = OSError, ValueError, RuntimeError, SafetensorError  # by files that do not fit
UNUSABLE = (*NOT_READ, TypeError, AttributeError, LookupError)  # by settings beside them that do not
WEIGHTS = Path(__file__).parent / "weights"
COUNTED = DRAWN | {"num_inference_steps": 4}  # pictures of emoji-sd in a moment
EMOJI_FLOW = {"steps": 12, "guidance_scale": 3.0}  # of emoji-flextok, from tokens to a picture
PIPELINES = {
    cls.__name__: cls
    for cls in (PartiPipeline, DalleMiniPipeline, LlamaGenPipeline, ControlARPipeline, XARPipeline, FlexARPipeline)
}

IN_BFLOAT16 = (T5EncoderModel, LlamaForCausalLM)  # where published: as trained; in float16 T5 overflows
DIFFUSION = {cls.__name__: cls for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
# diffusers warns whenever a network is cast, even of one in which nothing must stay float32
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "should be kept in float32: []" not in record.getMessage()
)
DIFFUSION_FILES = ("*.json", "*/*.json", "*/*.txt", "*/model.safetensors", "*/diffusion_pytorch_model.safetensors")


Loaded = TokenPipeline | Tokenizer | TextImageEncoder | Drafter | StableDiffusionPipeline | Counter | Judge


@dataclass(frozen=True)
class Model:
    """One line of `argen models`, and how it is loaded.

    Attributes:
        kind: "generator" (`load` gives a pipeline), "tokenizer" (picture <-> tokens), "encoder" (text and picture),
            "drafter" (of a generator, which brings it), "diffusion" (a pipeline of diffusers), "counter" (of the things in a
            picture) or "judge" (what a picture shows).
        repo: hub repository of published weights, None for shipped ones.
        files: glob patterns of the files in `repo` that are read.
        read: turns the folder that holds the files into what `load` gives.
        parameters: in millions, of everything that the id loads by itself.
        takes: what a generator is asked with: "text", "class", "control" (a picture to follow).
        grid: whether its pictures are grids of tokens, each with its place, which can be read from pictures, too.
    """

    kind: str
    about: str
    licence: str
    parameters: float
    read: Callable[[Path], Loaded]
    repo: str | None = None
    files: tuple[str, ...] = ()
    takes: tuple[str, ...] = ("text",)
    grid: bool = False


def _parti(folder: Path) -> PartiPipeline:
    encoder = _encoder(WEIGHTS / "emoji-clip")
    return PartiPipeline(
        clip=encoder.clip,
        tokenizer=encoder.tokenizer,
        transformer=_network(Parti, folder),
        image_tokenizer=_network(ViTVQGAN, WEIGHTS / "emoji-vitvqgan"),
    )


def _emoji_llamagen(folder: Path) -> LlamaGenPipeline:
    drafter = _network(Drafter, WEIGHTS / "emoji-drafter")
    return LlamaGenPipeline(_network(LlamaGen, folder), **_emoji_ids(), **_emoji_text(), drafter=drafter)


def _emoji_control(folder: Path) -> ControlARPipeline:
    return ControlARPipeline(_network(ControlAR, folder), **_emoji_ids(), **_emoji_text(), any_size=True)


def _emoji_xar(folder: Path) -> XARPipeline:
    return XARPipeline(_network(XAR, folder), _network(AutoencoderKL, WEIGHTS / "emoji-vae"), **_emoji_text())


def _emoji_flexar(folder: Path) -> FlexARPipeline:
    images = _emoji_flextok(WEIGHTS / "emoji-flextok")
    own = {"steps": images.steps, "tokenizer_guidance": images.guidance_scale}
    return FlexARPipeline(_network(FlexAR, folder), images.network, images.vae, **_emoji_text(), **own)


def _emoji_ids() -> dict:
    return {"vq": _network(ViTVQGAN, WEIGHTS / "emoji-vitvqgan")}


def _emoji_text() -> dict:
    """How the generators of the emoji family are asked."""
    encoder = _encoder(WEIGHTS / "emoji-clip")
    return {"text_encoder": encoder.clip, "tokenizer": encoder.tokenizer, "groups": list(GROUPS)}


def _emoji_flextok(folder: Path) -> FlexTokenizer:
    return FlexTokenizer(_network(FlexTok, folder), _network(AutoencoderKL, WEIGHTS / "emoji-vae"), **EMOJI_FLOW)


def _emoji_seed(folder: Path) -> SeedTokenizer:
    encoder = _encoder(WEIGHTS / "emoji-clip")
    decoder = unclip(
        _network(UNet2DConditionModel, folder / "unet"),
        _network(StableUnCLIPImageNormalizer, folder / "image_normalizer"),
        _network(AutoencoderKL, WEIGHTS / "emoji-vae"),
        encoder.clip,
        encoder.tokenizer,
    )
    vision = TwoEncoders(encoder.clip.vision_model, _network(ConvEncoder, folder / "vision"))
    return SeedTokenizer(_network(Seed, folder), vision, decoder, **EMOJI_SEED)


def _emoji_seed_lm(folder: Path) -> SeedLlamaPipeline:
    model, info = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    words = AutoTokenizer.from_pretrained(folder)
    return SeedLlamaPipeline(_complete(model, info), words, _emoji_seed(WEIGHTS / "emoji-seed"), "emoji")


def _emoji_sd(folder: Path) -> StableDiffusionPipeline:
    encoder = _encoder(WEIGHTS / "emoji-clip")
    networks = _network(UNet2DConditionModel, folder), _network(AutoencoderKL, WEIGHTS / "emoji-vae")
    return assembled(*networks, encoder.clip, encoder.tokenizer)


def _encoder(folder: Path) -> TextImageEncoder:
    model, info = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return TextImageEncoder(_complete(model, info), AutoTokenizer.from_pretrained(folder))


def _network(cls: type[ModelMixin], folder: Path) -> ModelMixin:
    model, info = cls.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    return _complete(model, info)


def _complete(model: torch.nn.Module, info: dict) -> torch.nn.Module:
    wrong = [f"{kind.removesuffix('_keys')} {key}" for kind in info for key in info[kind]]
    if wrong:
        raise ValueError(f"does not fit {type(model).__name__}: {'; '.join(wrong[:3])}")
    return model.eval()


def _vitvqgan(size: str) -> Callable[[Path], ViTVQGAN]:
    def read(folder: Path) -> ViTVQGAN:
        found = sorted(folder.glob("*.ckpt"))
        if len(found) != 1:
            raise FileNotFoundError(f"{len(found)} .ckpt files in {folder}: expected one")
        return ViTVQGAN.from_original(found[0], size)

    return read


def _dalle(size: str) -> dict:
    return {
        "licence": "Apache-2.0 (weights), MIT (their PyTorch form)",
        "repo": "kuprel/min-dalle",
        "files": tuple(DalleMiniPipeline.original_files(size)),
        "read": lambda folder: DalleMiniPipeline.from_original(folder, size),
    }


def _llamagen(name: str, parameters: float) -> Model:
    """`name` is that of the released file, as "c2i_L_384"."""
    kind, size, *_, pixels = name.split("_")
    repo = "FoundationVision/LlamaGen" if kind == "c2i" else "peizesun/llamagen_t2i"

    def read(folder: Path) -> LlamaGenPipeline:
        text = _t5() if kind == "t2i" else (None, None)
        files = folder / f"{name}.pt", folder / f"vq_ds16_{kind}.pt"
        return LlamaGenPipeline.from_original(*files, size, int(pixels) // 16, *text)

    asked = "class" if kind == "c2i" else "text"
    about = f"LlamaGen {size}, {asked} -> {(int(pixels) // 16) ** 2} tokens -> {pixels} x {pixels}"
    files = f"{name}.pt", f"vq_ds16_{kind}.pt"
    return Model("generator", about, "MIT", parameters, read, repo, files, takes=(asked,), grid=True)


def _llamagen_files(
    path: Path, tokenizer: str | Path | None = None, image_size: int | None = None
) -> LlamaGenPipeline | LlamaGenVQ:
    """A LlamaGen with its tokenizer, or a tokenizer alone, out of checkpoints of any size and name."""
    names = read_state_dict(path, averaged=False).keys()
    if "encoder.conv_in.weight" in names:
        return LlamaGenVQ.from_checkpoint(path)
    kind = "t2i" if any("cap_proj" in name for name in names) else "c2i"
    beside = (path if path.is_dir() else path.parent) / f"vq_ds16_{kind}.pt"
    if tokenizer is None and not beside.is_file():
        raise ValueError(f"no {beside.name} lies beside {path}: give its image tokenizer, --tokenizer FILE")
    images = LlamaGenVQ.from_checkpoint(tokenizer or beside)
    generator = read_generator(path, images.stride, image_size)
    if tokenizer is not None and images.config.n_embed != generator.config.n_embed:
        raise ValueError(
            f"the tokenizer {tokenizer} has {images.config.n_embed} codes, {path} writes "
            f"{generator.config.n_embed}: give --tokenizer the one it was trained with"
        )
    return LlamaGenPipeline(generator, images.vq, *(_t5() if kind == "t2i" else ()))


def _t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """In bfloat16, as LlamaGen was trained: it overflows in float16."""
    return T5EncoderModel.from_pretrained(T5, dtype=torch.bfloat16).eval(), AutoTokenizer.from_pretrained(T5)


def _controlar(name: str, about: str, encoder: str, grid: int, resize: str) -> Model:
    """`name` is that of the released file, as "canny_MR"; the others as in `ControlAR.from_original`."""

    def read(folder: Path) -> ControlARPipeline:
        vq = folder / "vq_ds16_t2i.pt"
        vq = vq if vq.is_file() else hub_file("peizesun/llamagen_t2i", vq.name)
        return ControlARPipeline.from_original(folder / f"{name}.safetensors", vq, encoder, grid, resize, *_t5())

    size = "any size up to 2304 tokens" if grid == 48 else "512 x 512"
    parameters = 886.9 if encoder == "dinov2-small" else 951.9
    about = f"ControlAR on LlamaGen XL, text and {about} -> {size}"
    files, takes = (f"{name}.safetensors",), ("text", "control")
    return Model("generator", about, "Apache-2.0", parameters, read, "wondervictor/ControlAR", files, takes)


def _xar(repo: str, name: str, size: str, parameters: float, licence: str) -> Model:
    """`name` is that of the released file, as "xAR-B"."""

    def read(folder: Path) -> XARPipeline:
        vae = folder / "kl16.ckpt"
        return XARPipeline.from_original(
            folder / f"{name}.pth", vae if vae.is_file() else hub_file(KL16, vae.name), size
        )

    about = f"xAR {size}, class -> 4 cells of 64 latents -> 256 x 256"
    return Model("generator", about, licence, parameters, read, repo, (f"{name}.pth",), takes=("class",))


def _llamagen_vq(name: str, parameters: float) -> Model:
    """`name` is that of the released file, as "vq_ds16_c2i"."""
    _, stride, kind = name.split("_")
    repo = "FoundationVision/LlamaGen" if kind == "c2i" else "peizesun/llamagen_t2i"
    side = 256 // int(stride.removeprefix("ds"))
    about = f"LlamaGen's VQ, 256 x 256 <-> {side} x {side} ids of 16384"
    return Model(
        "tokenizer",
        about,
        "MIT",
        parameters,
        lambda folder: LlamaGenVQ.from_original(folder / f"{name}.pt", 256 // side),
        repo,
        (f"{name}.pt",),
    )


def _flextok(size: str, parameters: float) -> Model:
    """`size` as in the name of the repository, "d12_d12_in1k"."""
    repo = f"EPFL-VILAB/flextok_{size}"
    about = f"FlexTok {size}, 256 x 256 <-> 1 to 256 ordered ids of 64000"
    return Model(
        "tokenizer",
        about,
        APPLE,
        parameters,
        lambda folder: FlexTokenizer.from_original(folder / "model.safetensors"),
        repo,
        ("model.safetensors", "config.json"),
    )


def _flexar(name: str, parameters: float) -> Model:
    """`name` as in the name of the repository, "1B-T2I"."""
    repo, text = f"EPFL-VILAB/FlexAR-{name}", name.endswith("T2I")
    tokens, file = f"EPFL-VILAB/flextok_d18_d28_{'dfn' if text else 'in1k'}", "model.safetensors"

    def read(folder: Path) -> FlexARPipeline:
        images = hub_folder(tokens, (file, "config.json"))
        return FlexARPipeline.from_original(folder / file, images / file, *(_t5() if text else ()))

    asked = "text" if text else "class"
    about = f"FlexAR {name}, {asked} -> 1 to 256 ordered tokens -> 256 x 256; unproven: its key list is not public"
    licence = f"Apache-2.0; its picture tokenizer: {APPLE}"
    return Model("generator", about, licence, parameters, read, repo, (file, "config.yaml"), takes=(asked,))


def _seed(folder: Path) -> SeedTokenizer:
    """The vision transformer may lie beside the file."""
    own = folder / "eva_vit_g.pth"
    network, vision = seed.from_original(folder / SEED_FILE, own if own.is_file() else seed.eva_file())
    return SeedTokenizer(network, vision, _unclip)


def _unclip() -> UnCLIP:
    return _in_float32(UnCLIP.from_pretrained(hub_folder(seed.UNCLIP, UNCLIP_FILES)))


def _seed_llama(name: str, parameters: float) -> Model:
    """`name` as in the name of the repository, "8b-sft"."""
    repo = f"AILab-CVC/seed-llama-{name}"

    def read(folder: Path) -> SeedLlamaPipeline:
        words = hub_folder(SEED, (SEED_FILE, "tokenizer.model", "*.json"))
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        form = "pretrain" if name.endswith("pretrain") else name
        return SeedLlamaPipeline(model, read_tokenizer(words), _seed(words), form)

    about = f"SEED-LLaMA {name}, text -> 32 causal tokens -> 768 x 768; also pictures -> text"
    licence = "Llama 2; picture tokenizer Apache-2.0, decoder OpenRAIL++"
    return Model("generator", about, licence, parameters, read, repo, ("*.bin", "*.json"))


def _vae(folder: Path) -> KLVAE:
    return KLVAE(_network(AutoencoderKL, folder))


def _flextok_vae(channels: int, parameters: float) -> Model:
    repo = f"EPFL-VILAB/flextok_vae_c{channels}"
    about = f"FlexTok's VAE, 256 x 256 <-> 32 x 32 latents of {channels} numbers"
    files = ("diffusion_pytorch_model.safetensors", "config.json")
    return Model("tokenizer", about, APPLE, parameters, _vae, repo, files)


SEED, SEED_FILE = "AILab-CVC/seed-tokenizer-2", "seed_quantizer.pt"
UNCLIP_FILES = DIFFUSION_FILES + ("image_normalizer/*",)
APPLE = "Apple ML Research Model licence (research only)"
T5, KL16 = "google/flan-t5-xl", "xwen99/mar-vae-kl16"
LLAMAGEN = {
    **{  # with the picture tokenizer's 71.9 million
        name: _llamagen(name, parameters)
        for name, parameters in {
            "c2i_B_256": 182.8,
            "c2i_B_384": 182.8,
            "c2i_L_256": 414.8,
            "c2i_L_384": 414.8,
            "c2i_XL_384": 846.6,
            "c2i_XXL_384": 1482.9,
            "c2i_3B_384": 3168.5,
            "t2i_XL_stage1_256": 849.6,
            "t2i_XL_stage2_512": 849.6,
        }.items()
    },
    **{
        name: _llamagen_vq(name, parameters)
        for name, parameters in {"vq_ds16_c2i": 71.9, "vq_ds8_c2i": 70.1, "vq_ds16_t2i": 71.9}.items()
    },
}

CONTROLAR = {
    "canny_MR": _controlar("canny_MR", "canny edges", "dinov2-small", 48, "nearest"),
    "depth_MR": _controlar("depth_MR", "depth", "dinov2-small", 48, "bicubic"),
    "hed": _controlar("hed", "HED edges", "dinov2-small", 32, "bicubic"),
    "seg_cocostuff": _controlar("seg_cocostuff", "COCO-Stuff segments", "dinov2-small", 32, "nearest"),
    "edge_base": _controlar("edge_base", "canny, HED or inverted line art", "dinov2-base", 32, "bicubic"),
    "depth_base": _controlar("depth_base", "depth", "dinov2-base", 32, "bicubic"),
}
XAR_FILES = {  # with the picture tokenizer's 66.5 million
    **{
        name: _xar("OliverRen/xAR", name, name[-1], parameters, "none stated")
        for name, parameters in {"xAR-B": 239.1, "xAR-L": 674.9, "xAR-H": 1252.5}.items()
    },
    "Neon_xARB_imagenet256": _xar("sinaalemohammad/Neon", "Neon_xARB_imagenet256", "B", 239.1, "MIT (code)"),
    "Neon_xARL_imagenet256": _xar("sinaalemohammad/Neon", "Neon_xARL_imagenet256", "L", 674.9, "MIT (code)"),
}
FLEXTOK = {
    **{
        f"EPFL-VILAB/flextok_{size}": _flextok(size, parameters)
        for size, parameters in {
            "d12_d12_in1k": 341.7,
            "d18_d18_in1k": 949.7,
            "d18_d28_in1k": 2540.9,
            "d18_d28_dfn": 2540.9,
        }.items()
    },
    **{  # with the picture tokenizer's 2,541 million
        f"EPFL-VILAB/FlexAR-{name}": _flexar(name, parameters)
        for name, parameters in {
            "113M-T2I": 2752.3,
            "382M-T2I": 3070.5,
            "1B-T2I": 3903.9,
            "3B-T2I": 5895.9,
            "1B-C2I": 3936.5,
        }.items()
    },
    **{
        f"EPFL-VILAB/flextok_vae_c{channels}": _flextok_vae(channels, parameters)
        for channels, parameters in {4: 83.7, 8: 83.7, 16: 83.8}.items()
    },
}
RELEASED = LLAMAGEN | CONTROLAR | XAR_FILES  # name of the file -> its entry

MODELS = {
    "argen/emoji-parti": Model(
        "generator", "text -> 64 tokens -> 128 x 128 emoji, Parti-style", "Apache-2.0", 7.3, _parti, grid=True
    ),
    "argen/emoji-llamagen": Model(
        "generator",
        "text or group of emoji -> 64 tokens -> 128 x 128 emoji, LlamaGen",
        "Apache-2.0",
        7.0,
        _emoji_llamagen,
        takes=("text", "class"),
        grid=True,
    ),
    "argen/emoji-control": Model(
        "generator",
        "text and canny edges or segments -> at most 64 tokens -> at most 128 x 128 pixels of any shape, ControlAR",
        "Apache-2.0",
        7.9,
        _emoji_control,
        takes=("text", "class", "control"),
    ),
    "argen/emoji-xar": Model(
        "generator",
        "text or group of emoji -> 4 cells of 16 latents -> 128 x 128 emoji, xAR",
        "Apache-2.0",
        6.0,
        _emoji_xar,
        takes=("text", "class"),
    ),
    "argen/emoji-flextok-ar": Model(
        "generator",
        "text or group of emoji -> 1 to 64 ordered tokens -> 128 x 128 emoji, FlexAR",
        "Apache-2.0",
        2.5,
        _emoji_flexar,
        takes=("text", "class"),
    ),
    "argen/emoji-seed-lm": Model(
        "generator",
        "text -> 16 causal tokens -> 128 x 128 emoji that shows the same, SEED-LLaMA; also pictures -> text",
        "Apache-2.0",
        5.3,
        _emoji_seed_lm,
    ),
    "argen/emoji-sd": Model(
        "diffusion",
        "text -> 128 x 128 emoji, Stable Diffusion for `argen bind`, `erase` and `count`",
        "Apache-2.0",
        7.5,
        _emoji_sd,
    ),
    "argen/emoji-vitvqgan": Model(
        "tokenizer", "ViT-VQGAN, 128 x 128 <-> 8 x 8 ids of 4096", "Apache-2.0", 8.0, lambda f: _network(ViTVQGAN, f)
    ),
    "argen/emoji-vae": Model(
        "tokenizer",
        "KL autoencoder, 128 x 128 <-> 8 x 8 latents of 16 numbers",
        "Apache-2.0",
        7.1,
        _vae,
    ),
    "argen/emoji-flextok": Model(
        "tokenizer", "FlexTok, 128 x 128 <-> 1 to 64 ordered ids of 1000", "Apache-2.0", 4.3, _emoji_flextok
    ),
    "argen/emoji-seed": Model(
        "tokenizer",
        "SEED, 128 x 128 <-> 1 to 16 causal ids of 1024; what comes back shows the same",
        "Apache-2.0",
        9.6,
        _emoji_seed,
    ),
    "argen/emoji-clip": Model("encoder", "CLIP of emoji and their captions", "Apache-2.0", 3.7, _encoder),
    "argen/emoji-drafter": Model(
        "drafter", "EAGLE drafter of argen/emoji-llamagen", "Apache-2.0", 1.8, lambda f: _network(Drafter, f)
    ),
    "argen/emoji-counter": Model(
        "counter",
        "how many things an emoji picture shows, and where",
        "Apache-2.0",
        0.2,
        lambda f: _network(Counter, f),
    ),
    "argen/emoji-judge": Model(
        "judge", "names an object of an emoji picture and its colour", "Apache-2.0", 2.1, lambda f: _network(Judge, f)
    ),
    "dalle-mini": Model(
        "generator", "DALL-E mini, text -> 256 tokens -> 256 x 256", parameters=484.7, **_dalle("mini")
    ),
    "dalle-mega": Model(
        "generator", "DALL-E mega, text -> 256 tokens -> 256 x 256", parameters=2634.7, **_dalle("mega")
    ),
    **{f"{model.repo}:{name}": model for name, model in RELEASED.items()},
    **FLEXTOK,
    SEED: Model(
        "tokenizer",
        "SEED-2, a picture -> 32 causal ids of 8192 -> 768 x 768 that shows the same",
        "Apache-2.0; picture encoder MIT, decoder OpenRAIL++",
        1150.0,
        _seed,
        SEED,
        (SEED_FILE,),
    ),
    **{  # with the picture tokenizer's 1,150 million
        f"AILab-CVC/seed-llama-{name}": _seed_llama(name, parameters)
        for name, parameters in {
            "8b-sft": 7955.5,
            "8b-pretrain": 7955.5,
            "14b-sft": 14249.8,
            "14b-pretrain": 14249.8,
        }.items()
    },
    KL16: Model(
        "tokenizer",
        "KL-16, 256 x 256 <-> 16 x 16 latents of 16 numbers",
        "MIT",
        66.5,
        lambda folder: KLVAE.from_original(folder / "kl16.ckpt"),
        KL16,
        ("kl16.ckpt",),
    ),
    **{
        f"thuanz123/vitvqgan-imagenet-{size}": Model(
            "tokenizer",
            f"ViT-VQGAN {size}, 256 x 256 <-> 32 x 32 ids of 8192",
            "MIT",
            parameters,
            _vitvqgan(size),
            repo=f"thuanz123/vitvqgan-imagenet-{size}",
            files=("*.ckpt",),
        )
        for size, parameters in (("small", 52.0), ("base", 172.2))
    },
}


def ids(kind: str) -> list[str]:
    """Those of `MODELS` that are of a kind, see `Model`."""
    return [name for name, model in MODELS.items() if model.kind == kind]


def exists(model: str | Path) -> bool:
    """Whether there is a model, or something at a path, that `load` may be asked for."""
    return str(model) in MODELS or (visible(str(model)) and os.path.exists(model))


def unknown(model: str | Path) -> ValueError:
    """The refusal of a model that does not exist."""
    near = difflib.get_close_matches(str(model)[:200], MODELS, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ValueError(
        f"unknown model {cut(model)!r}: expected an id that `argen models` lists, the folder of a saved pipeline or a "
        f"checkpoint file{hint}"
    )


def load(model: str | Path, tokenizer: str | Path | None = None, image_size: int | None = None) -> Loaded:
    """The pipeline of a generator, the network of a tokenizer, or a text/picture encoder, on the CPU in float32, whatever precision its
    files have; T5 and SEED-LLaMA are in bfloat16.

    Args:
        model: an id of `MODELS`, a folder written by a pipeline's ``save_pretrained``, or the released file of a
            ControlAR or xAR beside its tokenizer's, or a checkpoint of a LlamaGen, released or of one's own training. Published
            weights are taken from the hub's cache, or fetched into it.
        tokenizer: of a LlamaGen's checkpoint: the file of its image tokenizer; None where a released one lies beside it.
        image_size: of a LlamaGen's checkpoint: side of its images in pixels; None where the file or its name says it.

    Raises:
        ValueError: no such model; weights that cannot be read or do not fit.
        FileNotFoundError, ConnectionError: published weights that are not here and cannot be fetched.
    """
    if not exists(model):
        raise unknown(model)
    if str(model) in MODELS:
        entry = MODELS[str(model)]
        folder = hub_folder(entry.repo, entry.files) if entry.repo else WEIGHTS / str(model).removeprefix("argen/")
        read = entry.read
    elif (Path(model) / "model_index.json").is_file():
        folder, read = Path(model), _pipeline
    elif Path(model).is_file() and Path(model).stem in RELEASED.keys() - LLAMAGEN.keys():
        folder, read = Path(model).parent, RELEASED[Path(model).stem].read
    else:
        with _alone():
            return _in_float32(_llamagen_files(Path(model), tokenizer, image_size))
    try:
        with _alone():
            return _in_float32(read(folder))
    except UNUSABLE as error:
        if isinstance(error, FileNotFoundError):
            raise
        for file in folder.rglob("*.safetensors"):
            refuse_placeholder(file)
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the weights in {folder} cannot be used ({reason}): install argen or fetch them again"
        ) from error


class ModelCache:
    """Models by their ids, each loaded when it is first asked for, and once, whatever threads ask; the least recently used ones are
    released when all together are too large.

    Args:
        device: where they are put.
        load: id -> the model, on the CPU.
        limit: bytes that they may take together; one alone may be larger. None for half of the memory of the device.
    """

    def __init__(self, device: torch.device | str, load: Callable[[str], Loaded] = load, limit: int | None = None):
        self.device, self.load = torch.device(device), load
        self.limit = memory(self.device) // 2 if limit is None else limit
        self.loaded: dict[str, Loaded] = {}  # the least recently used first
        self.lock, self.locks = threading.Lock(), defaultdict(threading.Lock)

    def __call__(self, model: str) -> Loaded:
        with self.locks[model]:  # others can be loaded while this one is fetched
            with self.lock:
                found = self.loaded.pop(model, None)
            if found is None:
                found = self.load(model).to(self.device)
            with self.lock:
                self.loaded[model] = found
                for old in list(self.loaded)[:-1]:
                    if sum(map(size_of, self.loaded.values())) <= self.limit:
                        break
                    del self.loaded[old]
            return found


def size_of(model: Loaded) -> int:
    """Bytes of the weights of a network or of a pipeline."""
    held = {
        id(tensor): tensor for network in networks_of(model) for tensor in (*network.parameters(), *network.buffers())
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def networks_of(model: Loaded) -> list[torch.nn.Module]:
    """Those of a pipeline, or the one network that a model is."""
    parts = model.components.values() if isinstance(model, DiffusionPipeline) else [model]
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def _in_float32(model: Loaded) -> Loaded:
    """The same in float32, except for the networks of `IN_BFLOAT16`, which stay as they are or, out of float16, are made bfloat16."""
    for network in networks_of(model):
        if not isinstance(network, IN_BFLOAT16):
            network.float()
        elif network.dtype == torch.float16:
            network.to(torch.bfloat16)
    return model


def memory(device: torch.device) -> int:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


@contextmanager
def _alone() -> Iterator[None]:
    """No other model is loaded meanwhile, and no progress bars are shown: the weights load faster than one is drawn."""
    with LOADING, silent():
        yield


def _pipeline(folder: Path, known: dict[str, type[DiffusionPipeline]] = PIPELINES) -> DiffusionPipeline:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"it holds a {str(name)[:60]}, expected one of {', '.join(known)}")
    unchecked = {"safety_checker": None, "requires_safety_checker": False} if name == "StableDiffusionPipeline" else {}
    try:
        return known[name].from_pretrained(folder, **unchecked)
    except ImportError as error:  # a part of a library that is not here, or does not exist
        raise ValueError(f"it names a part that cannot be imported: {error}") from error


def load_diffusion(model: str | Path) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A pipeline for the tools of `argen.diffusion`, on the CPU in float32, without a safety checker.

    Args:
        model: "argen/emoji-sd", a folder in diffusers' layout, or "owner/name" of one on the hub.

    Raises:
        ValueError: no such folder; another kind of pipeline; files that cannot be read.
        ConnectionError: it is not here and cannot be fetched.
    """
    if model == "argen/emoji-sd":
        return load(model)
    folder = Path(model)
    if not (folder / "model_index.json").is_file():
        if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
            raise ValueError(
                f"no pipeline in {str(model)!r}: expected a folder with a model_index.json, or OWNER/NAME on the hub"
            )
        folder = hub_folder(str(model), DIFFUSION_FILES)
    try:
        with _alone():
            return _in_float32(_pipeline(folder, DIFFUSION))
    except UNUSABLE as error:
        raise ValueError(f"the pipeline in {folder} cannot be used ({' '.join(str(error).split())[:300]})") from error


def drawing(model: str, steps: int | None = None, guidance_scale: float | None = None) -> dict:
    """What the call of a pipeline is given: what is asked for, else of argen/emoji-sd what it was made for, of others what is usual."""
    own = DRAWN if model == "argen/emoji-sd" else {"num_inference_steps": 50, "guidance_scale": 7.5}
    return own | _given(steps, guidance_scale)


def binding(model: str) -> str:
    """The settings of `SemanticBinding` where none are asked for: the authors', which throw argen/emoji-sd off."""
    return "gentle" if model == "argen/emoji-sd" else "attribute"


def counting(model: str, count: int, steps: int | None = None, guidance_scale: float | None = None) -> dict:
    """How a pipeline is asked for so many things: what `CountToken` takes beside counters, see `drawing`. Of argen/emoji-sd the
    word of the number is optimised, since its few words have no other that means nothing."""
    given = _given(steps, guidance_scale)
    if model != "argen/emoji-sd":
        return {"settings": ONE_STEP | given}
    word = NUMBERS[min(count, len(NUMBERS) - 1)]
    return {"placeholder": word, "template": "{placeholder} {things}", "settings": COUNTED | given}


def counting_rate(model: str, rate: float | None = None) -> float:
    """Learning rate of a count token: what is asked for, else the authors'; of argen/emoji-sd, whose words lie nearer to each other,
    less."""
    own = 0.003 if model == "argen/emoji-sd" else 0.01
    return own if rate is None else rate


def concepts_of(model: str, texts: Sequence[str]) -> list[str]:
    """The concepts that texts name, each once; several may stand in one text with commas between. For argen/emoji-sd they are named as
    its captions name them ("The Pizzas!" is "pizza")."""
    names = split_names(texts)
    if model == "argen/emoji-sd":
        styles = {style.prompt for style in STYLES.values()}  # which a caption names, too, and which are no concepts
        judged = json.loads((WEIGHTS / "emoji-judge/config.json").read_text(encoding="utf-8"))["names"]
        names = [found for name in names for found in caption_names(name, [*COMMON, *judged]) if found not in styles]
    return list(dict.fromkeys(names))


def erasing(
    model: str,
    concepts: Sequence[str],
    preset: str | None = None,
    retained: Sequence[str] = (),
    targets: Sequence[str] | None = None,
) -> dict[str, str | list[str] | None]:
    """How concepts are erased from a pipeline: what `ConceptErasure.erase` takes. From argen/emoji-sd, which knows few things, hard,
    as names and as its captions have them, and with all others retained that it knows; from others as published.

    Raises:
        ValueError: targets that do not fit.
    """
    if model != "argen/emoji-sd":
        asked = {"concepts": list(concepts), "targets": targets}
        return asked | {"preset": preset or "object", "retained": list(retained)}
    if targets and len(targets) != len(concepts):
        raise ValueError(f"{len(targets)} targets for {len(concepts)} concepts: give one for each, or none")
    names = concepts_of(model, concepts)
    asked = {"concepts": [words for name in names for words in (name, with_article(name))]}
    asked["targets"] = [target for target in targets for _ in range(2)] if targets else None
    styles = ["", *(f", {style.prompt}" for style in STYLES.values())]
    others = [name for name in COMMON if not any(mentions(text, name) for text in names)]
    kept = [f"{words}{style}" for name in others for words in (name, with_article(name)) for style in styles]
    return asked | {"preset": preset or "object-hard", "retained": [*kept, *retained]}


def _given(steps: int | None, guidance_scale: float | None) -> dict:
    given = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    return {name: value for name, value in given.items() if value is not None}


def counters(
    model: str, device: torch.device | str, clip_count: Path | None = None, detector: str | None = None
) -> dict:
    """What `CountToken` judges pictures by.

    Args:
        model: argen/emoji-sd has counters that ship.
        clip_count: released file of CLIP-Count, for all others.
        detector: folder or "owner/name" of an object detector, which the density is scaled by.

    Raises:
        ValueError, FileNotFoundError: CLIP-Count is not given.
        ConnectionError: a part is not here and cannot be fetched.
    """
    if model == "argen/emoji-sd":
        if clip_count or detector:
            raise ValueError("argen/emoji-sd has a counter of its own: leave --clip-count and --detector out")
        with _alone():
            density = EmojiDensity(_network(Counter, WEIGHTS / "emoji-counter").to(device))
            relevance = EmojiRelevance(_encoder(WEIGHTS / "emoji-clip").to(device))
        return {"density": density, "detector": components, "relevance": relevance}
    if clip_count is None:
        raise ValueError(
            f"{model} needs a counter: give --clip-count the file clipcount_pretrained.ckpt, linked in the README of "
            "songrise/CLIP-Count"
        )
    with _alone():
        found = {"density": CLIPCountDensity.from_original(clip_count), "relevance": CLIPRelevance.from_hub()}
        if detector:
            found["detector"] = Detected.from_hub(detector)
    for part in found.values():
        part.model.to(device)
    return found
