"""How a model is loaded: the settings that `argen.load`, the commands and the server share."""

from typing import Literal

from samplers.settings import Field, settings

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Quantize = Literal["int8", "int4"]
Attention = Literal["native", "sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "xformers", "flash"]


@settings
class LoadOptions:
    """See `argen.hub.loading.load`."""

    dtype: Dtype = Field(default="auto", description="precision of the networks")
    attention: Attention | None = Field(default=None, description="attention backend")
    quantize: Quantize | None = Field(default=None, description="weights of the network that writes the tokens")
    compile: bool = Field(
        default=False, description="decode through a compiled graph: faster after some seconds of compiling"
    )
