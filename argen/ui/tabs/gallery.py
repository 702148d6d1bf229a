"""The tab of everything that was made: found, looked at, compared, kept and thrown away."""

import gradio as gr
import numpy as np
import torch

from argen.hub.cards import ids
from argen.jobs.store import Saved
from argen.ui.context import AppContext, enlarge, readable, tinted, user_errors, written

ON_A_PAGE = 48
MOST_ZIPPED = 1000


TITLE = "Gallery"


def layout(context: AppContext, tab: gr.Tab) -> None:
    gallery = Gallery(context)
    tab.select(*gallery.first)


class Gallery:
    """The tab; lay it out inside the current `gr.Blocks`. `shown` holds the ids on the page, `chosen` the last two chosen ones."""

    def __init__(self, context: AppContext):
        self.context, self.studio = context, context.studio
        self.shown, self.chosen = gr.State([]), gr.State([])
        with gr.Row():
            search = gr.Textbox(label="Words of the prompt", elem_id="search")
            model = gr.Dropdown(["", *ids("generator")], value="", label="Model")
            stars = gr.Checkbox(False, label="Favourites only", elem_id="favourites")
            page = gr.Number(1, precision=0, minimum=1, label="Page", elem_id="gallery-page")
        with gr.Row():
            with gr.Column(scale=3):
                many = gr.Gallery(
                    label="Click on one; the last two are compared",
                    columns=6,
                    object_fit="contain",
                    allow_preview=False,
                    elem_id="found",
                )
                told = gr.Markdown(elem_id="found-state")
                load, pack = (
                    gr.Button("Refresh", elem_id="gallery-look"),
                    gr.Button("Download ZIP", elem_id="pack"),
                )
                packed = gr.File(label="ZIP, with the settings as JSON lines", visible=False, elem_id="packed")
            with gr.Column(scale=2):
                large = gr.Image(label="Image", height=320, interactive=False, elem_id="chosen")
                with gr.Row():
                    star = gr.Button("Favourite", elem_id="star")
                    drop = gr.Button("Delete", variant="stop", elem_id="delete")
                about = gr.JSON(show_label=False, elem_id="about")
                with gr.Accordion("Compare with the previous one", open=False):
                    pair = gr.ImageSlider(label="before, now", height=320, interactive=False, elem_id="pair")
                    meet = gr.Slider(0, 100, value=50, step=5, label="Divider (percent)", elem_id="meet")
                with gr.Accordion("Token confidence", open=False):
                    think = gr.Button("Show confidence", elem_id="think")
                    sure = gr.Gallery(
                        label="entropy (dark: unsure), probability (dark: unlikely), guesses accepted (green) and relaxed (orange)",
                        columns=3,
                        object_fit="contain",
                        elem_id="sure",
                    )
        asked, outputs = [search, model, stars, page], [many, told, self.shown]
        gr.on([load.click, search.submit, model.input, stars.input, page.submit], self.find, asked, outputs)
        many.select(self.choose, [self.shown, self.chosen], [large, about, pair, self.chosen])
        meet.input(lambda place: gr.update(slider_position=place), meet, pair, show_progress="hidden")
        star.click(self.favour, self.chosen, about)
        drop.click(self.delete, self.chosen, [large, about, self.chosen]).then(self.find, asked, outputs)
        pack.click(self.pack, asked[:3], packed)
        think.click(self.think, self.chosen, sure)
        self.first = self.find, asked, outputs

    def find(self, search: str, model: str, stars: bool, page: float, request: gr.Request) -> tuple:
        """(thumbnails with prompts, how many, ids)."""
        place = (max(1, int(page or 1)) - 1) * ON_A_PAGE
        found = self.wanted(search, model, stars, request, limit=ON_A_PAGE, offset=place)
        shown = [saved.id for saved in found]
        thumbnails = [(self.studio.store.thumbnail(saved.id), saved.request.prompt) for saved in found]
        many = f"{place + 1} to {place + len(shown)}" if shown else "nothing"
        return thumbnails, f"{many}, the latest first", shown

    def wanted(self, search: str, model: str, stars: bool, request: gr.Request, **page: int) -> list[Saved]:
        """What the fields ask for; `page`: limit and offset."""
        return self.studio.store.images(search, model, stars, owner=self.context.owner(request), **page)

    def saved(self, id: str, request: gr.Request) -> Saved:
        """Raises:
        KeyError: there is no such picture of this owner.
        """
        found = self.studio.store.image(id)
        if found.owner != self.context.owner(request):
            raise KeyError(f"there is no picture {id!r}")
        return found

    def last(self, chosen: list[str], request: gr.Request) -> Saved:
        if not chosen:
            raise ValueError("no picture is chosen: click on one")
        return self.saved(chosen[-1], request)

    def choose(self, shown: list[str], chosen: list[str], event: gr.SelectData, request: gr.Request) -> tuple:
        """(picture, its settings, the pair, chosen)."""
        with user_errors():
            found = self.saved(shown[event.index], request)
            chosen = [*chosen[-1:], found.id] if found.id not in chosen[-1:] else chosen
            images = [enlarge(self.studio.store.opened(id)) for id in chosen]
        return images[-1], about(found), tuple(images) if len(images) == 2 else None, chosen

    def favour(self, chosen: list[str], request: gr.Request) -> dict:
        with user_errors():
            found = self.last(chosen, request)
            self.studio.store.set_favourite(found.id, not found.favourite)
            return about(self.saved(found.id, request))

    def delete(self, chosen: list[str], request: gr.Request) -> tuple:
        with user_errors():
            self.studio.store.delete(self.last(chosen, request).id)
        return None, None, chosen[:-1]

    def pack(self, search: str, model: str, stars: bool, request: gr.Request) -> dict:
        with user_errors():
            found = [saved.id for saved in self.wanted(search, model, stars, request, limit=MOST_ZIPPED)]
            if not found:
                raise ValueError("nothing is found: look for something else")
            file = self.studio.store.zipped(found)
        return gr.update(value=str(file), visible=True)

    def think(self, chosen: list[str], request: gr.Request) -> list[tuple]:
        """The picture under what the network made of each of its cells."""
        with user_errors():
            found = self.last(chosen, request)
            if found.tokens is None:
                raise ValueError("this picture was not made of tokens: choose one of another model")
            image = self.studio.store.opened(found.id)
            with self.studio.model(found.request.model) as pipe:
                entropy, own = pipe.certainty(found.request, torch.tensor(found.tokens))
        unsure = [(entropy / entropy.max().clamp(min=1e-6)).numpy(), (1 - own).numpy()]
        maps = [
            (tinted(image, dark(share)), name) for share, name in zip(unsure, ("entropy", "probability"), strict=True)
        ]
        return maps + ([(written(image, found.origins), "guesses")] if found.origins else [])


def about(found: Saved) -> dict:
    fault = {"fault": found.fault} if found.fault else {}
    return {"file": f"{found.id}.png", "favourite": found.favourite, **fault, **readable(found.request)}


def dark(share: np.ndarray) -> np.ndarray:
    """Shares [h, w] in [0, 1] -> black of so much alpha, [h, w, 4] uint8."""
    tint = np.zeros((*share.shape, 4), np.uint8)
    tint[..., 3] = (220 * share).round()
    return tint
