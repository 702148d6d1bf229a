"""Widgets made of settings, with their bounds and help, and the settings of all samplers, of which the selected one's are visible."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr

from argen.registry import samplers
from argen.request import Request
from samplers.settings import Setting, settings_of

SLIDES = 4096  # bounds up to this are those of a slider


def widget(setting: Setting, value: Any = None, label: str | None = None, **properties) -> gr.components.Component:
    """Create the widget of a setting; `value` is its default if None."""
    value = setting.default if value is None else value
    properties = {"label": label or setting.name.replace("_", " ").capitalize(), "info": setting.help} | properties
    if setting.choices:
        return gr.Dropdown(list(setting.choices), value=value, **properties)
    if setting.kind is bool:
        return gr.Checkbox(value, **properties)
    if setting.kind is str:
        return gr.Textbox(value, **properties)
    precision = {"precision": 0} if setting.kind is int else {}
    return gr.Number(value, minimum=setting.low, maximum=setting.high, **precision, **properties)


def image_gallery(label: str, **properties) -> gr.Gallery:
    """Create a gallery below its label, which Gradio would lay over the images."""
    gr.Markdown(label)
    return gr.Gallery(label=label, show_label=False, object_fit="contain", **properties)


def update_choices(tab: gr.Tab, models: gr.Dropdown, names: Callable[[], list[str]]) -> None:
    """Let a dropdown of models have the newest names, when the page is loaded and when its tab is opened."""
    for event in (partial(gr.on, None), tab.select):
        event(lambda: gr.update(choices=names()), None, models, show_progress="hidden")


class SamplerSettings:
    """Widgets of the settings of several samplers, laid out inside the current `gr.Blocks`.

    Attributes:
        fields: (sampler, setting, widget) of each.
    """

    def __init__(self, names: Sequence[str], prefix: str = "", selected: str = Request.sampler):
        self.fields = []
        for name in names:
            for setting in settings_of(samplers[name]).values():
                if setting.kind and setting.name != "steps":  # which is a setting of the request
                    elem_id = f"{prefix}{name}-{setting.name}"
                    label = f"{name}: {setting.name}"
                    properties = {"visible": name == selected, "elem_id": elem_id}
                    self.fields.append((name, setting, widget(setting, label=label, **properties)))

    @property
    def widgets(self) -> list[gr.components.Component]:
        return [field for _, _, field in self.fields]

    def updates(self, selected: str, arguments: dict[str, Any] | None = None) -> list[dict]:
        """Return the updates of the widgets when a sampler is selected, with `arguments` or its defaults."""
        values = arguments or {}
        return [
            gr.update(
                visible=name == selected,
                value=values.get(setting.name, setting.default) if name == selected else setting.default,
            )
            for name, setting, _ in self.fields
        ]

    def arguments(self, selected: str, values: Sequence[Any]) -> dict[str, Any]:
        """Return the settings of a sampler that differ from its defaults, from the values of the widgets."""
        settings = {
            setting.name: setting.lenient(value)
            for (name, setting, _), value in zip(self.fields, values, strict=True)
            if name == selected
        }
        declared = settings_of(samplers[selected])
        return {name: value for name, value in settings.items() if value != declared[name].default}
