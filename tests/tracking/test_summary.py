import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.errors import UserError
from lightning_ray.tracking.summary import RunSummary, read_summary, write_json, write_summary

SUMMARY = RunSummary(
    heldout_before=0.25,
    heldout_after=0.875,
    steps=40,
    train_seconds=312.5,
    tokens_generated=51_200,
    mlflow_run_id="0a1b",
    model_dir="outputs/run/model",
    extra={"seed": 3, "heldout_tasks": 64},
)


def test_a_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "summary.json"
    write_summary(path, SUMMARY)
    assert read_summary(path) == SUMMARY
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(path.read_text())["seed"] == 3


def test_a_summary_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, SUMMARY)
    with pytest.raises(TypeError):
        write_json(path, {"steps": object()})
    assert read_summary(path) == SUMMARY
    assert list(tmp_path.iterdir()) == [path]


def test_an_extra_figure_cannot_replace_one_of_the_summary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps"):
        write_summary(tmp_path / "s.json", RunSummary(0, 0, 1, 0, 0, "", "", {"steps": 2}))
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "not finished"), ("{", "not JSON"), ("[1]", "lacks"), ("{}", "lacks")],
)
def test_what_is_no_summary_is_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    path = tmp_path / "summary.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=reason):
        read_summary(path)


@given(st.lists(st.floats()))
def test_what_is_written_is_json_for_any_reader(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    path = tmp_path_factory.mktemp("json") / "v.json"
    write_json(path, {"values": values})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(path.read_text(), parse_constant=refuse)["values"]
    assert found == [value if math.isfinite(value) else None for value in values]
