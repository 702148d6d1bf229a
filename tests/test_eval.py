"""The measures, on cases whose answer is known, and `argen eval held-out` on the shipped sample."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from argen.cli.main import main
from argen.data import emoji
from argen.eval import prompts, reconstruction, retrieval

SAMPLE = Path(emoji.__file__).parent / "sample"


def test_recall():
    similarity = torch.eye(10)
    assert retrieval.recall(similarity) == {"recall@1 of 100": 1.0, "recall@5 of 100": 1.0}
    similarity[0, 1:4] = 2.0  # the first caption finds three wrong pictures before its own
    similarity[1, 2:8] = 2.0  # the second six
    assert retrieval.recall(similarity) == pytest.approx({"recall@1 of 100": 0.8, "recall@5 of 100": 0.9})


def test_ranks_are_among_a_hundred():
    class Table:
        """Prompts and pictures are vectors of their own: `embed` looks them up."""

        def embed(self, texts, images):
            return torch.tensor([[1.0, float(text)] for text in texts]), torch.tensor([[0.0, 1.0]] * len(images))

    others = [str(value) for value in range(200)]
    ranks = prompts.ranks(Table(), ["50", "99.5", "-1"], [Image.new("RGB", (1, 1))] * 3, others)
    assert ranks.tolist() == [50, 1, 100]  # 51 to 99 are above 50; nothing of the first 99 above 99.5; all above -1


def test_reconstruction_scores():
    class Grey:
        """A tokenizer that knows two codes and gives back mid-grey."""

        device, dtype = torch.device("cpu"), torch.float32
        config = FrozenDict(n_embed=4)

        def encode(self, pixels):
            return torch.tensor([[0, 1]]).expand(len(pixels), -1)

        def decode(self, ids):
            return torch.full((len(ids), 3, 8, 8), 0.5)

    black = torch.zeros(70, 8, 8, 3, dtype=torch.uint8)
    scores = reconstruction.evaluate(Grey(), black)
    assert scores["codes_used"] == 0.5
    assert scores["psnr"] == pytest.approx(6.0206, abs=1e-3)  # -10 log10(1/4)


@pytest.mark.parametrize(
    ("model", "name", "least"),
    [("argen/emoji-clip", "recall@5 of 100", 0.6), ("argen/emoji-vitvqgan", "psnr", 18.0)],
)
def test_score(capsys, model, name, least):
    assert main(["eval", "held-out", "--model", model, "--data", str(SAMPLE), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[name] >= least


def test_score_of_the_generator_draws_a_grid(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(prompts, "COMMON", ["a red apple", "a pizza", "a rocket"])
    grid = tmp_path / "grid.png"
    assert (
        main(["eval", "held-out", "--data", str(SAMPLE), "--num-candidates", "2", "--grid", str(grid), "--json"]) == 0
    )
    scores = json.loads(capsys.readouterr().out)
    assert scores["common prompts, best of 2: mean rank of 100"] < 30
    assert Image.open(grid).width == 8 * 264
