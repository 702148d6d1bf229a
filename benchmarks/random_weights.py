"""Files of random weights in the layout, the sizes and the precision of published ones, written tensor by tensor into a hub cache.

Names and shapes are those of the released files in `tests/golden`, or of the networks that read them where no list is public. Matrices are drawn
from a normal distribution, norms are 1 and biases 0, so that numbers stay finite in any network.
"""

import gzip
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from safetensors.torch import _TYPES
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.serialization import skip_data
from transformers import PreTrainedTokenizerFast

from argen.hub.cards import Card, all_cards
from argen.models.t5 import T5

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
REVISION = "0" * 40
SPREAD, BLOCK = 0.02, 1 << 22  # of the numbers; how many are drawn, which then repeat
SHARD = 10_000_000_000  # bytes of a file, of those that are released in parts
T5_SIZES = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32}
SEED, SEED_LLAMA = "AILab-CVC/seed-tokenizer-2", "AILab-CVC/seed-llama-"
UNCLIP = "stabilityai/stable-diffusion-2-1-unclip"
FLEXAR = {  # what fits the numbers of parameters that the hub lists: width, layers, whether feed-forwards are gated
    "113M-T2I": (768, 12, False),
    "382M-T2I": (1152, 18, False),
    "1B-T2I": (1664, 26, False),
    "3B-T2I": (2304, 36, False),
    "1B-C2I": (1920, 26, True),
}
HALF = {"eva_vit_g.pth": torch.float16, "encoder.pt": torch.float16, "decoder.pt": torch.float16}  # released in 16 bits

Shapes = Mapping[str, tuple[list[int], torch.dtype]]


@cache
def numbers(dtype: torch.dtype) -> memoryview:
    """The bytes of `BLOCK` random numbers."""
    drawn = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * SPREAD
    return memoryview(drawn.to(dtype).view(torch.uint8).numpy())


def fill(file: BinaryIO, start: int, name: str, shape: list[int], dtype: torch.dtype) -> None:
    """Write a tensor's numbers at a place of a file."""
    file.seek(start)
    if len(shape) < 2 or not dtype.is_floating_point:
        constant = torch.ones if name.endswith("weight") else torch.zeros
        values = constant(shape) if dtype.is_floating_point else torch.arange(shape[-1] if shape else 1).expand(shape)
        file.write(values.to(dtype).contiguous().flatten().view(torch.uint8).numpy())
        return
    block, left = numbers(dtype), torch.Size(shape).numel() * dtype.itemsize
    while left > 0:
        left -= file.write(block[: min(left, len(block))])


def write_safetensors(path: Path, tensors: Shapes, metadata: dict[str, str] | None = None) -> None:
    """Write a ``.safetensors`` file."""
    names, header, end = {dtype: name for name, dtype in _TYPES.items()}, {}, 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": metadata or {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in tensors.items():
            fill(file, 8 + len(text) + header[name]["data_offsets"][0], name, shape, dtype)


def write_torch(path: Path, tensors: Shapes, wrapper: str | None = None) -> None:
    """Write a file as `torch.save` does; `wrapper` is the key under which the tensors lie."""
    state: dict[str, Any] = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    with skip_data():  # which leaves room for the numbers: none of that memory is ever touched
        torch.save({wrapper: state} if wrapper else state, path)
    placed = torch.load(path, map_location="meta", weights_only=True)
    with path.open("r+b") as file:
        for name, tensor in (placed[wrapper] if wrapper else placed).items():
            fill(file, tensor.untyped_storage()._checkpoint_offset, name, *tensors[name])


