"""Edit an image as a grid of tokens: cells with -1 are generated, all others are kept."""

import torch
from PIL import Image

import argen

pipe = argen.load("argen/emoji-parti")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


taxi = pipe("a taxi", generator=seeded(0))
grid = taxi.tokens.view(1, 8, 8)

# 1. Inpainting by cells: the lower half is redrawn, for another prompt.
lower = grid.clone()
lower[:, 4:] = -1
half = pipe("a fire engine", tokens=lower.flatten(1), generator=seeded(1))

# 2. Inpainting by pixels: what is white in a mask is redrawn.
mask = Image.new("L", (256, 256), 0)
mask.paste(255, (128, 0, 256, 256))
right = pipe.edit("a taxi", taxi.images[0], mask, generator=seeded(2))

# 3. A prefix is kept, and the rest is drawn three times.
prefix = taxi.tokens.clone()
prefix[:, 24:] = -1
others = pipe("a taxi", tokens=prefix.expand(3, -1), num_images_per_prompt=3, generator=[seeded(i) for i in range(3)])

sheet = Image.new("RGB", (6 * 256, 256))
for column, image in enumerate([taxi.images[0], half.images[0], right.images[0], *others.images]):
    sheet.paste(image, (256 * column, 0))
sheet.save("edits.png")
print("edits.png: the taxi; below another prompt; the right half redrawn; three images with the same beginning")
