"""Everything that has a name in argen: samplers, pipelines, training recipes, commands, page tabs, cards of checkpoints.

A component is known by its name and imported on first use, so that listing what there is loads no library. An installed package adds
its own by entry points of the groups ``argen.samplers``, ``argen.pipelines`` ...; a running program by `register`. Lists leave out what
a package brings and nobody can use, with a warning.
"""

import argparse
import difflib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)
MAX_SHOWN = 60  # characters of an unknown name in an error
NAMES = r"[\w-]+"  # of components, as they are typed before settings and axes
CARD_NAMES = r"[\w.+-]+(/[\w.+-]+)*"  # ids: "owner/name"


class Installed:
    """A component that an installed package brings.

    Args:
        check: raises where something that was imported is no component of this kind.
    """

    def __init__(self, kind: str, point: EntryPoint, check: Callable[[Any], None]):
        self.kind, self.point, self.check = kind, point, check

    @property
    def package(self) -> str:
        return package_of(self.point)

    @cached_property
    def imported(self) -> tuple[Any, Exception | None]:
        """The component, or what is wrong with it; a module may raise anything."""
        try:
            component = self.point.load()
            self.check(component)
        except (Exception, SystemExit) as error:
            return None, ValueError(
                f"the {self.kind} {self.point.name} of the package {self.package} cannot be used ({reason(error)}): "
                "update or uninstall it"
            )
        return component, None

    @cached_property
    def usable(self) -> bool:
        """Whether it can be imported; warns if not, once."""
        error = self.imported[1]
        if error:
            logger.warning("%s", error)
        return error is None

    def get(self) -> Any:
        """The component.

        Raises:
            ValueError: it cannot be used; says which package brings it.
        """
        component, error = self.imported
        if error:
            raise error
        return component


class Registry(Mapping[str, Any]):
    """Components of one kind by their names, built-in ones first; those of installed packages are listed if they can be imported.

    Args:
        kind: what one of them is called, e.g. "sampler"; its entry points are in the group "argen.samplers".
        built_in: name -> "module:attribute", or "module".
        check: raises where something is no component of this kind.
        names: pattern of what it may be called.
    """

    def __init__(
        self,
        kind: str,
        built_in: Mapping[str, str],
        check: Callable[[Any], None] = lambda component: None,
        names: str = NAMES,
    ):
        self.kind, self.built_in, self.check, self.names = kind, dict(built_in), check, names
        self.added: dict[str, Any] = {}

    @cached_property
    def installed(self) -> dict[str, Installed]:
        """What installed packages bring; a name that argen has, or another package, and one that cannot be typed are left out."""
        points: dict[str, EntryPoint] = {}
        for point in sorted(
            entry_points(group=f"argen.{self.kind}s"), key=lambda point: (point.name, package_of(point))
        ):
            if point.name in self.built_in:
                fault = "argen has one of this name"
            elif not re.fullmatch(self.names, point.name):
                fault = "a name is made of letters, digits, - and _"
            elif (other := points.get(point.name)) is not None and other.value != point.value:
                fault = f"the package {package_of(other)} has one of this name"
            else:
                points[point.name] = point
                continue
            printable_name = ascii(point.name)[:MAX_SHOWN]
            logger.warning(
                "the %s %s of the package %s is left out: %s", self.kind, printable_name, package_of(point), fault
            )
        return {name: Installed(self.kind, point, self.check) for name, point in points.items()}

    def add(self, name: str, component: Any) -> None:
        """Register a component, or "module:attribute" of one, for as long as the program runs.

        Raises:
            ValueError: a name that is taken or cannot be typed; what cannot be imported, or is no such component.
        """
        if not isinstance(name, str) or not name or name in self:
            raise ValueError(f"the name {str(name)[:MAX_SHOWN]!r} of a {self.kind} is taken or empty: choose another")
        if not re.fullmatch(self.names, name):
            raise ValueError(
                f"the name {name[:MAX_SHOWN]!r} of a {self.kind} cannot be typed: use letters, digits, - and _"
            )
        try:
            component = resolve(component) if isinstance(component, str) else component
            self.check(component)
        except Exception as error:
            raise ValueError(f"the {self.kind} {name} cannot be used ({reason(error)})") from error
        self.added[name] = component

    def __iter__(self) -> Iterator[str]:
        yield from self.built_in
        yield from (name for name, component in self.installed.items() if component.usable)
        yield from (name for name in self.added if name not in self.installed)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self.built_in or name in self.added or name in self.installed)

    def __getitem__(self, name: str) -> Any:
        """The component.

        Raises:
            ValueError: there is none of this name; says which are near. An installed package cannot be imported; says which.
        """
        if name in self.added:
            return self.added[name]
        if name in self.built_in:
            return resolve(self.built_in[name])
        if name in self.installed:
            return self.installed[name].get()
        raise ValueError(
            f"unknown {self.kind} {str(name)[:MAX_SHOWN]!r}: expected one of {', '.join(self)}{nearest(name, self)}"
        )


def package_of(point: EntryPoint) -> str:
    """The package that brings an entry point."""
    return str(point.dist.name) if point.dist else point.value


def reason(error: BaseException) -> str:
    """What went wrong, in one line with the kind of error, where somebody else's code raised it."""
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, ValueError | ImportError | AttributeError) else f"{type(error).__name__}: {text}"


