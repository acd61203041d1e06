from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from lightning_ray.tracking.curve import plot_learning_curve, plot_learning_curves

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)


def history(shift: float = 0.0) -> list[dict[str, float]]:
    rows = [{"step": at, "reward": at / 10 + shift, "exact": at / 20} for at in range(1, 11)]
    return [{"step": 0, "heldout": 0.2}, *rows, {"step": 10, "heldout": 0.8}]


def pixels(path: Path) -> np.ndarray:
    """uint8, height x width x 3."""
    return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)


def count(path: Path, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels(path) - np.asarray(colour)).max(axis=-1) <= 2).sum())


def test_the_curve_of_a_run_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "curve.png"
    plot_learning_curve(history(), path, title="GRPO")
    assert count(path, BLUE) > 500, "the line of the reward"
    without = tmp_path / "without.png"
    plot_learning_curve([row for row in history() if "exact" not in row], without)
    assert count(without, BLUE) < 50, "nothing to draw the reward from"


def test_held_out_scores_are_marked(tmp_path: Path) -> None:
    marked, unmarked = tmp_path / "a.svg", tmp_path / "b.svg"
    plot_learning_curve(history(), marked)
    plot_learning_curve([row for row in history() if "heldout" not in row], unmarked)
    # matplotlib draws text as paths, and says the text in a comment.
    for value in ("0.20", "0.80", "held-out tasks"):
        assert f"<!-- {value} -->" in marked.read_text()
        assert f"<!-- {value} -->" not in unmarked.read_text() or value in ("0.20", "0.80")
    assert marked.read_text().count("<!-- 0.80 -->") > unmarked.read_text().count("<!-- 0.80 -->")


def test_seeds_are_drawn_apart(tmp_path: Path) -> None:
    path = tmp_path / "seeds.png"
    plot_learning_curves({"seed 0": history(), "seed 1": history(0.05)}, path, title="GRPO")
    assert count(path, BLUE) > 500 and count(path, ORANGE) > 500
    text = tmp_path / "seeds.svg"
    plot_learning_curves({"seed 0": history(), "seed 1": history(0.05)}, text)
    for shown in ("seed 0", "seed 1", "reward", "exact", "held-out, before and after"):
        assert f"<!-- {shown} -->" in text.read_text()
    assert "<!-- format -->" not in text.read_text(), "no run has that measure"


@pytest.mark.parametrize("rows", [[], [{"step": 0, "heldout": 0.5}], [{"step": 1, "reward": 0.5}]])
def test_a_run_that_has_hardly_begun_can_be_drawn(
    tmp_path: Path, rows: list[dict[str, float]]
) -> None:
    plot_learning_curve(rows, tmp_path / "one.png")
    plot_learning_curves({"seed 0": rows}, tmp_path / "many.png")
    assert pixels(tmp_path / "one.png").size and pixels(tmp_path / "many.png").size


def test_drawing_leaves_no_figure_behind(tmp_path: Path) -> None:
    plot_learning_curve(history(), tmp_path / "curve.png")
    import matplotlib.pyplot

    assert matplotlib.pyplot.get_fignums() == []
