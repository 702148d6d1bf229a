"""The tab *Generate*: images grow while they are written, and keep their settings."""

import gradio as gr

from argen.data.emoji import STYLES
from argen.data.imagenet import class_names
from argen.hub.cards import generators
from argen.metadata import read_request
from argen.pipelines.base import TokenPipeline
from argen.registry import samplers
from argen.request import Request
from argen.ui.context import AppContext, View, line, readable, user_errors
from argen.ui.widgets import SamplerSettings
from argen.words import check_length
from samplers.settings import settings_of

ANY_STYLE = "any"
KNOWN = settings_of(Request)
LABELS = {  # of the settings that are folded away, in their order
    "guidance_scale": "Guidance",
    "temperature": "Temperature",
    "top_k": "Top-k",
    "top_p": "Top-p",
    "sampler": "Sampler",
    "steps": "Steps",
    "num_tokens": "Tokens",
    "num_beams": "Beams",
    "num_candidates": "Candidates",
}
SETTINGS = tuple(LABELS)
SLIDER = {
    "guidance_scale": 20,
    "temperature": 2,
    "top_k": 2048,
    "top_p": 1,
    "steps": 100,
    "num_tokens": 64,
    "num_beams": 8,
    "num_candidates": 32,
}
TITLE = "Generate"


def layout(context: AppContext, tab: gr.Tab) -> None:
    create = Generate(context)
    gr.on(None, create.view.restore, None, create.view.watched)
    gr.on(None, create.presets, None, create.name)


