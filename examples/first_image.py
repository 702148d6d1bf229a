"""Generate an image with previews, and reproduce it from its own file."""

from pathlib import Path

import argen
from argen.metadata import read_request, save_images
from argen.request import Request

pipe = argen.load("argen/emoji-parti")
request = Request("a red apple, noto style", seed=2)

for number, job in enumerate(pipe.run(request, every=16)):  # a job a step; the last one has the images
    print(f"{job.progress:.0%} after {job.forward_passes} forward passes")
    pipe.images(job.tokens)[0].save(f"step-{number}.png")  # undecided cells are grey
save_images(list(zip(job.images, job.requests, strict=True)), [Path("apple.png")])

restored = read_request(Path("apple.png"))  # the file says how it was made
*_, second = pipe.run(restored)
same = second.images[0].tobytes() == job.images[0].tobytes()
print(f"made again from its file: {'the same image' if same else 'another image'}")