def check_sampler(component: Any) -> None:
    """Raises:
    ValueError: no class of a sampler, or one whose defaults are none of its settings.
    """
    from samplers.settings import make, settings_of

    if not isinstance(component, type) or not any("__call__" in vars(base) for base in component.__mro__):
        raise ValueError("it is no class with a __call__, as samplers are")
    defaults = {setting.name: setting.default for setting in settings_of(component).values() if setting.kind}
    sampler = make(component, defaults)
    for name in ("name", "lossless"):
        if not hasattr(sampler, name):
            raise ValueError(f"it has no {name}, as samplers have")


def check_pipeline(component: Any) -> None:
    """Raises:
    ValueError: no class of a pipeline.
    """
    if not isinstance(component, type) or not hasattr(component, "from_pretrained"):
        raise ValueError("it is no class with a from_pretrained, as pipelines are")


def check_command(component: Any) -> None:
    """Raises:
    ValueError: no module of a command, or of a measure; what its `add_arguments` raises.
    """
    functions = ("add_arguments", "run")
    if not isinstance(getattr(component, "HELP", None), str) or not all(
        callable(getattr(component, name, None)) for name in functions
    ):
        raise ValueError("it lacks HELP, add_arguments or run, which commands have")
    component.add_arguments(argparse.ArgumentParser())


def check_tab(component: Any) -> None:
    """Raises:
    ValueError: no module of a tab.
    """
    if not isinstance(getattr(component, "TITLE", None), str) or not callable(getattr(component, "layout", None)):
        raise ValueError("it lacks TITLE or layout, which tabs have")


def check_recipe(component: Any) -> None:
    """Raises:
    ValueError: no recipe.
    """
    kinds = resolve("argen.train.loop:Recipe"), resolve("argen.train.own.run:OwnRecipe")
    if not isinstance(component, kinds):
        raise ValueError(
            f"it is {type(component).__name__}, expected an argen.train.loop.Recipe or argen.train.own.run.OwnRecipe"
        )


def check_reader(component: Any) -> None:
    """Raises:
    ValueError: no function.
    """
    if not callable(component):
        raise ValueError("it is no function that reads a folder")


def check_cards(component: Any) -> None:
    """Raises:
    ValueError: neither a card nor a package with TOML files.
    """
    is_package = isinstance(component, ModuleType) and hasattr(component, "__path__")
    if not is_package and not isinstance(component, resolve("argen.hub.cards:Card")):
        raise ValueError("it is neither a package with cards in TOML files nor an argen.hub.cards.Card")


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
        ValueError: no such kind; a name that is taken or cannot be typed; what is no component of this kind.
    """
    if not isinstance(kind, str) or kind not in REGISTRIES:
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
    check_sampler,
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
    check_pipeline,
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
            "quantize",
            "merge",
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
    check_command,
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
            "everyday",
            "control",
            "bind",
            "erase",
            "count",
            "nudity",
            "held-out",
            "stats",
        )
    },
    check_command,
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
            "train",
            "evaluate",
            "models",
        )
    },
    check_tab,
)
recipes = Registry(
    "recipe",
    {
        "llamagen": "argen.train.own.llamagen:RECIPE",
        "parti": "argen.train.own.parti:RECIPE",
        "controlar": "argen.train.own.controlar:RECIPE",
        "drafter": "argen.train.own.drafter:RECIPE",
        "xar": "argen.train.own.xar:RECIPE",
        "flexar": "argen.train.own.flexar:RECIPE",
        "vit-vqgan": "argen.train.own.vit_vqgan:RECIPE",
        "llamagen-vq": "argen.train.own.llamagen_vq:RECIPE",
        "flextok": "argen.train.own.flextok:RECIPE",
        "seed-lm": "argen.train.own.seed_lm:RECIPE",
        "emoji-clip": "argen.train.clip:RECIPE",
        "emoji-vitvqgan": "argen.train.vit_vqgan:RECIPE",
        "emoji-vitvqgan-decoder": "argen.train.vit_vqgan:DECODER_RECIPE",
        "emoji-vae": "argen.train.kl_vae:RECIPE",
        "emoji-vae-decoder": "argen.train.kl_vae:DECODER_RECIPE",
        "emoji-parti": "argen.train.parti:RECIPE",
        "emoji-parti-second": "argen.train.parti:SECOND_RECIPE",
        "emoji-parti-third": "argen.train.parti:THIRD_RECIPE",
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
    check_recipe,
)
cards = Registry(
    "card", {}, check_cards, CARD_NAMES
)  # of installed packages and of running programs; those of argen lie in argen/cards
readers = Registry(
    "reader", {}, check_reader
)  # what the cards of trained folders may name beside the targets of `cards`
REGISTRIES = {
    registry.kind: registry for registry in (samplers, pipelines, commands, measures, tabs, recipes, cards, readers)
}


def draws_of(sampler: str) -> str:
    """What a sampler decides: "tokens" or "latents"."""
    return getattr(samplers[sampler], "draws", "tokens")


def about_of(sampler: str) -> str:
    """What a sampler does: the first paragraph of its docstring."""
    return " ".join((samplers[sampler].__doc__ or "").strip().split("\n\n")[0].split())


def samplers_of(draws: str) -> list[str]:
    """Names of the samplers that decide "tokens", or of those that decide "latents"."""
    return [name for name in samplers if draws_of(name) == draws]
