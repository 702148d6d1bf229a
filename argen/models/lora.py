"""LoRA (arXiv 2106.09685): small changes of a network's linear layers, W + s B A, in the folders that peft writes.

They are added to the weights when a model is loaded, before it is quantized or compiled, so that drawing costs nothing more.

Letters in shape comments: O outputs, I inputs, r rank.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from argen.words import cut
from samplers.errors import InvalidValue

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of names in peft's files
MOST = 8.0  # of a weight, in either direction
SAMPLED = 16  # numbers of a tensor that the digest looks at


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes.

    Attributes:
        folder: it was read from.
        scale: s.
        factors: A [r, I] and B [O, r] of each layer, by its name.
        whole: parameters that it replaces.
        base: name of the model that it was trained on; "" where the files do not say.
        digest: of that model's network, see `digest_of`; "" where the files do not say.
    """

    folder: Path
    scale: float
    factors: dict[str, tuple[Tensor, Tensor]]
    whole: dict[str, Tensor] = field(default_factory=dict)
    base: str = ""
    digest: str = ""


def digest_of(network: nn.Module) -> str:
    """A digest of a network's weights that is the same in float32 and in bfloat16: of names, shapes and some values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, min(SAMPLED, flat.numel()), device=flat.device).long()
        some = flat[places.clamp(max=flat.numel() - 1)].cpu().bfloat16().double()
        digest.update(f"{name} {list(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def parse(text: str) -> tuple[Path, float]:
    """ "runs/style/final:0.8" -> its folder and its weight; 1 where there is none.

    Raises:
        InvalidValue: no number follows the last colon, or one that is too large.
    """
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        return Path(text), 1.0  # a path with a colon, which is not there: said when it is read
    if not -MOST <= value <= MOST:
        raise InvalidValue(f"lora has the weight {weight}: expected -{MOST:g} to {MOST:g}", "lora")
    return Path(folder), value


def read_adapters(text: str | None) -> list[tuple[Adapter, float]]:
    """ "runs/style/final:0.8,runs/cats/final" -> the adapters and their weights.

    Raises:
        InvalidValue: see `parse` and `read_adapter`.
    """
    pairs = [parse(part.strip()) for part in (text or "").split(",") if part.strip()]
    return [(read_adapter(folder), weight) for folder, weight in pairs]


def read_adapter(folder: Path) -> Adapter:
    """Read a folder of peft.

    Raises:
        InvalidValue: there is none, or it holds something else than LoRA for linear layers.
    """
    if not (folder / CONFIG).is_file() or not (folder / FILE).is_file():
        raise InvalidValue(
            f"lora is {cut(str(folder))}: expected a folder with {CONFIG} and {FILE}, as `argen train ... --lora 16` writes it",
            "lora",
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        tensors = load_file(folder / FILE)
        with safe_open(folder / FILE, "pt") as stored:
            metadata = stored.metadata() or {}
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise InvalidValue(
            f"the LoRA in {folder} cannot be read ({cut(str(error))}): train or fetch it again", "lora"
        ) from error
    kind = config.get("peft_type")
    unread = [name for name in ("use_dora", "alpha_pattern", "rank_pattern", "lora_bias") if config.get(name)]
    if kind != "LORA" or unread:
        what = f"with {unread[0]}" if unread else f"of the kind {cut(str(kind))}"
        raise InvalidValue(f"{folder} holds an adapter {what}: expected a plain LoRA", "lora")
    factors, whole = _sorted(tensors, folder)
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    base = metadata.get("base") or config.get("base_model_name_or_path") or ""
    return Adapter(folder, scale, factors, whole, base, metadata.get("digest", ""))


def _sorted(tensors: dict[str, Tensor], folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Tensors of a file -> the factors of each layer, and the parameters that are replaced.

    Raises:
        InvalidValue: a layer has one factor alone, or they do not fit each other.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        for half in ("lora_A", "lora_B"):
            if name.endswith(f".{half}.weight"):
                halves.setdefault(name.removesuffix(f".{half}.weight"), {})[half] = value
                break
        else:
            whole[name.replace(".modules_to_save", "")] = value
    for name, pair in halves.items():
        fits = len(pair) == 2 and all(each.ndim == 2 for each in pair.values())
        if not fits or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise InvalidValue(
                f"the LoRA in {folder} has factors of {name} that do not fit each other: train it again", "lora"
            )
    return {name: (pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}, whole


def check_fits(network: nn.Module, adapter: Adapter) -> None:
    """Raises:
    InvalidValue: it is of another network; says what differs.
    """
    state = network.state_dict()
    trained_on = f", which was trained on {adapter.base}" if adapter.base else ""
    for name, (a, b) in adapter.factors.items():
        weight = state.get(f"{name}.weight")
        if weight is None or weight.shape != (b.shape[0], a.shape[1]):
            found = "has no such layer" if weight is None else f"has there {list(weight.shape)}"
            raise InvalidValue(
                f"the LoRA {adapter.folder}{trained_on}, changes {name} of [{b.shape[0]}, {a.shape[1]}], "
                f"but this {type(network).__name__} {found}: choose the model that it was trained on",
                "lora",
            )
    for name, value in adapter.whole.items():
        if name not in state or state[name].shape != value.shape:
            raise InvalidValue(
                f"the LoRA {adapter.folder}{trained_on}, replaces {name} of {list(value.shape)}, which this "
                f"{type(network).__name__} has not: choose the model that it was trained on",
                "lora",
            )
    if adapter.digest and adapter.digest != digest_of(network):
        raise InvalidValue(
            f"the LoRA {adapter.folder}{trained_on}, fits this network, but was trained on other weights: choose the model that it was trained on",
            "lora",
        )


@torch.no_grad()
def add_adapters(network: nn.Module, adapters: Sequence[tuple[Adapter, float]], checked: bool = False) -> None:
    """Add adapters, each with its weight, to a network's weights; parameters get new tensors, the old ones stay as they are.

    Args:
        checked: they are known to fit.

    Raises:
        InvalidValue: one is of another network.
    """
    for adapter, _ in adapters if not checked else ():
        check_fits(network, adapter)
    parameters = dict(network.named_parameters())
    for adapter, weight in adapters:
        for name, (a, b) in adapter.factors.items():
            own = parameters[f"{name}.weight"]
            change = weight * adapter.scale * (b.float() @ a.float())
            own.data = (own.float() + change.to(own.device)).to(own.dtype)
        for name, value in adapter.whole.items():
            own = parameters[name]
            own.data = torch.lerp(own.float(), value.float().to(own.device), weight).to(own.dtype)


def write_adapter(folder: Path, config: dict, tensors: dict[str, Tensor], base: str, digest: str) -> None:
    """Write a folder that peft reads, too.

    Args:
        config: of peft.
        tensors: under the names that layers of the network have, as ``layers.0.attention.wqkv.lora_A.weight``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(
        json.dumps(config | {"base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8"
    )
    state = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(state, folder / FILE, {"format": "pt", "base": base, "digest": digest})
