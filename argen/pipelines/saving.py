"""Saving, loading and moving a pipeline, as in diffusers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline

from argen.device import check_offload, pick
from argen.files import naming, removed_if_cut
from argen.hub.cards import CARD_FILE, Card, all_cards, read_folder_card, write_card
from argen.hub.loading import choose_attention, compile_decoding, compiles_quantized, settle
from argen.hub.quantized import PART, quantized, read_quantized, write_network
from argen.pipelines.canvas import TokenGrid
from tokenizers_img.mapped import AS_STORED

MOVED = {  # modules of the parts of saved pipelines, as earlier releases named them
    "tokenizers_img.flextok": "tokenizers_img.flextok.network",
    "tokenizers_img.seed": "tokenizers_img.seed.network",
    "argen.models.draft": "argen.models.drafter",
}


class Saving(DiffusionPipeline):
    """Mixin of `TokenPipeline`: its files, its device and its attention backend."""

    card: Card | None = None
    canvas: TokenGrid
    controlled = False  # whether a control image is followed
    _offloaded_from: torch.device | None = None  # the GPU on which networks are only while they work
    _stage = ""

    @property
    def device(self) -> torch.device:
        """Where networks run, be they there now or not."""
        return super().device if self._offloaded_from is None else self._offloaded_from

    def bring(self, stage: str) -> None:
        """Bring the networks of a stage to the GPU, and those of the others away from it, where they are offloaded.

        Args:
            stage: "text", "tokens" or "image": encoding prompts, writing tokens, or what images are encoded, decoded and ranked with.
        """
        if self._offloaded_from is None or stage == self._stage:
            return
        text, _, image = self.model_cpu_offload_seq.partition("transformer")
        names = {"text": text.split("->"), "tokens": ["transformer", "drafter"], "image": image.split("->")}[stage]
        parts = {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}
        for name in sorted(parts, key=lambda name: name in names):  # first away
            parts[name].to(self._offloaded_from if name in names else "cpu")
        self._stage = stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """`bring` a stage's networks meanwhile, and those of the stage before back."""
        before = self._stage
        self.bring(name)
        try:
            yield
        finally:
            if before:
                self.bring(before)

    @classmethod
    def load_config(cls, *arguments, **settings) -> Any:
        """Read the index of a saved folder, as diffusers does; one of an earlier release names modules that have moved."""
        read = super().load_config(*arguments, **settings)
        index = read[0] if isinstance(read, tuple) else read
        for part, value in index.items():
            if isinstance(value, list) and value and isinstance(value[0], str) and value[0] in MOVED:
                index[part] = [MOVED[value[0]], *value[1:]]
        return read

    def save_pretrained(self, save_directory: str | Path, **arguments) -> None:
        """Save as diffusers does, with a card that has this model's defaults; where that fails, a new folder is removed again."""
        folder = Path(save_directory)
        with removed_if_cut(folder), naming(folder):
            super().save_pretrained(save_directory, **arguments)
            if quantized(self):  # whose file says so
                write_network(self.transformer, folder / PART)
            card = self.card or self._new_card()
            card = replace(
                card,
                id="".join(filter(str.isprintable, folder.name)),
                target="argen.hub.loading:load",
                repo=None,
                files=(),
                order=1000,
            )
            write_card(replace(card, arguments={}), folder)

    def _new_card(self) -> Card:
        """The card of a pipeline that came without one."""
        takes = "text" if self.components.get("text_encoder", self) is not None else "class"
        grid = self.canvas.discrete and self.canvas.placed and not self.controlled
        about = f"a saved {type(self).__name__}"
        return Card("", "generator", about, "", takes=(takes, *["control"] * self.controlled), grid=grid)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Self:
        """Read a saved pipeline as diffusers does, a quantized network as it is; `argen.load` reads it, too, and everything else that argen has.

        Raises:
            ValueError: an id of a card, whose files are not those of a saved pipeline; a quantized network that cannot be used.
        """
        name = str(pretrained_model_name_or_path)
        if name in all_cards():
            raise ValueError(f"{name} is no pipeline that diffusers saved: use argen.load({name!r})")
        network = None if PART in arguments else read_quantized(Path(name))
        if network is None:
            return _with_card(super().from_pretrained(pretrained_model_name_or_path, **arguments), Path(name))
        dtype = arguments.get("torch_dtype", arguments.get("dtype"))
        dtype = dtype.get(PART, dtype.get("default")) if isinstance(dtype, dict) else dtype
        pipe = super().from_pretrained(pretrained_model_name_or_path, **arguments, **{PART: network})
        if not AS_STORED.get():  # `argen.load` chooses precisions, and compiles, later
            settle(network, [dtype or torch.float32])
            if network.dtype == torch.float32 and compiles_quantized(pipe, pipe.device):
                compile_decoding(pipe)
        return _with_card(pipe, Path(name))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, a precision, or both, as in diffusers.

        Raises:
            ValueError: there is no such device here.
        """
        for where in (*args, kwargs.get("device"), kwargs.get("torch_device")):
            if isinstance(where, str | torch.device):
                if self._offloaded_from is not None and pick(where) == self._offloaded_from:
                    return self  # networks come there when they work
                self._offloaded_from = None
                pick(where)
        return super().to(*args, **kwargs)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep networks on the CPU while they do nothing, as diffusers does; but its hooks wait for a network's `forward`, which a decoding step does not call.

        Raises:
            ValueError: there is no GPU.
        """
        check_offload("enable_model_cpu_offload", device)
        super().to("cpu")
        where = torch.device("cuda" if device is None and gpu_id is not None else pick(device))
        self._offloaded_from, self._stage = torch.device(where.type, where.index if gpu_id is None else gpu_id), ""

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep layers on the CPU while they do nothing, as in diffusers.

        Raises:
            ValueError: there is no GPU.
        """
        check_offload("enable_sequential_cpu_offload", device)
        super().enable_sequential_cpu_offload(gpu_id, device)

    def enable_xformers_memory_efficient_attention(self, attention_op: None = None) -> None:
        """Let xformers compute the attention of all networks of this pipeline, as ``argen.load(..., attention="xformers")`` does.

        Raises:
            ValueError: it is not installed, there is no CUDA device, or `attention_op` is given, which xformers chooses here.
        """
        if attention_op is not None:
            raise ValueError("attention_op is not taken: leave it out, xformers chooses the operator")
        choose_attention(self, "xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Go back to PyTorch's own attention."""
        choose_attention(self, "native")


def _with_card(pipe: Any, folder: Path) -> Any:
    """A pipeline out of a folder, with the defaults of the card that lies there."""
    if (folder / CARD_FILE).is_file():
        pipe.card = read_folder_card(folder / CARD_FILE)
    return pipe
