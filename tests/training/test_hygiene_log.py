"""hygiene.json: what the checks of every step found, through stops and resumes."""

import json
from pathlib import Path

import pytest

from lightning_ray.training.hygiene_log import HygieneLog, totals
from lightning_ray.trajectories import Check, HygieneConfig, HygienePolicy, HygieneReport
from lightning_ray.trajectories.hygiene_report import Finding, unit

CONFIG = HygieneConfig(offenders=3, duplicate_tasks=HygienePolicy.off)


def report(*attempts: str) -> HygieneReport:
    made = HygieneReport.empty(CONFIG)
    made.add([Finding(Check.CUT_TRACES, f"cut {a}", (a,)) for a in attempts], CONFIG.offenders)
    return made


def test_the_first_offenders_and_the_totals_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "hygiene.json"
    log = HygieneLog(path, CONFIG)
    history: list[dict[str, float]] = []
    news = []
    for step, found in enumerate([report(), report("a/1", "b/1"), report("c/1", "d/1")], start=1):
        news.append(log.add(step, {"policy": found}, history))
        history.append({"step": step, **found.metrics()})
    assert news == [[], ["hygiene: cut_traces (warn), the first in a/1: cut a/1"], []]
    kept = json.loads(path.read_text())
    assert [
        (e["step"], e["attempt_ids"], e["reason"]) for e in kept["offenders"]["cut_traces"]
    ] == [
        (2, ["a/1"], "cut a/1"),
        (2, ["b/1"], "cut b/1"),
        (3, ["c/1"], "cut c/1"),
    ]
    assert (
        kept["totals"]
        == totals(history)
        == {
            check.value: 4 * (check is Check.CUT_TRACES)
            for check in Check
            if check is not Check.DUPLICATE_TASKS
        }
    )
    assert kept["policies"]["duplicate_tasks"] == "off"


def test_a_step_that_is_trained_again_is_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "hygiene.json"
    first = HygieneLog(path, CONFIG)
    history = [{"step": 1.0, **report("a/1").metrics()}]
    first.add(1, {"policy": report("a/1")}, [])
    first.add(2, {"policy": report("lost/1")}, history)
    resumed = HygieneLog(path, CONFIG)
    resumed.restore(1)
    assert resumed.add(2, {"policy": report("again/1")}, history) == []
    kept = json.loads(path.read_text())
    named = [entry["attempt_ids"] for entry in kept["offenders"]["cut_traces"]]
    assert named == [["a/1"], ["again/1"]] and kept["totals"]["cut_traces"] == 2


def test_findings_of_several_policies_are_summed_and_say_whose_they_are(tmp_path: Path) -> None:
    path = tmp_path / "hygiene.json"
    log = HygieneLog(path, CONFIG)
    log.add(1, {"planner": report("a/1"), "solver": report("a/1", "b/1")}, [])
    kept = json.loads(path.read_text())
    named = [(entry["policy"], entry["attempt_ids"]) for entry in kept["offenders"]["cut_traces"]]
    assert named == [("planner", ["a/1"]), ("solver", ["a/1"]), ("solver", ["b/1"])]
    assert kept["totals"]["cut_traces"] == 3


def test_a_run_of_an_earlier_version_has_nothing_to_restore(tmp_path: Path) -> None:
    HygieneLog(tmp_path / "hygiene.json", CONFIG).restore(3)
    assert totals([{"step": 1.0, "reward": 0.5}]) == {}


@pytest.mark.parametrize(
    ("check", "one", "two"),
    [
        (Check.CUT_TRACES, "attempt", "attempts"),
        (Check.CONSTANT_BATCHES, "batch", "batches"),
        (Check.DUPLICATE_SPANS, "span", "spans"),
    ],
)
def test_what_is_counted_in_words(check: Check, one: str, two: str) -> None:
    assert (unit(check, 1), unit(check, 2)) == (one, two)
