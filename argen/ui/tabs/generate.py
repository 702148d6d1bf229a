"""The tab *Generate*: text to image with previews, settings and presets."""

import gradio as gr

from argen.data.emoji import STYLES
from argen.data.imagenet import class_names
from argen.metadata import read_request
from argen.pipelines.base import TokenPipeline
from argen.registry import about_of, samplers
from argen.request import Request
from argen.ui.context import AppContext, View, display_settings, queue_table, user_errors
from argen.ui.widgets import SamplerSettings, update_choices
from argen.words import check_length
from samplers.settings import settings_of

ANY_STYLE = "any"
REQUEST_SETTINGS = settings_of(Request)
LABELS = {  # of the settings under More, in their order
    "guidance_scale": "Guidance",
    "temperature": "Temperature",
    "top_k": "Top-k",
    "top_p": "Top-p",
    "sampler": "Sampler",
    "steps": "Steps",
    "num_tokens": "Tokens",
    "num_beams": "Beams",
    "num_candidates": "Candidates",
    "literal": "Word for word",
}
SETTINGS = tuple(LABELS)
SLIDER_MAX = {
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
    gr.on(None, create.view.restore, None, create.view.job_outputs)
    gr.on(None, create.presets, None, create.name)
    update_choices(tab, create.model, create.names)


class Generate:
    """The tab, laid out inside the current `gr.Blocks`.

    Attributes:
        view: shows its job.
        name, model: dropdowns of the presets and of the models.
    """

    def __init__(self, context: AppContext):
        self.models, self.context = context.studio.models, context
        ids = self.names()
        pipe = self.models(ids[0])
        with gr.Row():
            with gr.Column(scale=2):
                self.model = model = gr.Dropdown(ids, value=ids[0], label="Model", elem_id="model")
                prompt = gr.Textbox(label="Prompt", placeholder="a red apple", autofocus=True, elem_id="prompt")
                prompt_length = gr.Markdown(elem_id="length")
                names = classes(pipe)
                group = gr.Dropdown(names, value=None, label="Or a class", visible=bool(names), elem_id="class")
                with gr.Row():
                    style = gr.Dropdown([ANY_STYLE, *STYLES], value=ANY_STYLE, label="Style")
                    num = gr.Slider(1, 9, value=4, step=1, label="Images")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="image i has seed + i")
                with gr.Accordion("More", open=False):
                    settings = self.settings(pipe)
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="draw")
                    reset = gr.Button("Reset to model defaults", elem_id="reset")
                examples = [
                    "a red apple",
                    "a sunflower",
                    "a penguin",
                    "a pizza, flat style",
                ]  # for the first model
                gr.Examples(examples, prompt)
                with gr.Accordion("Settings from an image, and presets", open=False):
                    image_file, self.name, save, apply, restored, restored_settings = self.restore_fields()
            self.view = View(context)
        with gr.Accordion("Queue", open=True):
            queue_table(context)

        model_fields = [style, *settings, *self.sampling.widgets, group]
        fields = [model, prompt, num, seed, *model_fields]
        model.input(self.model_updates, model, model_fields)
        if context.chosen is not None:
            context.chosen.change(self.choose, context.chosen, [model, *model_fields])
        reset.click(self.model_updates, model, model_fields)
        group.input(lambda name: f"class:{name}", group, prompt)
        sampler = settings[SETTINGS.index("sampler")]
        sampler.input(self.sampling.updates, sampler, self.sampling.widgets, show_progress="hidden")
        sampler.change(lambda name: gr.update(info=about_of(name)), sampler, sampler, show_progress="hidden")
        literal = settings[SETTINGS.index("literal")]
        changes = [prompt.change, model.input, literal.change]
        gr.on(changes, self.prompt_length, [model, prompt, literal], prompt_length, show_progress="hidden")
        gr.on([generate.click, prompt.submit], self.run, fields[:-1], self.view.job_outputs)
        image_file.upload(self.read_file, image_file, [restored, restored_settings])
        self.name.input(self.preset, self.name, [restored, restored_settings])
        apply.click(self.apply, restored, fields)
        save.click(self.save_preset, [self.name, *fields[:-1]], self.name)

    def names(self) -> list[str]:
        """The generators without control images, and what was trained here."""
        return self.models.generators(control=False)

    def choose(self, chosen: tuple[str, float] | None) -> list:
        """Show the model that another tab has chosen."""
        if chosen is None:
            return [gr.skip()] * (2 + len(SETTINGS) + len(self.sampling.widgets) + 1)
        return [gr.update(choices=self.names(), value=chosen[0]), *self.model_updates(chosen[0])]

    def settings(self, pipe: TokenPipeline) -> list[gr.components.Component]:
        """Lay out the widgets under More: of each of `SETTINGS`, then those of the samplers; in the order of `model_updates`."""
        updates = dict(zip(SETTINGS, self.values(pipe, None), strict=True))
        fields = []
        for name in SETTINGS:
            properties = {key: value for key, value in updates[name].items() if key != "__type__"}
            if name == "sampler":
                fields.append(
                    gr.Dropdown(label="Sampler", elem_id="sampler", info=about_of(Request.sampler), **properties)
                )
                self.sampling = SamplerSettings(list(samplers))
            elif REQUEST_SETTINGS[name].kind is bool:
                label, info = LABELS[name], REQUEST_SETTINGS[name].help
                fields.append(gr.Checkbox(label=label, info=info, elem_id=name, **properties))
            else:
                minimum = {"minimum": 0 if name == "num_beams" else REQUEST_SETTINGS[name].low}
                step = {"step": 0.05 if REQUEST_SETTINGS[name].kind is float else 1}
                label, info = LABELS[name], REQUEST_SETTINGS[name].note or REQUEST_SETTINGS[name].help
                elem_id = name.replace("_", "-")
                fields.append(
                    gr.Slider(
                        **minimum | {"maximum": SLIDER_MAX[name]} | step | properties,
                        label=label,
                        info=info,
                        elem_id=elem_id,
                    )
                )
        return fields

    def values(self, pipe: TokenPipeline, saved: Request | None) -> list[dict]:
        """Return updates of each of `SETTINGS`: the model's defaults or saved values; settings that the model lacks are hidden."""
        defaults, overrides = pipe.defaults, saved.explicit_settings() if saved else {}
        flow_only, ordered_only = {"visible": bool(defaults.steps)}, {"visible": pipe.ordered}
        steps = overrides.get("steps", defaults.steps) or 1
        tokens = {"maximum": max(2, pipe.length), **ordered_only}
        return [
            gr.update(value=overrides.get("guidance_scale", defaults.guidance_scale)),
            gr.update(value=overrides.get("temperature", defaults.temperature), visible=not defaults.steps),
            gr.update(value=overrides.get("top_k", defaults.top_k), visible=not defaults.steps),
            gr.update(value=overrides.get("top_p", defaults.top_p), visible=not defaults.steps),
            gr.update(choices=list(pipe.samplers), value=overrides.get("sampler", Request.sampler)),
            gr.update(value=steps if isinstance(steps, int) else steps[0], **flow_only),
            gr.update(value=overrides.get("num_tokens", pipe.length), **tokens),
            gr.update(value=overrides.get("num_beams", 0), **ordered_only),
            gr.update(value=overrides.get("num_candidates", 1)),
            gr.update(value=bool(overrides.get("literal")), visible=bool(pipe.card and pipe.card.names)),
        ]

    def restore_fields(self) -> tuple:
        """Lay out the file and preset inputs; their settings are shown before they are applied."""
        image_file = gr.File(label="A PNG file made here", file_types=[".png"], elem_id="restore")
        name = gr.Dropdown([], label="Preset", allow_custom_value=True, elem_id="preset")
        with gr.Row():
            save = gr.Button("Save as preset", elem_id="keep")
            apply = gr.Button("Use these settings", elem_id="use")
        return image_file, name, save, apply, gr.State(None), gr.JSON(show_label=False, elem_id="restored")

    def generation_request(self, model: str, prompt: str, num: float, seed: float, style: str, *values) -> Request:
        """Build the request from the values of the fields."""
        settings = dict(zip(SETTINGS, values, strict=False))
        pipe, text, sampler = self.models(model), prompt.strip(), settings["sampler"]
        styled = text and style != ANY_STYLE and not text.startswith("class:")
        unused = [] if pipe.ordered else ["num_tokens", "num_beams"]
        unused += ["temperature", "top_k", "top_p"] if pipe.defaults.steps else ["steps"]
        settings = {
            name: REQUEST_SETTINGS[name].lenient(value) for name, value in settings.items() if name not in unused
        }
        settings["num_beams"] = settings.get("num_beams") or None
        settings["literal"] = settings["literal"] or None
        settings["num_candidates"] = settings["num_candidates"] if settings["num_candidates"] > num else None
        return Request(
            prompt=f"{text}, {STYLES[style].prompt}" if styled else text,
            model=model,
            num_images=int(num),
            seed=int(seed),
            sampler_args=self.sampling.arguments(sampler, values[len(SETTINGS) :]),
            **settings,
        )

    def run(self, request: gr.Request, *fields) -> tuple:
        with user_errors():
            return self.view.submit(self.generation_request(*fields), request)

    def model_updates(self, model: str, saved: Request | None = None) -> list:
        """Return updates of the style, the settings and the classes for a model; fields that it lacks are hidden."""
        with user_errors():
            pipe = self.models(model)
        names = classes(pipe)
        return [
            gr.update(value=ANY_STYLE, visible=model.startswith("argen/")),
            *self.values(pipe, saved),
            *self.sampling.updates(saved.sampler if saved else Request.sampler, saved and saved.sampler_args),
            gr.update(choices=names, value=None, visible=bool(names)),
        ]

    def prompt_length(self, model: str, prompt: str, literal: bool) -> str:
        """Describe how the model reads a prompt: in which words, and how many text tokens of it."""
        if not prompt.strip():
            return ""
        with user_errors():
            pipe = self.models(model)
            reading = pipe.read_prompt(check_length(prompt, "the prompt"), literal)
            counts = pipe.text_tokens(reading.text)
        notes = [f"*{note}*" for note in reading.notes]
        if counts is not None:
            count, limit = counts
            notes.append(
                f"{count} of {limit} text tokens"
                if count <= limit
                else f"**{count} text tokens: {limit} of them are read**"
            )
        return " · ".join(notes)

    def read_file(self, path: str | None) -> tuple:
        """Read the settings inside a file."""
        with user_errors():
            request = None if path is None else read_request(path)
        return request, request and display_settings(request)

    def preset(self, name: str | None, request: gr.Request) -> tuple:
        """Read the settings of a preset; None where none has that name yet."""
        with user_errors():
            saved = self.context.studio.store.presets(self.context.owner(request)).get(name)
            restored = None if saved is None else Request.from_dict(saved)
        return restored, restored and display_settings(restored)

    def apply(self, restored: Request | None) -> list:
        with user_errors():
            if restored is None:
                raise ValueError("there are no settings: drop a PNG file, or choose a preset")
        return [
            restored.model,
            restored.prompt,
            restored.num_images,
            restored.seed,
            *self.model_updates(restored.model, restored),
        ]

    def save_preset(self, request: gr.Request, name: str | None, *fields) -> dict:
        with user_errors():
            if not name or len(name) > 60:
                raise ValueError("the preset has no name: type one, of at most 60 characters")
            self.context.studio.store.save_preset(
                self.context.owner(request), name, self.generation_request(*fields).to_dict()
            )
        return self.presets(request)

    def presets(self, request: gr.Request) -> dict:
        return gr.update(choices=list(self.context.studio.store.presets(self.context.owner(request))))


def classes(pipe: TokenPipeline) -> list[str]:
    """Return the class names that a generator takes as "class:NAME"."""
    groups = getattr(pipe.config, "groups", None)
    by_class = getattr(pipe.components.get("transformer"), "config", {}).get("classes") == len(class_names())
    return list(class_names()) if by_class else list(groups or [])
