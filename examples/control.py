"""Generate an image that follows the edges of another one."""

import torch
from PIL import Image

import argen
from argen.models.annotators import annotate, as_image

source = argen.load("argen/emoji-parti")("a red apple", generator=torch.Generator().manual_seed(0)).images[0]
edges = annotate(source, "canny")
as_image(edges).save("edges.png")

pipe = argen.load("argen/emoji-control")
sheet = Image.new("RGB", (4 * 256, 256))
sheet.paste(source, (0, 0))
for column, strength in enumerate((0.0, 0.5, 1.0), start=1):
    output = pipe(
        "a green apple, flat style",
        control_image=source,
        control_type="canny",
        control_strength=strength,
        generator=torch.Generator().manual_seed(3),
    )
    sheet.paste(output.images[0], (256 * column, 0))
sheet.save("control.png")
print("control.png: the source; then without, with half and with the whole control")
