"""How closely control images are followed: the measures on pictures of known overlap, and the command."""

import numpy as np
import pytest
from PIL import Image

from argen.cli.main import main
from argen.data import emoji, scenes
from argen.data.scenes import PALETTE, segments
from argen.eval import control

SAMPLE = emoji.Path(emoji.__file__).parent / "sample"


def square(x: int, y: int, side: int = 40) -> np.ndarray:
    image = np.full((128, 128, 3), 255, np.uint8)
    image[y : y + side, x : x + side] = 0
    return image


def test_edges_count_as_found_within_two_pixels():
    lines = np.zeros((3, 64, 64), np.uint8)
    lines[0, 20], lines[1, 22], lines[2, 23] = 255, 255, 255
    assert control.edge_f1(lines[0], lines[0], tolerance=0) == 1
    assert control.edge_f1(lines[1], lines[0]) == 1
    assert control.edge_f1(lines[1], lines[0], tolerance=0) == 0
    assert control.edge_f1(lines[2], lines[0]) == 0
    both = lines[0] | lines[2]
    assert control.edge_f1(both, lines[0]) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    nothing = np.zeros((64, 64), np.uint8)
    assert control.edge_f1(nothing, nothing) == 1
    assert control.edge_f1(nothing, lines[0]) == 0


def test_segments_are_compared_object_by_object():
    target = np.minimum(square(10, 40), square(80, 40))
    boxes = [(10, 40, 50, 80), (80, 40, 120, 80)]
    assert control.segment_iou(target, target, boxes) == 1
    assert control.segment_iou(square(10, 40), target, boxes) == 0.5
    shifted = np.minimum(square(10, 60), square(80, 40))  # half of the first is where it should be: 1/3
    assert control.segment_iou(shifted, target, boxes) == pytest.approx((1 / 3 + 1) / 2)
    assert control.segment_iou(square(10, 40) * 0 + 255, target, boxes) == 0


def test_the_map_of_segments_has_a_colour_for_each_object():
    image = np.minimum(square(10, 40), square(80, 40))
    segment_map = segments(image, [(10, 40, 50, 80), (80, 40, 120, 80)])
    assert tuple(segment_map[50, 20]) == PALETTE[0]
    assert tuple(segment_map[50, 90]) == PALETTE[1]
    assert tuple(segment_map[5, 5]) == (0, 0, 0)


def test_what_follows_scores_better_than_what_does_not(tmp_path):
    scenes.build(SAMPLE, tmp_path / "scenes", num=10)
    dataset = control.Scenes(next((tmp_path / "scenes" / "data").glob("train-*")))
    real, empty_grid = [dataset[i] for i in range(4)], [np.full((128, 128, 3), 255, np.uint8)] * 4
    for kind, name in (("canny", "edge F1"), ("seg", "segment mIoU")):
        scores = control.evaluate(dataset, kind, real, empty_grid)
        assert scores[name] == {"value": 1.0, "n": 4}
        assert scores[f"{name}, without control"]["value"] < 0.1
        assert np.asarray(dataset.control(0, kind)).shape == (128, 128, 3)


def test_other_tables_are_refused(tmp_path, capsys):
    Image.fromarray(square(1, 1)).save(tmp_path / "a.png")
    table = next((SAMPLE / "data").glob("train-*"))
    assert main(["eval", "control", "--data", str(table), "--out", str(tmp_path / "out")]) == 2
    assert "expected a table made by `argen data scenes`" in capsys.readouterr().err
