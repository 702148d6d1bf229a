"""The tab *Tokenizers*: the reconstructions of an image by several tokenizers, side by side, and its tokens."""

import math

import gradio as gr
from PIL import Image
from torch import Tensor

from argen.eval.metrics import psnr, ssim
from argen.eval.reconstruction import decoded, encoded
from argen.hub.cards import all_cards, ids
from argen.ui.context import PREVIEW_SIDE, AppContext, enlarge, user_errors
from argen.ui.inputs import image_input
from argen.ui.widgets import image_gallery
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.pixels import from_pil, to_pil

LATENT_BITS = 16  # of a continuous number, as in bfloat16


TITLE = "Tokenizers"


def layout(context: AppContext, tab: gr.Tab) -> None:
    Tokenizers(context)


class Tokenizers:
    """The tab, laid out inside the current `gr.Blocks`. The shipped tokenizers are selected at first."""

    def __init__(self, context: AppContext):
        self.models = context.studio.models
        names = ids("tokenizer")
        shipped = [name for name in names if all_cards()[name].ships]
        image = self.comparison(names, shipped)
        with gr.Accordion("Tokens", open=False), gr.Row():
            self.tokens(image, names, shipped[0])

    def comparison(self, names: list[str], shipped: list[str]) -> gr.Image:
        """Lay out the reconstructions side by side -> the input image."""
        with gr.Row():
            with gr.Column(scale=2):
                image = image_input(label="Input image", elem_id="lab-picture")
                selected = gr.Dropdown(names, value=shipped, multiselect=True, label="Tokenizers")
                reconstruct = gr.Button("Reconstruct", variant="primary", elem_id="lab-go")
            with gr.Column(scale=3):
                gallery = image_gallery("Reconstructions", columns=3, elem_id="lab-pictures")
                scores = gr.Dataframe(
                    headers=["tokenizer", "PSNR (dB)", "SSIM", "size", "bits"], label="Measured", elem_id="lab-scores"
                )
        reconstruct.click(self.compare, [image, selected], [gallery, scores])
        return image

    def tokens(self, image: gr.Image, names: list[str], first: str) -> None:
        """Lay out the tokens of one tokenizer, and the image that the first of them decode to."""
        with gr.Column(scale=2):
            name = gr.Dropdown(names, value=first, label="Tokenizer", elem_id="lab-tokenizer")
            count = gr.Slider(1, 2, value=1, step=1, visible=False, label="Tokens to decode", elem_id="lab-count")
            show = gr.Button("Show the tokens", elem_id="lab-look")
            pixels = gr.Image(label="Decoded", height=PREVIEW_SIDE, elem_id="lab-decoded")
            caption = gr.Markdown(elem_id="lab-caption")
        with gr.Column(scale=3):
            numbers = gr.Dataframe(label="Ids, or the mean square of the latents", elem_id="lab-tokens")
        every = gr.State(None)  # a tokenizer that is newly chosen decodes all its tokens
        outputs = [pixels, caption, numbers, count]
        gr.on([show.click, name.change], self.decode, [image, name, every], outputs)
        count.release(self.decode, [image, name, count], outputs)

    def compare(self, image: Image.Image | None, selected: list[str]) -> tuple[list[tuple], list[list]]:
        with user_errors():
            if image is None:
                raise ValueError("there is no image: drop a file, or paste one")
            if not selected:
                raise ValueError("no tokenizer is chosen: choose one or more")
            size = self.models(selected[0], kind="tokenizer").config.image_size
            images, rows = [(preview(from_pil(image, size)), "the image")], []
            for name in selected:
                tokenizer = self.models(name, kind="tokenizer")
                pixels, scores = reconstructed(tokenizer, *encoded(tokenizer, image))
                images.append((preview(pixels), name))
                rows.append([name, *scores])
            return images, rows

    def decode(self, image: Image.Image | None, name: str, count: int | None) -> tuple:
        with user_errors():
            if image is None:
                raise ValueError("there is no image: drop a file, or paste one")
            tokenizer = self.models(name, kind="tokenizer")
            max_tokens = tokenizer.config.get("tokens")
            count = None if max_tokens is None else max(1, min(max_tokens, int(count or max_tokens)))
            pixels, tokens = encoded(tokenizer, image)
            decoded_pixels, (decibels, _, size, bits) = reconstructed(tokenizer, pixels, tokens[:, :count])
        caption = f"{size}, {bits:,} bits, PSNR {decibels} dB"
        slider = gr.update(visible=max_tokens is not None, maximum=max_tokens or 2, value=count or 1)
        return preview(decoded_pixels), caption, table(tokens[0]), slider


def reconstructed(tokenizer: ImageTokenizer, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, tuple]:
    """Return the reconstruction [3, S, S] of `pixels` from their tokens, see `encoded`; and PSNR in dB, SSIM, size as text, bits."""
    output = decoded(tokenizer, tokens, pixels)
    if tokens.ndim == 2:
        bits, size = tokens.shape[1] * math.log2(tokenizer.config.n_embed), f"{tokens.shape[1]} tokens"
    else:
        bits, size = LATENT_BITS * tokens[0].numel(), f"{tokens[0].numel():,} numbers"
    scores = round(psnr(output, pixels).item(), 1), round(ssim(output, pixels).item(), 2)
    return output[0].cpu(), (*scores, size, round(bits))


def table(tokens: Tensor) -> list[list]:
    """Arrange ids [N] in rows: of a square by its side, else of 8; of latents [C, h, w] the mean squares."""
    if tokens.ndim == 3:
        return [[round(value, 2) for value in row] for row in tokens.square().mean(dim=0).tolist()]
    side = math.isqrt(len(tokens))
    width = side if side * side == len(tokens) else 8
    return [row.tolist() for row in tokens.split(width)]


def preview(pixels: Tensor) -> Image.Image:
    """Convert pixels [3, H, W] in [0, 1] to an enlarged image."""
    return enlarge(to_pil(pixels))
