"""Training in shards (FSDP2): each process holds a part of the weights, their averages and what the optimizer keeps of them.

What is scored, sampled and saved is a whole copy of the network in the first process, which gets the averaged weights first.
"""

import os
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

BESIDE = "see configs/fsdp2.yaml, or leave FSDP out: configs/ddp.yaml"


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")


def check_launch() -> None:
    """Check what `accelerate launch` has set, before anything is loaded.

    Raises:
        ValueError: FSDP of the first version, or one for which only the first process would load models.
    """
    if not _asked("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(f"fsdp_version is {os.environ.get('FSDP_VERSION', '1')}: expected 2, {BESIDE}")
    if (policy := os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")) != "NO_WRAP":
        raise ValueError(f"fsdp_auto_wrap_policy is {policy}: expected NO_WRAP, {BESIDE}")
    if _asked("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            f"fsdp_cpu_ram_efficient_loading is true, and text encoders would be empty: expected false, {BESIDE}"
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether networks are trained in shards."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_shards(accelerator: Accelerator, networks: dict[str, nn.Module], able: bool, muon: bool) -> None:
    """Check that what is asked can be trained in shards, where that is asked.

    Args:
        able: see `argen.train.loop.Task.shards`.

    Raises:
        ValueError: it cannot; says why.
    """
    if not is_sharded(accelerator):
        if _asked("ACCELERATE_USE_FSDP"):
            raise ValueError(f"FSDP needs GPUs, and this runs on {accelerator.device}: {BESIDE}")
        return
    if not able:
        names = " and ".join(type(network).__name__ for network in networks.values())
        raise ValueError(f"this recipe, with {names}, cannot be trained in shards: {BESIDE}")
    if muon:
        raise ValueError(f"Muon needs whole matrices, and FSDP has shards: {BESIDE}")


class Averages(EMAModel):
    """Averaged weights, in shards where the weights are; their state is that of whole ones, as one process has it."""

    def state_dict(self) -> dict[str, Any]:
        """As that of diffusers; in shards all processes take part, and only the first has the averages."""
        return super().state_dict() | {"shadow_params": [whole(value) for value in self.shadow_params]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As that of diffusers; the averages stay where they are, and in the shards that they are in."""
        before = self.shadow_params
        super().load_state_dict(state_dict)
        pairs = zip(self.shadow_params, before, strict=True)
        self.shadow_params = [_as(value, other) for value, other in pairs]


def trained(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that change: those of a LoRA, say, without the network's."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def whole(value: Tensor) -> Tensor:
    """A tensor, gathered from its shards in the first process and empty in the others; one that is no shard as it is."""
    if not isinstance(value, DTensor):
        return value
    gathered = value.full_tensor()
    return gathered.cpu() if torch.distributed.get_rank() == 0 else torch.empty(0)


def _as(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor on the device of another, and in its shards."""
    value = value.to(other.device, other.dtype)
    return distribute_tensor(value, other.device_mesh, other.placements) if isinstance(other, DTensor) else value


class WholeCopy:
    """A copy of a network, for the first process, before it becomes shards.

    Args:
        kept: whether this process has one.
    """

    def __init__(self, network: nn.Module, kept: bool):
        self.network = deepcopy(network).cpu() if kept else None

    @torch.no_grad()
    def fill(self, averages: EMAModel, device: torch.device) -> nn.Module | None:
        """Give it averaged weights -> the network on a device, None in other processes; all of them take part."""
        own = None if self.network is None else trained(self.network)
        for index, value in enumerate(averages.shadow_params):
            gathered = whole(value)
            if own is not None:
                own[index].data.copy_(gathered)
        return None if self.network is None else self.network.to(device).eval()

    def release(self) -> None:
        """Take it off the device."""
        if self.network is not None:
            self.network.cpu()
