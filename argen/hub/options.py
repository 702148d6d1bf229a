"""How a model is loaded: the settings that `argen.load`, the commands and the server share."""

from collections.abc import Mapping
from typing import Any, Literal

from argen.registry import nearest
from samplers.errors import InvalidValue
from samplers.settings import Field, settings

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Quantize = Literal["int8", "int4"]
Offload = Literal["model"]
Attention = Literal["native", "sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "xformers", "flash"]


@settings
class LoadOptions:
    """See `argen.hub.loading.load`."""

    dtype: Dtype = Field(default="auto", description="precision of the networks")
    attention: Attention | None = Field(default=None, description="attention backend")
    quantize: Quantize | None = Field(
        default=None,
        description="weights of the network that writes the tokens; int4 is for large ones, small ones draw visibly worse with it",
    )
    compile: bool = Field(
        default=False, description="decode through a compiled graph: faster after some seconds of compiling"
    )
    offload: Offload | None = Field(
        default=None,
        description="keep networks out of memory that do nothing: on a GPU all but one, on a CPU the text encoder T5",
    )
    lora: str | None = Field(
        default=None, description="folders of LoRA, as runs/style/final:0.8,runs/cats/final, with weights where not 1"
    )


INSTEAD = {  # of arguments of diffusers' and transformers' from_pretrained
    "torch_dtype": "give dtype, e.g. dtype='bf16'",
    "precision": "give dtype, e.g. dtype='bf16'",
    "device_map": "give device, e.g. device='cuda'",
    "attn_implementation": "give attention, e.g. attention='xformers'",
    "variant": "published files are read as their card names them, leave it out",
    "use_safetensors": "published files are read as their card names them, leave it out",
    "revision": "a card names the revision, leave it out",
    "subfolder": "give the folder itself as the model",
    "cache_dir": "set the environment variable HF_HUB_CACHE",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1",
    "token": "set the environment variable HF_TOKEN",
    "trust_remote_code": "nothing that is fetched is run, leave it out",
    "safety_checker": "there is none, leave it out",
    "low_cpu_mem_usage": "weights are read without a copy, leave it out",
}


def check_arguments(others: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: an argument that `argen.hub.loading.load` does not have; names what stands for it.
    """
    for name in others:
        known = "tokenizer, image_size, device, dtype, attention, quantize, compile, offload, lora"
        instead = INSTEAD.get(name, f"it has {known}{nearest(name, known.split(', '))}")
        raise InvalidValue(f"{name} is not an argument of argen.load: {instead}", name)
