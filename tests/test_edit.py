"""Pictures redrawn in part: by a mask, from a grid in the request, from where a job was left."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw

from argen.pipelines.editing import masked_cells
from argen.request import Request
from argen.ui.tabs import edit


@pytest.fixture(scope="module")
def generated(pipe):
    """A finished job of one pizza."""
    *_, job = pipe.run(Request("a pizza", seed=3))
    return job


def half(size: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (size, size), 0)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def test_only_the_cells_under_the_mask_are_written_anew(pipe, generated):
    image = generated.images[0]
    kept = pipe.encode_images(torch.tensor([[[0.5]]]).expand(1, 3, 256, 256))
    assert kept.shape == (1, 8, 8)
    mask = half(256, (0, 128, 255, 255))
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    out = pipe.edit("a robot", image, mask, num_images_per_prompt=2, generator=generators)
    before = generated.tokens[0]  # the very tokens that it was made of, not what encoding makes of it
    grids = out.tokens.unflatten(1, (8, 8))
    assert torch.equal(grids[:, :4], before[:4].expand(2, -1, -1))
    assert not torch.equal(grids[0, 4:], before[4:])
    assert not torch.equal(grids[0, 4:], grids[1, 4:])
    again = pipe.edit("a robot", image, mask, generator=[torch.Generator().manual_seed(1)])
    assert torch.equal(again.tokens[0], out.tokens[1])


def from_image(image: Image.Image, side: int = 256) -> torch.Tensor:
    from tokenizers_img.pixels import from_pil

    return from_pil(image, side)


def test_what_is_transparent_is_drawn_around_an_image(pipe, generated):
    """A picture on a larger canvas: only what it does not cover is written."""
    canvas = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    canvas.paste(generated.images[0].resize((128, 128)), (64, 64))
    out = pipe.edit("a pizza", canvas, generator=[torch.Generator().manual_seed(0)])
    before = pipe.encode_images(from_image(canvas)[None])[0]
    grid = out.tokens[0].unflatten(0, (8, 8))
    assert torch.equal(grid[2:6, 2:6], before[2:6, 2:6])
    assert not torch.equal(grid, before)


def test_a_request_holds_the_grid_it_goes_on_from(pipe, generated):
    grid = generated.tokens[0].clone()
    grid[3:5, 2:6] = -1
    request = Request("a pizza", seed=9, num_images=2, tokens=tuple(map(tuple, grid.tolist())))
    assert Request.from_dict(request.to_dict()) == request
    *_, job = pipe.run(request)
    assert torch.equal(job.tokens[:, :3], generated.tokens[:, :3].expand(2, -1, -1))
    assert (job.tokens >= 0).all()
    *_, alone = pipe.run(job.requests[1])
    assert torch.equal(alone.tokens[0], job.tokens[1])
    for wrong, message in (
        ([[1, -1], [2]], "tokens are no grid"),
        ([[1, -2]], "something else than ids"),
        ([[1, 2]], "nothing to write"),
        ([[True, -1]], "something else than ids"),
    ):
        with pytest.raises(ValueError, match=message):
            Request("a pizza", tokens=tuple(map(tuple, wrong)))
    with pytest.raises(ValueError, match="tokens are 1 x 2: expected 8 x 8"):
        next(pipe.run(Request("a pizza", tokens=((1, -1),))))
    with pytest.raises(ValueError, match="token 99999 does not exist: expected ids below 4096"):
        next(pipe.run(Request("a pizza", tokens=((99999, *[-1] * 7), *[(-1,) * 8] * 7))))


def test_a_job_that_was_left_is_gone_on_with(pipe, generated):
    request = replace(generated.request, sampler="sequential")
    job = next(job for job in pipe.run(request) if job.decided == 20)
    *_, rest = pipe.run(request, tokens=job.resume_state)
    assert rest.forward_passes == 44
    assert torch.equal(rest.tokens, generated.tokens)


def test_the_network_tells_how_sure_it_is(pipe, generated):
    entropy, token_probs = pipe.certainty(generated.request, generated.tokens[0])
    assert entropy.shape == token_probs.shape == (8, 8)
    assert entropy.min() >= 0
    assert (token_probs > 0).all()
    assert token_probs.max() <= 1 + 1e-6
    swapped = generated.tokens[0].clone()
    swapped[4, 4] = (swapped[4, 4] + 7) % 4096
    assert pipe.certainty(generated.request, swapped)[1][4, 4] < token_probs[4, 4]
    with pytest.raises(ValueError, match="not finished"):
        pipe.certainty(generated.request, torch.full((8, 8), -1))


def test_bad_masks_are_refused(pipe, generated):
    image = generated.images[0]
    for mask, message in (
        (Image.new("L", (64, 64), 255), "the mask is 64 x 64 and the image 256 x 256"),
        (Image.new("L", (256, 256), 0), "nothing to inpaint"),
        (None, "nothing to inpaint"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.edit("a pizza", image, mask)


def test_latents_are_edited_too_and_ordered_tokens_are_not():
    from argen.hub.loading import load

    xar = load("argen/emoji-xar")
    xar.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (128, 128), (200, 30, 30))
    before = xar.encode_images(from_image(image, 128)[None])
    out = xar.edit(
        "a red heart",
        image,
        half(128, (0, 0, 63, 127)),
        generator=[torch.Generator().manual_seed(0)],
        output_type="latent",
    )
    torch.testing.assert_close(out.tokens[..., 4:], before[..., 4:])
    assert not torch.allclose(out.tokens[..., :4], before[..., :4], atol=0.1)
    with pytest.raises(ValueError, match="no place in the image"):
        load("argen/emoji-flextok-ar").edit("a heart", image, half(128, (0, 0, 63, 63)))
    with pytest.raises(ValueError, match="writes numbers, not tokens"):
        next(xar.run(Request("a heart", model="argen/emoji-xar", tokens=((1, -1),))))


def test_a_grid_is_moved_to_make_room():
    grid = torch.arange(12).view(1, 3, 4)
    assert edit.shift_tokens(grid, "right", 1)[0].tolist() == [[1, 2, 3, -1], [5, 6, 7, -1], [9, 10, 11, -1]]
    assert edit.shift_tokens(grid, "left", 2)[0].tolist() == [[-1, -1, 0, 1], [-1, -1, 4, 5], [-1, -1, 8, 9]]
    assert edit.shift_tokens(grid, "top", 1)[0].tolist() == [[-1] * 4, [0, 1, 2, 3], [4, 5, 6, 7]]
    assert edit.shift_tokens(grid, "bottom", 2)[0].tolist() == [[8, 9, 10, 11], [-1] * 4, [-1] * 4]
    with pytest.raises(ValueError, match="3 cells are all of the image"):
        edit.shift_tokens(grid, "top", 3)


def test_what_the_buttons_of_the_page_leave_to_write(pipe, generated):
    """Painted cells, or all others; a share of the least certain; all but the first; room at a side."""
    layer = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    layer.paste((255, 0, 0, 255), (0, 0, 64, 32))
    canvas = {"background": generated.images[0].resize((256, 256)).convert("RGBA"), "layers": [layer]}
    request, before = replace(generated.request, seed=0), generated.tokens[0]
    tokens = pipe.read_tokens(edit.background_image(canvas), tuple(map(tuple, before.tolist())))
    assert torch.equal(tokens[0], before)  # the stored grid, though the image was enlarged
    painted = torch.zeros(8, 8, dtype=torch.bool)
    painted[:1, :2] = True
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[7, 6:] = True
    first = torch.arange(64).view(8, 8) < 16
    for change, how, empty in (
        (edit.inpaint, (False, ""), painted),
        (edit.inpaint, (True, ""), ~painted),
        (edit.inpaint, (False, "1 x 2, 8 x 7-8"), painted | corner),
        (edit.keep_prefix, (0.25,), ~first),
        (edit.outpaint, ("right", 3), torch.arange(8).expand(8, 8) >= 5),
    ):
        grid = change(pipe, request, tokens, canvas, *how)
        assert torch.equal(grid[0] < 0, empty)
    assert torch.equal(edit.keep_prefix(pipe, request, tokens, canvas, 0.25)[0][first], before[first])
    assert int((edit.variation(pipe, request, tokens, canvas, 0.25) < 0).sum()) == 16
    with pytest.raises(ValueError, match="there is no image"):
        edit.inpaint(pipe, request, tokens, None, False, "")
    with pytest.raises(ValueError, match="nothing to inpaint"):
        edit.inpaint(pipe, request, tokens, canvas | {"layers": []}, False, "")
    for wrong in ("9 x 1", "5-3 x 1", "all", "0 x 2"):
        with pytest.raises(ValueError, match=f"'{wrong}' names no cells: expected ROWS x COLUMNS of 8 x 8"):
            edit.inpaint(pipe, request, tokens, canvas, False, wrong)
    wide = {"background": generated.images[0].resize((256, 128)).convert("RGBA"), "layers": []}
    grid = edit.inpaint(pipe, request, tokens, wide, False, "4-5 x 1")  # of the square that it is padded to
    assert (grid[0] < 0).nonzero().tolist() == [[3, 0], [4, 0]]


def test_a_grid_is_the_source_only_of_the_image_that_it_shows(pipe, generated):
    """The stored tokens count for the image as it was, not for one that was painted on since, nor for another."""
    image, grid = generated.images[0], tuple(map(tuple, generated.tokens[0].tolist()))
    assert torch.equal(pipe.read_tokens(image), generated.tokens)  # it carries its grid
    changed = image.copy()
    ImageDraw.Draw(changed).rectangle((96, 96, 127, 127), fill="blue")
    assert not torch.equal(pipe.read_tokens(changed), generated.tokens)
    assert torch.equal(pipe.read_tokens(changed), pipe.encode_images(from_image(changed)[None]))
    other = Image.new("RGB", (256, 256), "green")
    assert not torch.equal(pipe.read_tokens(other, grid), generated.tokens)
    assert not torch.equal(pipe.read_tokens(image, ((1, 2), (3, 4))), torch.tensor([[[1, 2], [3, 4]]]))


def test_an_image_is_turned_before_its_mask_is_laid_on(pipe):
    stored = Image.new("RGB", (96, 128), "white")
    exif = stored.getexif()
    exif[0x0112] = 6  # its camera was turned: seen as 128 x 96
    file = io.BytesIO()
    stored.save(file, "JPEG", exif=exif)
    seen = Image.open(file)
    mask = Image.new("L", (128, 96), 0)
    mask.paste(255, (64, 0, 128, 96))
    cells = masked_cells(seen, mask, (8, 8))
    assert cells.sum() == 24
    assert cells[1:7, 4:].all()
    white = Image.new("RGBA", (128, 96), (255, 255, 255, 0))  # white, and seen only where it is opaque
    white.paste((255, 255, 255, 255), (64, 0, 128, 96))
    assert torch.equal(masked_cells(seen, white, (8, 8)), cells)
    with pytest.raises(ValueError, match="the mask is 96 x 128 and the image 128 x 96"):
        masked_cells(seen, mask.transpose(Image.Transpose.ROTATE_90), (8, 8))
