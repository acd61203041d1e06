import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.tracking import RecordedRun, differing, figures, plot_learning_curves
from lightning_ray.tracking.comparing import FIGURES, heldout, heldout_measures, shown

CONFIGS = st.lists(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from("12"), max_size=4), max_size=4
)


def recorded(*history: dict[str, float], **config: str) -> RecordedRun:
    return RecordedRun("run", None, None, "", "RUNNING", config=config, history=list(history))


@given(CONFIGS)
def test_a_key_is_listed_exactly_when_two_runs_disagree_on_it(configs: list[dict]) -> None:
    rows = differing(configs)
    for key in {key for config in configs for key in config}:
        values = [config.get(key) for config in configs]
        assert (key in rows) == any(value != values[0] for value in values)
        assert rows.get(key, values) == values


def test_a_run_without_steps_has_no_figure_that_looks_like_one() -> None:
    found = figures(recorded({"step": 0, "heldout_reward": 0.5}))
    assert set(found) == set(FIGURES)
    assert found.pop("steps") == 0 and set(found.values()) == {None}
    assert shown(None) == shown(math.nan) == "-"


def test_figures_are_over_the_steps_trained() -> None:
    rows = [
        {"step": 0, "heldout_reward": 0.1},
        {"step": 1, "seconds": 1.0, "reward": 0.2, "staleness": 0.0, "sampled_tokens": 5.0},
        # Nothing came to a reward in this one.
        {"step": 2, "seconds": 3.0, "staleness": 2.0, "left_out": 4.0},
        {"step": 3, "seconds": 2.0, "reward": 0.8, "staleness": 1.0, "sampled_tokens": 7.0},
        {"step": 4, "seconds": 2.0, "reward": 0.8, "staleness": 1.0, "heldout_reward": 0.6},
    ]
    found = figures(recorded(*rows, **{"training.steps": "9"}))
    assert (found["steps"], found["steps_planned"]) == (4, 9)
    assert (found["reward_first"], found["reward_last"]) == (0.2, 0.8)
    assert (found["reward_best"], found["reward_best_step"]) == (0.8, 3)
    assert (found["train_seconds"], found["seconds_per_step"]) == (8.0, 2.0)
    assert (found["staleness_mean"], found["staleness_max"]) == (1.0, 2.0)
    assert (found["tokens_sampled"], found["left_out"]) == (12.0, 4.0)


def test_held_out_scores_before_and_after_are_told_apart_by_their_step() -> None:
    before = recorded({"step": 0, "heldout_exact": 0.1, "heldout_reward": 0.2})
    after = recorded(*before.history, {"step": 5, "heldout_reward": 0.4, "seconds": 1.0})
    assert heldout(before, "reward", after=False) == 0.2
    assert heldout(before, "reward", after=True) is None
    assert heldout(after, "reward", after=True) == 0.4
    assert heldout_measures([before, after]) == ["reward", "exact"]
    assert after.curve() == [
        {"step": 0, "heldout": 0.2},
        {"step": 5, "heldout": 0.4, "seconds": 1.0},
    ]


# Of the drawing: a file that another test left open is noticed at any time.
@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")
def test_many_runs_with_long_names_and_one_of_a_single_step_fit_a_picture(tmp_path: Path) -> None:
    curves = {
        f"learning_rate=1e-0{at}, group_size={at}": [
            {"step": 0, "heldout": 0.1},
            *({"step": step, "reward": 0.1 * at} for step in range(1, at + 1)),
            {"step": at, "heldout": 0.2},
        ]
        for at in range(1, 9)
    }
    plot_learning_curves(curves, tmp_path / "many.png", title="a sweep")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")
