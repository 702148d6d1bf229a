"""Generate images of known things, and let the judge recognise them."""

import numpy as np
import torch
from PIL import Image

import argen
from argen.eval.judge import evaluate, read_prompts, subject

truths = [truth for truth in read_prompts() if truth.kind == "single"][:6]
pipe, judge = argen.load("argen/emoji-parti"), argen.load("argen/emoji-judge")
images = [
    pipe(truth.prompt, generator=torch.Generator().manual_seed(seed)).images[0] for seed, truth in enumerate(truths)
]
arrays = [np.array(image) for image in images]

names, _ = judge.answers(torch.stack([subject(array) for array in arrays]), 5)
for truth, likely in zip(truths, names, strict=True):
    print(f"{truth.prompt}: the judge sees {', '.join(likely)}")

scores = evaluate(judge, arrays, truths)  # `argen eval emoji` does this on all 500 prompts
for question, score in scores.items():
    print(f"{question}: {score['value']:.2f} (on real images {score['judge_on_real']:.2f})")

sheet = Image.new("RGB", (256 * len(images), 256))
for column, image in enumerate(images):
    sheet.paste(image, (256 * column, 0))
sheet.save("judged.png")
