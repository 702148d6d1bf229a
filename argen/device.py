"""Where networks run, in which precision, and when they are loaded."""

import importlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import psutil
import torch

from argen.words import cut

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CGROUPS = Path("/sys/fs/cgroup")
LARGE = 50_000_000  # parameters from which on reading the weights takes most of a step
# While diffusers or transformers load a network, those that any thread makes have no storage, and after two at once all have none
# (accelerate's init_empty_weights changes torch's classes for the while): whoever loads one holds this.
LOADING = threading.RLock()
ON_DEMAND = ContextVar("ON_DEMAND", default=False)  # whether a T5 that is loaded stays on disk until it is needed


@contextmanager
def silent() -> Iterator[None]:
    """No progress bars of diffusers and transformers meanwhile."""
    libraries = [importlib.import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    enabled = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in enabled:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in enabled:
            library.enable_progress_bar()


def pick(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`, or the best that is here: CUDA, Apple GPU, CPU.

    Raises:
        ValueError: no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # "meta" makes tensors, and holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = cut(str(error).splitlines()[0].split(". ")[0])
        raise ValueError(f"device {cut(name)!r} cannot be used here ({reason}): expected cpu, cuda or mps") from error
    return device


def check_offload(method: str, device: torch.device | str | None = None) -> None:
    """Raises:
    ValueError: there is no GPU whose memory `method` of a pipeline could spare, or not the one that is named.
    """
    if device is not None:
        pick(device)
    if pick().type == "cpu":
        raise ValueError(f"{method} spares the memory of a GPU, and there is none here: leave it out")


def free(device: torch.device | str) -> int:
    """Bytes of a device's memory that can be had now; on a CPU within the limits of the container, without swap."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min([psutil.virtual_memory().available, *_container_limits()])


def _container_limits() -> Iterator[int]:
    """Bytes that each group of processes that this one belongs to may still have; what the system keeps of files counts as free."""
    names = "memory.max", "memory.current", "inactive_file"
    old = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds not in ("", "memory"):
                continue
            root, (limit, usage, files) = (CGROUPS, names) if not kinds else (CGROUPS / "memory", old)
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(root):
                    break
                with suppress(OSError, ValueError):  # unlimited, or of the host
                    kept = re.search(rf"^{files} (\d+)", (folder / "memory.stat").read_text(), re.M)
                    used = int((folder / usage).read_text()) - (int(kept[1]) if kept else 0)
                    yield max(0, int((folder / limit).read_text()) - used)


def has_bf16(device: torch.device | str) -> bool:
    """Whether a device can run bfloat16 layers at all; a CPU without units for them cannot, or emulates them slowly."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return kind == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 or float32, whichever a device multiplies matrices faster in."""
    device = torch.device(device)
    if not has_bf16(device):
        return torch.float32
    return torch.bfloat16 if device.type != "cpu" or _bf16_is_faster() else torch.float32


@cache
def _bf16_is_faster(size: int = 512, tries: int = 7) -> bool:
    """Whether this CPU multiplies matrices faster in bfloat16, measured in turn: some have the instructions and no units."""
    best: dict[torch.dtype, float] = {}
    for _ in range(tries):
        for dtype in (torch.float32, torch.bfloat16):
            matrix = torch.ones(size, size, dtype=dtype)
            started = time.perf_counter()
            matrix @ matrix
            best[dtype] = min(best.get(dtype, float("inf")), time.perf_counter() - started)
    return best[torch.bfloat16] < best[torch.float32]


def auto_dtype(device: torch.device | str, parameters: int) -> torch.dtype:
    """The precision of a network whose `dtype` is "auto": bfloat16 on GPUs that have it, and on a CPU with matrix units for it (AMX) if the
    network is large; else float32. Without such units a decoding step of few tokens is slower in bfloat16, though training is faster."""
    device = torch.device(device)
    if device.type != "cpu":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    units = has_bf16(device) and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if units and parameters >= LARGE else torch.float32


def autocast(device: torch.device | str) -> torch.autocast:
    """Layers in `fast_dtype` meanwhile."""
    device = torch.device(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)
