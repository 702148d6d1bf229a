"""Everything that has a name in argen: samplers, pipelines, training recipes, commands, page tabs, cards of checkpoints.

A component is known by its name and imported on first use, so that listing what there is loads no library. An installed package adds
its own by entry points of the groups ``argen.samplers``, ``argen.pipelines`` ...; a running program by `register`.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

MAX_SHOWN = 60  # characters of an unknown name in an error


class Registry(Mapping[str, Any]):
    """Components of one kind by their names, built-in ones first.

    Args:
        kind: what one of them is called, e.g. "sampler"; its entry points are in the group "argen.samplers".
        built_in: name -> "module:attribute", or "module".
    """

    def __init__(self, kind: str, built_in: Mapping[str, str]):
        self.kind, self.built_in = kind, dict(built_in)
        self.added: dict[str, Any] = {}

    @cached_property
    def installed(self) -> dict[str, EntryPoint]:
        """The entry points of installed packages."""
        return {point.name: point for point in entry_points(group=f"argen.{self.kind}s")}

    def add(self, name: str, component: Any) -> None:
        """Register a component, or "module:attribute" of one, for as long as the program runs.

        Raises:
            ValueError: the name is empty or taken.
        """
        if not isinstance(name, str) or not name or name in self:
            raise ValueError(f"the name {str(name)[:MAX_SHOWN]!r} of a {self.kind} is taken or empty: choose another")
        self.added[name] = component

    def __iter__(self) -> Iterator[str]:
        return iter(self.built_in | self.installed | self.added)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(name in names for names in (self.built_in, self.installed, self.added))

    def __getitem__(self, name: str) -> Any:
        """The component.

        Raises:
            ValueError: there is none of this name; says which are near. An installed package cannot be imported; says which.
        """
        if name in self.added:
            component = self.added[name]
            return resolve(component) if isinstance(component, str) else component
        if name in self.built_in:
            return resolve(self.built_in[name])
        if name in self.installed:
            return self._load(self.installed[name])
        raise ValueError(
            f"unknown {self.kind} {str(name)[:MAX_SHOWN]!r}: expected one of {', '.join(self)}{nearest(name, self)}"
        )

    def _load(self, point: EntryPoint) -> Any:
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            package = point.dist.name if point.dist else point.module
            raise ValueError(
                f"the {self.kind} {point.name} of the package {package} cannot be used ({error}): update or uninstall it"
            ) from error


def nearest(name: str, names: Iterable[str]) -> str:
    """What an error about an unknown name ends with: "; did you mean A or B?", or nothing where no known name is like it."""
    near = difflib.get_close_matches(str(name)[:MAX_SHOWN], list(names), n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def resolve(target: str) -> Any:
    """The object called "module:attribute", where the attribute may have dots, or a module."""
    module, _, path = target.partition(":")
    value = import_module(module)
    for part in filter(None, path.split(".")):
        value = getattr(value, part)
    return value


def register(kind: str, name: str, component: Any) -> None:
    """Add a component while the program runs, e.g. ``argen.register("sampler", "mine", MySampler)``; it appears wherever built-in ones
    do.

    Raises:
        ValueError: no such kind; a name that is taken.
    """
    if kind not in REGISTRIES:
        raise ValueError(f"unknown kind {str(kind)[:MAX_SHOWN]!r}: expected one of {', '.join(REGISTRIES)}")
    REGISTRIES[kind].add(name, component)


samplers = Registry(
    "sampler",
    {
        "auto": "samplers.auto:Auto",
        "sequential": "samplers.steps:Sequential",
        "jacobi": "samplers.jacobi:Jacobi",
        "sjd": "samplers.sjd:SpeculativeJacobi",
        "gsd": "samplers.sjd:GroupedJacobi",
        "recycling": "samplers.recycling:TokenRecycling",
        "speculative": "samplers.speculative:Speculative",
        "lantern": "samplers.lantern:Lantern",
        "zipar": "samplers.zipar:ZipAR",
        "sde": "samplers.next_x:EulerMaruyama",
        "euler": "samplers.next_x:Euler",
        "heun": "samplers.next_x:Heun",
    },
)
pipelines = Registry(
    "pipeline",
    {
        "PartiPipeline": "argen.pipelines.parti:PartiPipeline",
        "DalleMiniPipeline": "argen.pipelines.dalle_mini:DalleMiniPipeline",
        "LlamaGenPipeline": "argen.pipelines.llamagen:LlamaGenPipeline",
        "ControlARPipeline": "argen.pipelines.controlar:ControlARPipeline",
        "XARPipeline": "argen.pipelines.xar:XARPipeline",
        "FlexARPipeline": "argen.pipelines.flexar:FlexARPipeline",
        "SeedLlamaPipeline": "argen.pipelines.seed_llama:SeedLlamaPipeline",
    },
)
commands = Registry(
    "command",
    {
        name: f"argen.cli.{name}"
        for name in (
            "generate",
            "reconstruct",
            "tokenize",
            "detokenize",
            "batch",
            "grid",
            "describe",
            "control",
            "bind",
            "erase",
            "count",
            "models",
            "samplers",
            "data",
            "train",
            "eval",
            "ui",
        )
    },
)
measures = Registry(
    "measure",
    {
        name: f"argen.cli.measures.{name.replace('-', '_')}"
        for name in (
            "fid",
            "rfid",
            "clip",
            "emoji",
            "control",
            "bind",
            "erase",
            "count",
            "nudity",
            "held-out",
            "stats",
        )
    },
)
tabs = Registry(
    "tab",
    {
        name: f"argen.ui.tabs.{name}"
        for name in (
            "generate",
            "edit",
            "control",
            "plot",
            "gallery",
            "diffusion",
            "tokenizers",
            "evaluate",
            "models",
        )
    },
)
recipes = Registry(
    "recipe",
    {
        "emoji-clip": "argen.train.clip:RECIPE",
        "emoji-vitvqgan": "argen.train.vit_vqgan:RECIPE",
        "emoji-vitvqgan-decoder": "argen.train.vit_vqgan:DECODER_RECIPE",
        "emoji-vae": "argen.train.kl_vae:RECIPE",
        "emoji-vae-decoder": "argen.train.kl_vae:DECODER_RECIPE",
        "emoji-parti": "argen.train.parti:RECIPE",
        "emoji-parti-second": "argen.train.parti:SECOND_RECIPE",
        "emoji-llamagen": "argen.train.llamagen:RECIPE",
        "emoji-llamagen-second": "argen.train.llamagen:SECOND_RECIPE",
        "emoji-control": "argen.train.controlar:RECIPE",
        "emoji-drafter": "argen.train.drafter:RECIPE",
        "emoji-xar": "argen.train.xar:RECIPE",
        "emoji-flextok": "argen.train.flextok:RECIPE",
        "emoji-flextok-ar": "argen.train.flexar:RECIPE",
        "emoji-sd": "argen.train.sd:RECIPE",
        "emoji-sd-second": "argen.train.sd:SECOND_RECIPE",
        "emoji-sd-third": "argen.train.sd:THIRD_RECIPE",
        "emoji-counter": "argen.train.counter:RECIPE",
        "emoji-seed-encoder": "argen.train.seed_encoder:RECIPE",
        "emoji-seed-contrastive": "argen.train.seed:CONTRASTIVE_RECIPE",
        "emoji-seed": "argen.train.seed:RECIPE",
        "emoji-seed-decoder": "argen.train.unclip:RECIPE",
        "emoji-seed-lm": "argen.train.seed_lm:RECIPE",
        "emoji-seed-lm-second": "argen.train.seed_lm:SECOND_RECIPE",
        "emoji-judge": "argen.train.judge:RECIPE",
    },
)
cards = Registry("card", {})  # of installed packages and of running programs; those of argen lie in argen/cards
REGISTRIES = {registry.kind: registry for registry in (samplers, pipelines, commands, measures, tabs, recipes, cards)}


def draws_of(sampler: str) -> str:
    """What a sampler decides: "tokens" or "latents"."""
    return getattr(samplers[sampler], "draws", "tokens")


def about_of(sampler: str) -> str:
    """What a sampler does: the first paragraph of its docstring."""
    return " ".join((samplers[sampler].__doc__ or "").strip().split("\n\n")[0].split())


def samplers_of(draws: str) -> list[str]:
    """Names of the samplers that decide "tokens", or of those that decide "latents"."""
    return [name for name in samplers if draws_of(name) == draws]