def write_shards(folder: Path, stem: str, tensors: Shapes, write: Callable[[Path, Shapes], None], suffix: str) -> None:
    """Write a network in parts, with their index."""
    shards: list[dict] = [{}]
    for name, (shape, dtype) in tensors.items():
        held = sum(torch.Size(other).numel() * kind.itemsize for other, kind in shards[-1].values())
        if held + torch.Size(shape).numel() * dtype.itemsize > SHARD:
            shards.append({})
        shards[-1][name] = shape, dtype
    places = {}
    for index, shard in enumerate(shards, 1):
        path = folder / f"{stem}-{index:05}-of-{len(shards):05}.{suffix}"
        write(path, shard)
        places |= dict.fromkeys(shard, path.name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@dataclass(frozen=True)
class Released:
    """A file whose names and shapes are public.

    Attributes:
        keys: name -> shape.
        wrapper: the key under which the tensors lie, or None.
    """

    keys: dict[str, list[int]]
    wrapper: str | None

    def tensors(self, dtype: torch.dtype = torch.float32) -> Shapes:
        """What is written; positions are integers."""
        return {
            name: (shape, torch.int64 if name.endswith("position_ids") else dtype) for name, shape in self.keys.items()
        }


@cache
def released() -> dict[tuple[str, str], Released]:
    """The files of `tests/golden/*/published_keys.json.gz`, by repository and name."""
    found = {}
    for path in sorted(GOLDEN.glob("*/published_keys.json.gz")):
        for entry in json.loads(gzip.decompress(path.read_bytes())).values():
            match = re.search(r'top-level key "(\w+)"', entry.get("wrapper", ""))
            for repo in str(entry.get("repo")).split(" and "):
                file = Released(entry["keys"], match[1] if match else None)
                found[repo, entry["file"].split()[0]] = file
    return found


def shapes_of(network: nn.Module, dtype: torch.dtype = torch.float32) -> Shapes:
    """Names and shapes of a network that was made on the meta device."""
    return {name: (list(value.shape), dtype) for name, value in network.state_dict().items()}


def hub_snapshot(hub: Path, repo: str) -> Path:
    """The folder of a repository in a hub cache."""
    above = hub / f"models--{repo.replace('/', '--')}"
    (above / "refs").mkdir(parents=True, exist_ok=True)
    (above / "refs" / "main").write_text(REVISION)
    folder = above / "snapshots" / REVISION
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make(id: str, cache_folder: Path) -> None:
    """Write everything that loading `id` reads and that is not there yet: into ``hub`` and ``torch`` of a folder."""
    card = all_cards()[id]
    if card.repo is None:
        raise ValueError(f"{id} ships with argen: choose one of the published ids")
    reader, hub = card.target.partition(":")[0].rpartition(".")[2], cache_folder / "hub"
    if card.repo.startswith(SEED_LLAMA):
        make_llama(hub, card.repo)
    elif reader == "flexar":
        make_flexar(hub, card)
    else:
        for name in card.files:
            make_file(hub, card.repo, name)
    text = card.text_parameters > 0
    if reader == "controlar":
        make_file(hub, "peizesun/llamagen_t2i", "vq_ds16_t2i.pt")
    if reader == "xar":
        make_file(hub, "xwen99/mar-vae-kl16", "kl16.ckpt")
    if reader == "flexar":
        flextok = f"EPFL-VILAB/flextok_d18_d28_{'dfn' if text else 'in1k'}"
        for name in ("model.safetensors", "config.json"):
            make_file(hub, flextok, name)
    if text:
        make_t5(hub)
    if card.repo == SEED or reader == "seed_llama":
        make_seed(hub, cache_folder / "torch")


def make_file(hub: Path, repo: str, name: str) -> None:
    """Write a released file, or the settings or words beside one.

    Raises:
        ValueError: nothing is known of it.
    """
    folder = hub_snapshot(hub, repo)
    if name == "*.ckpt":
        name = next(file for owner, file in released() if owner == repo)
    path = folder / name
    if path.exists():
        return
    if name == "config.json":
        path.write_text(json.dumps(flextok_config(repo) if "vae" not in repo else vae_config(repo)))
    elif name.startswith(("vocab", "merges")):
        path.write_bytes((GOLDEN / "min_dalle_text" / name.replace("_mini", "")).read_bytes())
    elif (repo, name) not in released():
        raise ValueError(f"the layout of {name} of {repo} is not known: choose another id")
    else:
        file = released()[repo, name]
        tensors = file.tensors(HALF.get(name, torch.float32))
        write_safetensors(path, tensors) if path.suffix == ".safetensors" else write_torch(path, tensors, file.wrapper)


def flextok_config(repo: str) -> dict:
    """The settings of a FlexTok, by the depths in its name, e.g. ``flextok_d18_d28_in1k``."""
    config = json.loads((GOLDEN / "flextok" / "mixed_shapes" / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("_fixture")}
    config["regularizer"]["levels"] = [8, 8, 8, 5, 5, 5]
    for side, depth in zip(("encoder", "decoder"), re.findall(r"_d(\d+)", repo), strict=True):
        parts = config[side]["module_dict"]
        for part in parts.values():
            part |= {"dim": 64 * int(depth)} if "dim" in part else {}
        parts[f"{side[:3]}_transformer"] |= {"depth": int(depth), "head_dim": 64}
    parts = config["encoder"]["module_dict"]
    parts["enc_register_module"] |= {"n_min": 256, "n_max": 256}
    parts["enc_posemb_module"]["max_sizes"] = [16, 16]
    config["decoder"]["module_dict"]["dec_latent_dropout"]["replace_with_single_token"] = False
    return config


def vae_config(repo: str) -> dict:
    """The settings of the VAE of a FlexTok, e.g. ``flextok_vae_c16``."""
    from tokenizers_img.flextok.checkpoint import vae_network

    with torch.device("meta"):
        config = vae_network(int(repo.rpartition("_c")[2])).config
    return dict(config) | {"_class_name": "AutoencoderKL"}


def make_flexar(hub: Path, card: Card) -> None:
    """Write a FlexAR, whose names are those of `argen.models.flexar`."""
    from argen.models.flexar import FlexAR, sizes_of

    folder = hub_snapshot(hub, str(card.repo))
    if (folder / "model.safetensors").exists():
        return
    dim, depth, gated = FLEXAR[str(card.repo).partition("FlexAR-")[2]]
    text = card.text_parameters > 0
    config = json.loads((GOLDEN / "flextok" / ("ar_t2i" if text else "ar_c2i") / "config.json").read_text())
    parts = config["model"]["meta_model"]["models"]
    generator = parts["ar_image_model"]
    before, trunk, head = (generator[name] for name in ("preprocessor", "trunk", "head"))
    before |= {"token_grid_size": [256, 1], "codebook_size": 64000, "embed_dim": dim, "num_classes": 1000}
    trunk |= {"embed_dim": dim, "num_blocks": depth}
    trunk["ffn_target"]["_target_"] = f"l3m.model.layers.ffn.{'SwiGLUFFN' if gated else 'MLP'}"
    for attention in ("attn_target", "self_attn_target", "cross_attn_target"):
        if attention in trunk:
            trunk[attention] |= {"dim": dim, "num_heads": dim // 64}
    head |= {"in_features": dim, "out_features": 64000}
    if text:
        parts["text_encoder"]["mlp"] |= {"text_dim": T5_SIZES["d_model"], "embed_dim": dim}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with torch.device("meta"):
        network = FlexAR(**sizes_of(config))
    write_safetensors(folder / "model.safetensors", shapes_of(network))


def make_t5(hub: Path) -> None:
    """Write a Flan-T5 XL, encoder and decoder, and a text tokenizer of a few words."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = hub_snapshot(hub, T5)
    if (folder / "config.json").exists():
        return
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {
        word: 3 + index for index, word in enumerate(("a", "red", "apple", "the", "dog"))
    }
    text_tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    text_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=text_tokenizer, model_max_length=512, **special).save_pretrained(folder)
    config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5_SIZES)
    with torch.device("meta"):
        tensors = shapes_of(T5ForConditionalGeneration(config))
    tensors = {name: value for name, value in tensors.items() if "embed_tokens" not in name}
    write_shards(folder, "model", tensors, write_safetensors, "safetensors")
    config.save_pretrained(folder)


def make_llama(hub: Path, repo: str) -> None:
    """Write the language model of a SEED-LLaMA, in bfloat16."""
    folder = hub_snapshot(hub, repo)
    if (folder / "config.json").exists():
        return
    path = next(path for path in GOLDEN.glob("seed/published_keys.json.gz"))
    entry = json.loads(gzip.decompress(path.read_bytes()))[f"seed_llama_{repo.removeprefix(SEED_LLAMA).split('-')[0]}"]
    tensors = Released(entry["keys"], None).tensors(torch.bfloat16)
    write_shards(folder, "pytorch_model", tensors, write_torch, "bin")
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "bfloat16"}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **special, **entry["config"]}
    (folder / "config.json").write_text(json.dumps(config))


def make_seed(hub: Path, torch_home: Path) -> None:
    """Write the image tokenizer of SEED: its ids, its vision transformer, its decoder, and the words of the language model."""
    make_file(hub, SEED, "seed_quantizer.pt")
    words = GOLDEN / "seed" / "seed_llama_tokenizer" / "tokenizer"
    folder = hub_snapshot(hub, SEED)
    for file in words.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    first = 40194 - 2 - 8192  # ids of codes, which are the last but two
    codes = {f"<img_{index:05}>": first + index for index in range(8192)} | {"<img>": 40192, "</img>": 40193}
    (folder / "added_tokens.json").write_text(json.dumps(codes))
    vision = torch_home / "hub" / "checkpoints" / "eva_vit_g.pth"
    vision.parent.mkdir(parents=True, exist_ok=True)
    if not vision.exists():
        entry = next(file for (_, name), file in released().items() if name == vision.name)
        write_torch(vision, entry.tensors(HALF[vision.name]))
    make_unclip(hub_snapshot(hub, UNCLIP))


def make_unclip(folder: Path) -> None:
    """Write a Stable Diffusion 2.1 unCLIP in diffusers' layout."""
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    if (folder / "model_index.json").exists():
        return
    unet = {"sample_size": 96, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
    unet |= {
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
    }
    vae = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    vision |= {"patch_size": 14, "projection_dim": 1024}
    with torch.device("meta"):
        networks = {
            "unet": diffusers.UNet2DConditionModel(**unet),
            "vae": diffusers.AutoencoderKL(**vae),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text, hidden_act="gelu")),
            "image_encoder": transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision)),
            "image_normalizer": StableUnCLIPImageNormalizer(1024),
        }
    for name, network in networks.items():
        part = folder / name
        part.mkdir(exist_ok=True)
        ours = hasattr(network, "save_config")
        network.save_config(part) if ours else network.config.save_pretrained(part)
        file = "diffusion_pytorch_model.safetensors" if ours else "model.safetensors"
        write_safetensors(part / file, shapes_of(network))
    prediction = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_end": 0.012}
    diffusers.DDIMScheduler(**prediction).save_config(folder / "scheduler")
    diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_config(folder / "image_noising_scheduler")
    transformers.CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    letters = pre_tokenizers.ByteLevel.alphabet()
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    transformers.CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77
    ).save_pretrained(folder / "tokenizer")
    libraries = {name: type(network).__module__.partition(".")[0] for name, network in networks.items()}
    index = {name: [libraries[name], type(network).__name__] for name, network in networks.items()}
    index["image_normalizer"][0] = "stable_diffusion"
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "image_noising_scheduler": ["diffusers", "DDPMScheduler"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    index["_class_name"] = "StableUnCLIPImg2ImgPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
