"""A grid of runs: what is done is kept, and told of when all of it is."""

import json

import pytest

from benchmarks import grid, report
from benchmarks.grid import Grid
from benchmarks.report import Claim

CLAIM = Claim("improved_b", "held-out score", 1.0)


def _grid(common=("steps=1",)):
    return Grid(
        name="tried",
        about="A grid of the test.",
        common=common,
        cells={"a": ["algorithm=a"], "b": ["algorithm=b"]},
        claims=[CLAIM],
        results=lambda done: [
            report.compared(
                CLAIM,
                [ran["heldout"] for ran in done["b"]],
                [ran["heldout_before"] for ran in done["b"]],
            )
        ],
    )


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The settings of each run that was started; what trains is not what is tested here."""
    started = []

    def ran(settings):
        started.append(list(settings))
        if len(started) == 3:
            raise RuntimeError("our run failed")
        return {
            "settings": list(settings),
            "heldout_before": 0.25,
            "heldout": 0.5,
            "rewards": [0.2, 0.4, 0.6],
            "step_s": 1.0,
        }

    monkeypatch.setattr(grid, "one_run", ran)
    monkeypatch.setattr(grid, "FOLDER", tmp_path / "work")
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return started


def test_a_grid_goes_on_after_a_run_that_failed(runs, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="our run failed"):
        _grid().run([], 2, False)
    assert not (tmp_path / "results" / "tried.json").exists()
    _grid().run([], 2, False)
    assert [one[1:] for one in runs] == [
        ["algorithm=a", "training.seed=0"],
        ["algorithm=b", "training.seed=0"],
        ["algorithm=a", "training.seed=1"],
        ["algorithm=a", "training.seed=1"],
        ["algorithm=b", "training.seed=1"],
    ]
    (result,) = json.loads((tmp_path / "results" / "tried.json").read_text())
    assert result["claim"] == "improved_b"
    assert result["ratio"] == 2.0
    assert "| `b` | 0.250 | 0.500, 0.500 | 0.500 | 0.20 | 0.40 |" in capsys.readouterr().out


def test_a_run_with_other_settings_is_run_again(runs, tmp_path, capsys):
    _grid().run(["a"], 1, False)
    _grid(("steps=2",)).run(["a"], 1, False)
    assert [one[0] for one in runs] == ["steps=1", "steps=2"]
    assert "not done with 1 seeds are b" in capsys.readouterr().out
    assert not (tmp_path / "results" / "tried.json").exists()
