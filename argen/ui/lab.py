"""The tab that takes a picture apart: what every tokenizer keeps of it, side by side, and its tokens."""

import math
from collections.abc import Callable, Sequence

import gradio as gr
from PIL import Image
from torch import Tensor

from argen.eval.metrics import psnr, ssim
from argen.eval.reconstruction import Tokenizer, decoded, encoded
from argen.ui.inputs import image_input
from argen.ui.jobs import PREVIEW_SIDE, enlarge, user_errors
from tokenizers_img.pixels import from_pil, to_pil

LATENT_BITS = 16  # of a continuous number, as bfloat16 holds it


def tab(tokenizers: Callable[[str], Tokenizer], ids: Sequence[str], shipped: Sequence[str]) -> None:
    """Lay the tab out inside the current `gr.Blocks`.

    Args:
        tokenizers: gives one by its id.
        ids: of those to choose from.
        shipped: those of them that are chosen at first.
    """

    def compare(image: Image.Image | None, chosen: list[str]) -> tuple[list[tuple], list[list]]:
        with user_errors():
            if image is None:
                raise ValueError("there is no picture: drop a file, or paste one")
            if not chosen:
                raise ValueError("no tokenizer is chosen: choose one or more")
            images = [(shown(from_pil(image, tokenizers(chosen[0]).config.image_size)), "the picture")]
            rows = []
            for name in chosen:
                tokenizer = tokenizers(name)
                made, scores = reconstructed(tokenizer, *encoded(tokenizer, image))
                images.append((shown(made), name))
                rows.append([name, *scores])
            return images, rows

    def look(image: Image.Image | None, name: str, count: int | None) -> tuple:
        with user_errors():
            if image is None:
                raise ValueError("there is no picture: drop a file, or paste one")
            tokenizer = tokenizers(name)
            most = tokenizer.config.get("tokens")
            count = None if most is None else max(1, min(most, int(count or most)))
            pixels, tokens = encoded(tokenizer, image)
            made, (decibels, _, what, bits) = reconstructed(tokenizer, pixels, tokens[:, :count])
            slider = gr.update(visible=most is not None, maximum=most or 2, value=count or 1)
            return (
                shown(made),
                f"{what}, {bits:,} bits, PSNR {decibels} dB",
                table(tokens[0]),
                slider,
            )

    with gr.Row():
        with gr.Column(scale=2):
            image = image_input(label="Input image", elem_id="lab-picture")
            chosen = gr.Dropdown(list(ids), value=list(shipped), multiselect=True, label="Tokenizers")
            go = gr.Button("Reconstruct", variant="primary", elem_id="lab-go")
        with gr.Column(scale=3):
            gallery = gr.Gallery(label="Reconstructions", columns=3, object_fit="contain", elem_id="lab-pictures")
            scores = gr.Dataframe(
                headers=["tokenizer", "PSNR (dB)", "SSIM", "size", "bits"], label="Measured", elem_id="lab-scores"
            )
    with gr.Accordion("Tokens", open=False), gr.Row():
        with gr.Column(scale=2):
            name = gr.Dropdown(list(ids), value=shipped[0], label="Tokenizer", elem_id="lab-tokenizer")
            count = gr.Slider(1, 2, value=1, step=1, visible=False, label="Tokens to decode", elem_id="lab-count")
            show = gr.Button("Show the tokens", elem_id="lab-look")
            made = gr.Image(label="Decoded", height=PREVIEW_SIDE, elem_id="lab-decoded")
            caption = gr.Markdown(elem_id="lab-caption")
        with gr.Column(scale=3):
            numbers = gr.Dataframe(label="Ids, or the mean square of the latents", elem_id="lab-tokens")
    go.click(compare, [image, chosen], [gallery, scores])
    whole = gr.State(None)  # a tokenizer that is newly looked at decodes all its tokens
    gr.on([show.click, name.change], look, [image, name, whole], [made, caption, numbers, count])
    count.release(look, [image, name, count], [made, caption, numbers, count])


def reconstructed(tokenizer: Tokenizer, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, tuple]:
    """What comes back [3, S, S] of the tokens of `pixels`, see `encoded`; PSNR in dB, SSIM, the tokens in words, and bits."""
    made = decoded(tokenizer, tokens, pixels)
    if tokens.ndim == 2:
        bits, what = tokens.shape[1] * math.log2(tokenizer.config.n_embed), f"{tokens.shape[1]} tokens"
    else:
        bits, what = LATENT_BITS * tokens[0].numel(), f"{tokens[0].numel():,} numbers"
    scores = round(psnr(made, pixels).item(), 1), round(ssim(made, pixels).item(), 2)
    return made[0].cpu(), (*scores, what, round(bits))


def table(tokens: Tensor) -> list[list]:
    """Ids [N] of a square in its rows, others in rows of 8; of latents [C, h, w] the mean squares."""
    if tokens.ndim == 3:
        return [[round(value, 2) for value in row] for row in tokens.square().mean(dim=0).tolist()]
    side = math.isqrt(len(tokens))
    width = side if side * side == len(tokens) else 8
    return [row.tolist() for row in tokens.split(width)]


def shown(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> a picture to look at."""
    return enlarge(to_pil(pixels))
