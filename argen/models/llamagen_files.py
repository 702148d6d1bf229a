"""LlamaGen checkpoints of one's own training: sizes and classes are read from the tensors and from the settings beside them."""

import re
from pathlib import Path

from torch import Tensor

from argen.models.llamagen import SIZES, LlamaGen, converted
from tokenizers_img.checkpoint import load_strict, read_settings, read_state_dict
from tokenizers_img.mapped import unfilled

CONDITIONED = "cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"  # on classes, on captions


def read_generator(path: Path, stride: int, image_size: int | None = None) -> LlamaGen:
    """Read a generator of any size.

    Args:
        path: of the checkpoint, as the official scripts write it.
        stride: pixels of a token's side.
        image_size: side of the images in pixels; None where the file says it.

    Raises:
        ValueError: it is no LlamaGen, or does not say what is needed.
    """
    state = read_state_dict(path, averaged=False)
    freqs_cis, state, settings = rope_of(state), converted(state), read_settings(path)
    sizes = sizes_of(state, path, freqs_cis)
    length = None if freqs_cis is None else len(freqs_cis) - sizes.get("caption_length", 1)
    grid = _grid(path, stride, image_size or settings.get("image_size"), length)
    return load_strict(unfilled(LlamaGen, grid=grid, **sizes), state, source=path)


def rope_of(state: dict[str, Tensor]) -> Tensor | None:
    """[T + N, D / 2H, 2], in files of some scripts."""
    freqs_cis = state.get("freqs_cis")
    return freqs_cis if freqs_cis is not None and freqs_cis.ndim == 3 else None


def check_checkpoint(path: Path) -> None:
    """Check that a checkpoint is that of a LlamaGen or of its tokenizer, by the names and shapes of its tensors.

    Raises:
        ValueError: it is neither.
    """
    state = read_state_dict(path, averaged=False)
    if "encoder.conv_in.weight" not in state:
        sizes_of(converted({name: tensor.to("meta") for name, tensor in state.items()}), path, rope_of(state))


def sizes_of(state: dict[str, Tensor], path: Path, freqs_cis: Tensor | None = None) -> dict:
    """Arguments of `LlamaGen`, but for the grid, from tensors under its own names.

    Raises:
        ValueError: they are another network's, or leave the number of heads open.
    """
    layers = [int(match[1]) for key in state if (match := re.match(r"layers\.(\d+)\.", key))]
    kind = next((key for key in CONDITIONED if key in state), None)
    required = "tok_embeddings.weight", "layers.0.feed_forward.w1.weight"
    if kind is None or not layers or any(key not in state for key in required):
        raise ValueError(f"{path} holds no LlamaGen: expected tok_embeddings, cls_embedding, layers and output")
    (codes, dim), depth = state[required[0]].shape, max(layers) + 1
    hidden, usual = state[required[1]].shape[0], 256 * -(-int(8 * dim / 3) // 256)
    known_heads = [size["heads"] for size in SIZES.values() if (size["dim"], size["depth"]) == (dim, depth)]
    if freqs_cis is not None:
        heads = dim // (2 * freqs_cis.shape[1])
    elif known_heads or dim % 64 == 0:
        heads = known_heads[0] if known_heads else dim // 64
    else:
        raise ValueError(f"{path} does not say how many heads it has: expected a width that 64 divides, found {dim}")
    sizes = {"n_embed": codes, "dim": dim, "depth": depth, "heads": heads, "classes": None}
    sizes["multiple_of"] = 256 if hidden == usual else hidden
    if kind == CONDITIONED[0]:
        return sizes | {"classes": state[kind].shape[0] - 1}  # the last stands for none
    length, caption_dim = state["cls_embedding.uncond_embedding"].shape
    return sizes | {"caption_length": length, "caption_dim": caption_dim}


def _grid(path: Path, stride: int, image_size: int | None, length: int | None) -> int:
    """Tokens of a side."""
    if image_size is None:
        released = re.fullmatch(r"[ct]2i_.*_(\d{3})", path.stem)
        image_size = int(released[1]) if released else None
    if image_size is None and length and int(length**0.5) ** 2 == length:
        return int(length**0.5)
    if image_size is None:
        raise ValueError(f"{path} does not say the size of its images: give --size, e.g. --size 256x256")
    if image_size < stride or image_size % stride:
        raise ValueError(f"the images of {path} are {image_size} pixels a side: expected a multiple of {stride}")
    return image_size // stride