class Generate:
    """The tab; lay it out inside the current `gr.Blocks`.

    Attributes:
        view: where its images are seen.
        name: of a preset.
    """

    def __init__(self, context: AppContext):
        self.models, self.context = context.studio.models, context
        ids = generators()
        shown = self.models(ids[0])
        with gr.Row():
            with gr.Column(scale=2):
                model = gr.Dropdown(ids, value=ids[0], label="Model", elem_id="model")
                prompt = gr.Textbox(label="Prompt", placeholder="a red apple", autofocus=True, elem_id="prompt")
                length = gr.Markdown(elem_id="length")
                names = classes(shown)
                group = gr.Dropdown(names, value=None, label="Or a class", visible=bool(names), elem_id="class")
                with gr.Row():
                    style = gr.Dropdown([ANY_STYLE, *STYLES], value=ANY_STYLE, label="Style")
                    num = gr.Slider(1, 9, value=4, step=1, label="Images")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="image i has seed + i")
                with gr.Accordion("More", open=False):
                    settings = self.settings(shown)
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="draw")
                    reset = gr.Button("Reset to model defaults", elem_id="reset")
                examples = [
                    "a red apple",
                    "a sunflower",
                    "a penguin",
                    "a pizza, flat style",
                ]  # what the first model draws well
                gr.Examples(examples, prompt)
                with gr.Accordion("Settings from an image, and presets", open=False):
                    saved, self.name, keep, use, found, told = self.restoring()
            self.view = View(context)
        with gr.Accordion("Queue", open=True):
            line(context)

        own = [style, *settings, *self.sampling.widgets, group]
        fields = [model, prompt, num, seed, *own]
        model.input(self.choose, model, own)
        reset.click(self.choose, model, own)
        group.input(lambda name: f"class:{name}", group, prompt)
        sampler = settings[SETTINGS.index("sampler")]
        sampler.input(self.sampling.choose, sampler, self.sampling.widgets, show_progress="hidden")
        gr.on([prompt.change, model.input], self.length, [model, prompt], length, show_progress="hidden")
        gr.on([go.click, prompt.submit], self.run, fields[:-1], self.view.watched)
        saved.upload(self.read, saved, [found, told])
        self.name.input(self.preset, self.name, [found, told])
        use.click(self.use, found, fields)
        keep.click(self.keep, [self.name, *fields[:-1]], self.name)

    def settings(self, shown: TokenPipeline) -> list[gr.components.Component]:
        """Those that are folded away, as `choose` gives them: of each of `SETTINGS`, then those of the samplers."""
        updates = dict(zip(SETTINGS, self.values(shown, None), strict=True))
        fields = []
        for name in SETTINGS:
            how = {key: value for key, value in updates[name].items() if key != "__type__"}
            if name == "sampler":
                fields.append(
                    gr.Dropdown(label="Sampler", elem_id="sampler", info="`argen samplers` explains each", **how)
                )
                self.sampling = SamplerSettings(list(samplers))
            else:
                low = {"minimum": 0 if name == "num_beams" else KNOWN[name].low}
                step = {"step": 0.05 if KNOWN[name].kind is float else 1}
                label, info = LABELS[name], KNOWN[name].note or KNOWN[name].help
                elem_id = name.replace("_", "-")
                fields.append(
                    gr.Slider(**low | {"maximum": SLIDER[name]} | step | how, label=label, info=info, elem_id=elem_id)
                )
        return fields

    def values(self, pipe: TokenPipeline, saved: Request | None) -> list[dict]:
        """Value and visibility of each of `SETTINGS`: the model's own or those saved; what the model does not have is hidden."""
        own, given = pipe.defaults, saved.given() if saved else {}
        flows, ordered = {"visible": bool(own.steps)}, {"visible": pipe.ordered}
        steps = given.get("steps", own.steps) or 1
        tokens = {"maximum": max(2, pipe.length), **ordered}
        return [
            gr.update(value=given.get("guidance_scale", own.guidance_scale)),
            gr.update(value=given.get("temperature", own.temperature), visible=not own.steps),
            gr.update(value=given.get("top_k", own.top_k), visible=not own.steps),
            gr.update(value=given.get("top_p", own.top_p), visible=not own.steps),
            gr.update(choices=list(pipe.samplers), value=given.get("sampler", Request.sampler)),
            gr.update(value=steps if isinstance(steps, int) else steps[0], **flows),
            gr.update(value=given.get("num_tokens", pipe.length), **tokens),
            gr.update(value=given.get("num_beams", 0), **ordered),
            gr.update(value=given.get("num_candidates", 1)),
        ]

    def restoring(self) -> tuple:
        """A file, or a preset, whose settings are shown before they are taken."""
        saved = gr.File(label="A PNG file made here", file_types=[".png"], elem_id="restore")
        name = gr.Dropdown([], label="Preset", allow_custom_value=True, elem_id="preset")
        with gr.Row():
            keep = gr.Button("Save as preset", elem_id="keep")
            use = gr.Button("Use these settings", elem_id="use")
        return saved, name, keep, use, gr.State(None), gr.JSON(show_label=False, elem_id="restored")

    def wanted(self, model: str, prompt: str, num: float, seed: float, style: str, *values) -> Request:
        """The request that the fields say."""
        given = dict(zip(SETTINGS, values, strict=False))
        pipe, asked, sampler = self.models(model), prompt.strip(), given["sampler"]
        styled = asked and style != ANY_STYLE and not asked.startswith("class:")
        unused = [] if pipe.ordered else ["num_tokens", "num_beams"]
        unused += ["temperature", "top_k", "top_p"] if pipe.defaults.steps else ["steps"]
        given = {name: KNOWN[name].lenient(value) for name, value in given.items() if name not in unused}
        given["num_beams"] = given.get("num_beams") or None
        given["num_candidates"] = given["num_candidates"] if given["num_candidates"] > num else None
        return Request(
            prompt=f"{asked}, {STYLES[style].prompt}" if styled else asked,
            model=model,
            num_images=int(num),
            seed=int(seed),
            sampler_args=self.sampling.arguments(sampler, values[len(SETTINGS) :]),
            **given,
        )

    def run(self, request: gr.Request, *fields) -> tuple:
        with user_errors():
            return self.view.ask(self.wanted(*fields), request)

    def choose(self, model: str, saved: Request | None = None) -> list:
        """The style and the settings of a model, its own or those saved, and its classes; what it does not have is hidden."""
        with user_errors():
            pipe = self.models(model)
        names = classes(pipe)
        return [
            gr.update(value=ANY_STYLE, visible=model.startswith("argen/")),
            *self.values(pipe, saved),
            *self.sampling.choose(saved.sampler if saved else Request.sampler, saved and saved.sampler_args),
            gr.update(choices=names, value=None, visible=bool(names)),
        ]

    def length(self, model: str, prompt: str) -> str:
        """How much of a prompt the model reads."""
        with user_errors():
            told = self.models(model).text_tokens(check_length(prompt, "the prompt")) if prompt.strip() else None
        if told is None:
            return ""
        count, most = told
        return (
            f"{count} of {most} text tokens" if count <= most else f"**{count} text tokens: {most} of them are read**"
        )

    def read(self, path: str | None) -> tuple:
        """The settings inside a file."""
        with user_errors():
            found = None if path is None else read_request(path)
        return found, found and readable(found)

    def preset(self, name: str | None, request: gr.Request) -> tuple:
        """The settings of a preset; nothing where none has that name yet."""
        with user_errors():
            saved = self.context.studio.store.presets(self.context.owner(request)).get(name)
            found = None if saved is None else Request.from_dict(saved)
        return found, found and readable(found)

    def use(self, found: Request | None) -> list:
        with user_errors():
            if found is None:
                raise ValueError("there are no settings: drop a PNG file, or choose a preset")
        return [found.model, found.prompt, found.num_images, found.seed, *self.choose(found.model, found)]

    def keep(self, request: gr.Request, name: str | None, *fields) -> dict:
        with user_errors():
            if not name or len(name) > 60:
                raise ValueError("the preset has no name: type one, of at most 60 characters")
            self.context.studio.store.save_preset(self.context.owner(request), name, self.wanted(*fields).to_dict())
        return self.presets(request)

    def presets(self, request: gr.Request) -> dict:
        return gr.update(choices=list(self.context.studio.store.presets(self.context.owner(request))))


def classes(pipe: TokenPipeline) -> list[str]:
    """Names of the classes that a generator can be asked for as "class:NAME"."""
    groups = getattr(pipe.config, "groups", None)
    by_class = getattr(pipe.components.get("transformer"), "config", {}).get("classes") == len(class_names())
    return list(class_names()) if by_class else list(groups or [])
