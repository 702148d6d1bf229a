"""The tab that makes pictures: they grow while they are written, and keep their settings."""

from collections.abc import Callable, Sequence

import gradio as gr

from argen.bounds import check_length
from argen.data.emoji import STYLES
from argen.data.imagenet import class_names
from argen.metadata import read_request
from argen.pipelines.base import TokenPipeline
from argen.request import Request
from argen.ui.jobs import AppContext, View, line, readable, user_errors
from samplers import Lantern

ANY_STYLE = "any"
Models = Callable[[str], TokenPipeline]  # id -> the generator


class Create:
    """The tab; lay it out inside the current `gr.Blocks`.

    Args:
        models: gives a generator by its id.
        ids: of the generators to choose from; the first is shown.
        desk: where requests are handed in.

    Attributes:
        view: where its pictures are seen.
        name: of a preset.
    """

    def __init__(self, models: Models, ids: Sequence[str], context: AppContext):
        self.models, self.context = models, context
        shown = models(ids[0])
        with gr.Row():
            with gr.Column(scale=2):
                model = gr.Dropdown(list(ids), value=ids[0], label="Model", elem_id="model")
                prompt = gr.Textbox(label="Prompt", placeholder="a red apple", autofocus=True, elem_id="prompt")
                length = gr.Markdown(elem_id="length")
                names = classes(shown)
                group = gr.Dropdown(names, value=None, label="Or a class", visible=bool(names), elem_id="class")
                with gr.Row():
                    style = gr.Dropdown([ANY_STYLE, *STYLES], value=ANY_STYLE, label="Style")
                    num = gr.Slider(1, 9, value=4, step=1, label="Pictures")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="picture i has seed + i")
                with gr.Accordion("More", open=False):
                    settings = self.settings(shown)
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", elem_id="draw")
                    reset = gr.Button("Reset to the model's own", elem_id="reset")
                examples = ["a red apple", "a blue robot", "three yellow ducks", "a cat to the left of a pizza"]
                gr.Examples(examples, prompt)
                with gr.Accordion("Settings of a picture, and presets", open=False):
                    saved, self.name, keep, use, found, told = self.restoring()
            self.view = View(context)
        with gr.Accordion("Queue", open=True):
            line(context)

        own = [style, *settings, group]
        fields = [model, prompt, num, seed, *own]
        model.input(self.choose, model, own)
        reset.click(self.choose, model, own)
        group.input(lambda name: f"class:{name}", group, prompt)
        lantern = settings[4:6]
        settings[3].change(lambda name: [gr.update(visible=name == Lantern.name)] * 2, settings[3], lantern)
        gr.on([prompt.change, model.input], self.length, [model, prompt], length, show_progress="hidden")
        gr.on([go.click, prompt.submit], self.run, fields[:-1], self.view.watched)
        saved.upload(self.read, saved, [found, told])
        self.name.input(self.preset, self.name, [found, told])
        use.click(self.use, found, fields)
        keep.click(self.keep, [self.name, *fields[:-1]], self.name)

    def settings(self, shown: TokenPipeline) -> list[gr.components.Component]:
        """Those that are folded away, as `choose` gives them."""
        own = shown.defaults
        info = "auto, jacobi: the pictures of plain in fewer passes; lantern: fewer still, relaxed"
        ordered = {"step": 1, "visible": shown.ordered}
        return [
            gr.Slider(1, 10, value=own.guidance_scale, step=0.5, label="Guidance", info="1: none"),
            gr.Slider(0, 2, value=own.temperature, step=0.05, label="Temperature"),
            gr.Slider(0, 2048, value=own.top_k, step=1, label="Top-k", info="0: all tokens"),
            gr.Dropdown(list(shown.samplers), value=Request.sampler, label="Sampler", info=info),
            gr.Slider(0, 100, value=Lantern.k, step=1, label="LANTERN k", visible=False),
            gr.Slider(0, 1, value=0.2, step=0.05, label="LANTERN delta", visible=False),
            gr.Slider(1, 100, value=own.steps or 1, step=1, label="Steps", visible=bool(own.steps)),
            gr.Slider(1, max(2, shown.length), shown.length, label="Tokens", elem_id="num-tokens", **ordered),
            gr.Slider(0, 8, value=0, label="Beams", info="0: no search among beginnings", **ordered),
            gr.Slider(1, 32, value=1, step=1, label="Candidates", info="more than Pictures: the best ones are kept"),
        ]

    def restoring(self) -> tuple:
        """A file, or a preset, whose settings are shown before they are taken."""
        saved = gr.File(label="A PNG file made here", file_types=[".png"], elem_id="restore")
        name = gr.Dropdown([], label="Preset", allow_custom_value=True, elem_id="preset")
        with gr.Row():
            keep = gr.Button("Save the settings as this preset", elem_id="keep")
            use = gr.Button("Use these settings", elem_id="use")
        return saved, name, keep, use, gr.State(None), gr.JSON(show_label=False, elem_id="restored")

    def wanted(self, model: str, prompt: str, num: float, seed: float, style: str, *settings) -> Request:
        """The request that the fields say."""
        guidance, temperature, top_k, sampler, k, delta, steps, tokens, beams, candidates = settings
        asked = prompt.strip()
        styled = asked and style != ANY_STYLE and not asked.startswith("class:")
        pipe, lantern = self.models(model), sampler == Lantern.name
        return Request(
            prompt=f"{asked}, {STYLES[style].prompt}" if styled else asked,
            model=model,
            num_images=int(num),
            seed=int(seed),
            guidance_scale=guidance,
            temperature=temperature,
            top_k=int(top_k),
            num_candidates=int(candidates) if candidates > num else None,
            num_beams=int(beams) if pipe.ordered and beams else None,
            num_tokens=int(tokens) if pipe.ordered else None,
            steps=int(steps) if pipe.defaults.steps else None,
            sampler=sampler,
            lantern_k=int(k) if lantern else None,
            lantern_delta=delta if lantern else None,
        )

    def run(self, request: gr.Request, *fields) -> tuple:
        with user_errors():
            return self.view.ask(self.wanted(*fields), request)

    def choose(self, model: str, saved: Request | None = None) -> list:
        """The style and the settings of a model, its own or those saved, and its classes; what it does not have is hidden."""
        with user_errors():
            pipe = self.models(model)
        own, names, given = pipe.defaults, classes(pipe), saved.given() if saved else {}
        lantern, flows = {"visible": given.get("sampler") == Lantern.name}, {"visible": bool(own.steps)}
        steps, ordered = given.get("steps", own.steps) or 1, {"visible": pipe.ordered}
        tokens = {"maximum": max(2, pipe.length), **ordered}
        return [
            gr.update(value=ANY_STYLE, visible=model.startswith("argen/")),
            given.get("guidance_scale", own.guidance_scale),
            gr.update(value=given.get("temperature", own.temperature), visible=not own.steps),
            gr.update(value=given.get("top_k", own.top_k), visible=not own.steps),
            gr.update(choices=list(pipe.samplers), value=given.get("sampler", Request.sampler)),
            gr.update(value=given.get("lantern_k", Lantern.k), **lantern),
            gr.update(value=given.get("lantern_delta", 0.2), **lantern),
            gr.update(value=steps if isinstance(steps, int) else steps[0], **flows),
            gr.update(value=given.get("num_tokens", pipe.length), **tokens),
            gr.update(value=given.get("num_beams", 0), **ordered),
            given.get("num_candidates", 1),
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
