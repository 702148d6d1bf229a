"""The tab *Gallery*: search, compare, favourite, download and delete images."""

import gradio as gr
import numpy as np
import torch

from argen.jobs.store import SavedImage
from argen.ui.context import AppContext, display_settings, enlarge, origin_overlay, overlay, user_errors
from argen.ui.widgets import image_gallery, update_choices

PAGE_SIZE = 48
MAX_ZIPPED = 1000


TITLE = "Gallery"


def layout(context: AppContext, tab: gr.Tab) -> None:
    gallery = Gallery(context)
    tab.select(*gallery.first)
    update_choices(tab, gallery.model, gallery.names)


class Gallery:
    """The tab, laid out inside the current `gr.Blocks`. `page_ids` holds the ids on the page, `selected_ids` the last two selected."""

    def __init__(self, context: AppContext):
        self.context, self.studio = context, context.studio
        self.page_ids, self.selected_ids = gr.State([]), gr.State([])
        with gr.Row():
            search = gr.Textbox(label="Words of the prompt", elem_id="search")
            self.model = model = gr.Dropdown(self.names(), value="", label="Model", elem_id="gallery-model")
            favourites_only = gr.Checkbox(False, label="Favourites only", elem_id="favourites")
            page = gr.Number(1, precision=0, minimum=1, label="Page", elem_id="gallery-page")
        with gr.Row():
            with gr.Column(scale=3):
                thumbnails = image_gallery(
                    "Click on one; the last two are compared",
                    columns=6,
                    allow_preview=False,
                    elem_id="found",
                )
                status = gr.Markdown(elem_id="found-state")
                refresh, download = (
                    gr.Button("Refresh", elem_id="gallery-look"),
                    gr.Button("Download ZIP", elem_id="pack"),
                )
                zip_file = gr.File(label="ZIP, with the settings as JSON lines", visible=False, elem_id="packed")
            with gr.Column(scale=2):
                image = gr.Image(label="Image", height=320, interactive=False, elem_id="chosen")
                with gr.Row():
                    favourite = gr.Button("Favourite", elem_id="star")
                    delete = gr.Button("Delete", variant="stop", elem_id="delete")
                details = gr.JSON(show_label=False, elem_id="about")
                with gr.Accordion("Compare with the previous one", open=False):
                    comparison = gr.ImageSlider(label="before, now", height=320, interactive=False, elem_id="pair")
                    divider = gr.Slider(0, 100, value=50, step=5, label="Divider (percent)", elem_id="meet")
                with gr.Accordion("Token confidence", open=False):
                    show_confidence = gr.Button("Show confidence", elem_id="think")
                    confidence = image_gallery(
                        "entropy (dark: unsure), probability (dark: unlikely), guesses accepted (green) and relaxed (orange)",
                        columns=3,
                        elem_id="sure",
                    )
        inputs, outputs = [search, model, favourites_only, page], [thumbnails, status, self.page_ids]
        gr.on(
            [refresh.click, search.submit, model.input, favourites_only.input, page.submit],
            self.search,
            inputs,
            outputs,
        )
        thumbnails.select(
            self.select, [self.page_ids, self.selected_ids], [image, details, comparison, self.selected_ids]
        )
        divider.input(lambda place: gr.update(slider_position=place), divider, comparison, show_progress="hidden")
        favourite.click(self.toggle_favourite, self.selected_ids, details)
        delete.click(self.delete, self.selected_ids, [image, details, self.selected_ids]).then(
            self.search, inputs, outputs
        )
        download.click(self.download_zip, inputs[:3], zip_file)
        show_confidence.click(self.confidence_maps, self.selected_ids, confidence)
        self.first = self.search, inputs, outputs

    def names(self) -> list[str]:
        return ["", *self.studio.models.generators()]

    def search(self, search: str, model: str, favourites_only: bool, page: float, request: gr.Request) -> tuple:
        """Return (thumbnails with prompts, range shown, ids)."""
        offset = (max(1, int(page or 1)) - 1) * PAGE_SIZE
        matches = self.matching_images(search, model, favourites_only, request, limit=PAGE_SIZE, offset=offset)
        ids = [saved.id for saved in matches]
        thumbnails = [(self.studio.store.thumbnail(saved.id), saved.request.prompt) for saved in matches]
        status = f"{offset + 1} to {offset + len(ids)}, the latest first" if ids else "No images found."
        return thumbnails, status, ids

    def matching_images(
        self, search: str, model: str, favourites_only: bool, request: gr.Request, **page: int
    ) -> list[SavedImage]:
        """Return the images that match the fields; `page`: limit and offset."""
        return self.studio.store.images(search, model, favourites_only, owner=self.context.owner(request), **page)

    def owned_image(self, id: str, request: gr.Request) -> SavedImage:
        """Raises:
        KeyError: this owner has no such image.
        """
        image = self.studio.store.image(id)
        if image.owner != self.context.owner(request):
            raise KeyError(f"there is no image {id!r}")
        return image

    def selected(self, selected_ids: list[str], request: gr.Request) -> SavedImage:
        if not selected_ids:
            raise ValueError("no image is selected: click on one")
        return self.owned_image(selected_ids[-1], request)

    def select(self, page_ids: list[str], selected_ids: list[str], event: gr.SelectData, request: gr.Request) -> tuple:
        """Return (image, its settings, the pair to compare, selected ids)."""
        with user_errors():
            image = self.owned_image(page_ids[event.index], request)
            selected_ids = [*selected_ids[-1:], image.id] if image.id not in selected_ids[-1:] else selected_ids
            images = [enlarge(self.studio.store.read_image(id)) for id in selected_ids]
        return images[-1], details(image), tuple(images) if len(images) == 2 else None, selected_ids

    def toggle_favourite(self, selected_ids: list[str], request: gr.Request) -> dict:
        with user_errors():
            image = self.selected(selected_ids, request)
            self.studio.store.set_favourite(image.id, not image.favourite)
            return details(self.owned_image(image.id, request))

    def delete(self, selected_ids: list[str], request: gr.Request) -> tuple:
        with user_errors():
            self.studio.store.delete(self.selected(selected_ids, request).id)
        return None, None, selected_ids[:-1]

    def download_zip(self, search: str, model: str, favourites_only: bool, request: gr.Request) -> dict:
        with user_errors():
            ids = [
                saved.id for saved in self.matching_images(search, model, favourites_only, request, limit=MAX_ZIPPED)
            ]
            if not ids:
                raise ValueError("no images match: change the search")
            file = self.studio.store.zip_images(ids)
        return gr.update(value=str(file), visible=True)

    def confidence_maps(self, selected_ids: list[str], request: gr.Request) -> list[tuple]:
        """Return maps of entropy, probability and origin of each cell over the image."""
        with user_errors():
            saved = self.selected(selected_ids, request)
            if saved.tokens is None:
                raise ValueError("this image has no tokens: select one of another model")
            image = self.studio.store.read_image(saved.id)
            with self.studio.model(saved.request.model) as pipe:
                entropy, probability = pipe.certainty(saved.request, torch.tensor(saved.tokens))
        unsure = [(entropy / entropy.max().clamp(min=1e-6)).numpy(), (1 - probability).numpy()]
        maps = [
            (overlay(image, darkness(share)), name)
            for share, name in zip(unsure, ("entropy", "probability"), strict=True)
        ]
        return maps + ([(origin_overlay(image, saved.origins), "guesses")] if saved.origins else [])


def details(image: SavedImage) -> dict:
    error = {"fault": image.fault} if image.fault else {}
    return {"file": f"{image.id}.png", "favourite": image.favourite, **error, **display_settings(image.request)}


def darkness(share: np.ndarray) -> np.ndarray:
    """Convert shares [h, w] in [0, 1] to black with that alpha, [h, w, 4] uint8."""
    tint = np.zeros((*share.shape, 4), np.uint8)
    tint[..., 3] = (220 * share).round()
    return tint
