"""Comparing runs that the real recorders made, without training: MLflow on sqlite, real spans."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lightning_ray.cli import run as typed
from lightning_ray.evaluation import HeldoutReport, paired_difference
from lightning_ray.jobs.compose import compose_config, resolved
from lightning_ray.jobs.sweep_folder import SweepFolder
from lightning_ray.policies import PolicyRegistry, PolicyVersion
from lightning_ray.spans import SpanKind, span, to_batch
from lightning_ray.spans.segment import SUFFIX, SegmentWriter
from lightning_ray.tracking import RunSummary, TrackedRun, TrackingConfig, write_summary
from lightning_ray.tracking.mlflow_run import RunStatus
from lightning_ray.training import RunFolder, TrainConfig

BEFORE = [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
Recorded = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root whose sqlite store is made once."""
    return tmp_path_factory.mktemp("outputs")


def record(
    root: Path,
    *overrides: str,
    after: Sequence[float] | None = None,
    steps: int = 3,
    status: RunStatus | None = RunStatus.FINISHED,
    spans: bool = True,
    left_out: int = 0,
) -> RunFolder:
    """A run as a job leaves it: `after` is what each held-out task scored in the end."""
    words = ["experiment=calculator", f"training.steps={steps}", *overrides]
    folder = RunFolder.create(root, "calc", words)
    tracked = TrackedRun.start(TrackingConfig(), root, folder.run_id)
    folder.write_facts({"mlflow_run_id": tracked.run_id})
    tracked.log_config(resolved(compose_config("train", TrainConfig, words)))
    rows: list[dict[str, Any]] = []
    _score(tracked, rows, BEFORE, 0)
    history = []
    for step in range(1, steps + 1):
        metrics = {"reward": step / 10, "seconds": 2.0, "sampled_tokens": 100.0}
        metrics |= {"staleness": float(step == 2), "left_out": float(left_out)}
        tracked.log_metrics(metrics, step)
        history.append({"step": float(step), **metrics})
    if after is not None:
        report = _score(tracked, rows, after, steps)
        extra = {
            "history": history,
            "heldout_before_report": asdict(_report(BEFORE, 0)),
            "heldout_after_report": asdict(report),
        }
        means = [report.measures["reward"].mean for report in (_report(BEFORE, 0), report)]
        summary = RunSummary(*means, steps, 2.0 * steps, 300, tracked.run_id, "model", extra)
        write_summary(folder.summary, summary)
    if spans:
        folder.spans.mkdir()
        writer = SegmentWriter(folder.spans / f"00000001{SUFFIX}")
        writer.append(to_batch(rows))
        writer.close()
    if status is not None:
        tracked.finish(status)
    return folder


def _report(scores: Sequence[float], step: int) -> HeldoutReport:
    rewards = [{"reward": score} for score in scores]
    return HeldoutReport.from_rewards(rewards, policy="policy", version=step, step=step)


def _score(
    tracked: TrackedRun, rows: list[dict[str, Any]], scores: Sequence[float], step: int
) -> HeldoutReport:
    for place, score in enumerate(scores):
        name = f"heldout-s{step:05d}-abcdef-{place:04d}-00"
        where = {"run_id": "r", "rollout_id": name, "attempt_id": f"{name}/1"}
        attributes = {"task_id": f"t{place}"}
        rows.append(span(SpanKind.RESOURCE, "attempt", **where, attributes=attributes))
        rows.append(span(SpanKind.REWARD, "reward", **where, value=score))
    report = _report(scores, step)
    tracked.log_metrics({"heldout_reward": report.measures["reward"].mean}, step)
    return report


def compare(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict, str]:
    """Types the command; returns its JSON and what it printed."""
    path = root / "compared.json"
    assert typed(["compare", *words, f"output_dir={root}", "--json", str(path)]) == 0
    return json.loads(path.read_text()), capsys.readouterr().out


@pytest.fixture(scope="module")
def pair(root: Path) -> tuple[RunFolder, RunFolder]:
    """Two finished runs; the second has a larger group, and solves more."""
    one = record(root, "algorithm.group_size=4", after=[1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    two = record(root, "algorithm.group_size=8", after=[1.0, 1.0, 1.0, 1.0, 0.0, 1.0], left_out=2)
    return one, two


def test_only_what_differs_is_listed_and_figures_stand_side_by_side(
    root: Path, pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    found, out = compare(root, capsys, pair[0].run_id, str(pair[1].path))
    assert found["configuration"] == {"algorithm.group_size": ["4", "8"]}
    figures = found["figures"]
    assert figures["train_seconds"] == [6.0, 6.0] and figures["tokens_sampled"] == [300.0, 300.0]
    assert figures["left_out"] == [0.0, 6.0] and figures["staleness_max"] == [1.0, 1.0]
    assert figures["reward_best"] == [0.3, 0.3] and figures["reward_best_step"] == [3.0, 3.0]
    assert re.search(r"^algorithm\.group_size +4 +8$", out, re.M)
    assert re.search(r"^rollouts left out +0 +6$", out, re.M)
    assert "group_size=8" in out and "lacks" not in out


def test_the_difference_is_paired_by_task(
    root: Path, pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    found, out = compare(root, capsys, *(folder.run_id for folder in pair))
    (reward,) = found["heldout"]
    assert reward["before"] == pytest.approx([2 / 6] * 2)
    assert reward["after"] == pytest.approx([3 / 6, 5 / 6])
    one, two = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    difference = reward["difference"][1]
    assert difference["paired"] and difference["unmatched"] == 0
    assert difference["interval"] == asdict(paired_difference(one, two))
    assert reward["gain"][1]["interval"] == asdict(paired_difference(BEFORE, two))
    assert "B - A: +0.333" in out and "paired over 6 tasks" in out


def test_the_picture_is_named_and_logged_to_both_runs(
    root: Path, pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    found, out = compare(root, capsys, *(folder.run_id for folder in pair))
    picture = Path(found["picture"])
    assert str(picture) in out and picture.read_bytes().startswith(b"\x89PNG")
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    for run in found["runs"]:
        assert client.get_run(run["mlflow_run_id"]).info.status == "FINISHED"
        place = f"comparisons/{picture.stem}"
        files = {file.path for file in client.list_artifacts(run["mlflow_run_id"], place)}
        assert files == {f"{place}/{picture.name}", f"{place}/comparison.json"}


def test_a_comparison_may_leave_the_runs_alone(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [record(root, f"seed={seed}", after=BEFORE) for seed in (1, 2)]
    picture = root / "mine.svg"
    words = [*(folder.run_id for folder in folders), "--no-log", "--picture", str(picture)]
    found, _ = compare(root, capsys, *words)
    assert "<svg" in picture.read_text()
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    for run in found["runs"]:
        assert client.list_artifacts(run["mlflow_run_id"], "comparisons") == []


def test_without_the_spans_the_difference_is_unpaired_and_says_so(
    root: Path, pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    bare = record(root, after=[0.0] * 6, spans=False)
    found, out = compare(root, capsys, pair[1].run_id, bare.run_id)
    difference = found["heldout"][0]["difference"][1]
    assert not difference["paired"]
    # Further from 1 than either interval alone: 5 of 6 against none of 6.
    assert difference["interval"]["low"] < -5 / 6 < difference["interval"]["high"] < 0
    assert "unpaired" in out and "its tasks cannot be paired" in out
    assert "the interval excludes 0" in out


def test_held_out_files_that_differ_are_not_paired_by_their_ids(
    root: Path, pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    other = record(root, "evaluation.tasks=other.jsonl", after=[0.0] * 6)
    found, _ = compare(root, capsys, pair[1].run_id, other.run_id)
    assert not found["heldout"][0]["difference"][1]["paired"]


def test_a_run_that_still_goes_is_compared_as_far_as_it_came(
    root: Path, pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    going = record(root, status=None, steps=2)
    found, out = compare(root, capsys, pair[0].run_id, going.run_id)
    assert found["runs"][1]["status"] == "RUNNING"
    assert found["runs"][1]["missing"] == ["a held-out score after training", "summary.json"]
    assert "lacks a held-out score after training, summary.json" in out
    assert found["figures"]["steps"] == [3.0, 2.0]
    reward = found["heldout"][0]
    assert reward["before"] == pytest.approx([2 / 6] * 2) and reward["after"][1] is None
    # Of a run without a summary the interval comes from its spans.
    assert reward["before_interval"][1]["n"] == 6 and reward["difference"][1] is None


def test_a_run_that_never_began_and_one_whose_store_is_gone(
    root: Path,
    tmp_path: Path,
    pair: tuple[RunFolder, RunFolder],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stillborn = RunFolder.create(root, "calc", ["experiment=calculator", "seed=9"])
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("overrides.json", "run.json", "summary.json"):
        (moved / name).write_text((pair[1].path / name).read_text())
    found, out = compare(root, capsys, pair[0].run_id, stillborn.run_id, str(moved))
    assert [run["status"] for run in found["runs"]] == ["FINISHED", "NOT RECORDED", "FINISHED"]
    assert found["figures"]["steps"] == [3.0, 0.0, 3.0]
    assert found["heldout"][0]["after"] == [pytest.approx(3 / 6), None, pytest.approx(5 / 6)]
    assert "the settings that were not typed" in out
    assert not (tmp_path / "mlflow.db").exists()


def test_versions_are_followed_to_their_base(
    root: Path, pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = pair[0].facts()["mlflow_run_id"]
    registry = PolicyRegistry(f"sqlite:///{root}/mlflow.db", "policy", run_id)
    for number, parent in ((0, None), (1, 0), (2, 1), (3, 1)):
        registry.register(
            PolicyVersion(
                *("policy", number, pair[0].version("policy", number), run_id, parent, number),
                created_by="grpo",
                base_model="embedded",
            )
        )
    found, out = compare(root, capsys, *(folder.run_id for folder in pair))
    (lineage,) = found["runs"][0]["versions"]
    assert lineage["chain"] == [0, 1, 3] and lineage["count"] == 4
    assert "versions of A: policy: 0 (embedded) > 1 > 3; 4 in all" in out
    assert found["runs"][1]["versions"] == []


def test_a_sweep_stands_for_its_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    children = [["experiment=calculator", f"seed={seed}"] for seed in (0, 1, 2)]
    sweep = SweepFolder.create(root, "calc", ["seed=0,1,2"], children)
    for child in sweep.children[:2]:
        child.run = record(root, f"seed={child.number - 1}", after=BEFORE).run_id
    sweep.save()
    found, out = compare(root, capsys, sweep.sweep_id)
    assert [run["typed"] for run in found["runs"]] == ["seed=0", "seed=1"]
    assert "child 3 (seed=2) has not begun" in out
    parent = TrackedRun.start(TrackingConfig(), root, sweep.sweep_id)
    parent.finish()
    assert compare(root, capsys, parent.run_id)[0]["runs"] == found["runs"]


def test_a_run_is_found_by_its_mlflow_id_and_counts_once(
    root: Path, pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = pair[0].facts()["mlflow_run_id"]
    found, _ = compare(root, capsys, run_id, pair[0].run_id, pair[1].run_id)
    assert [run["run"] for run in found["runs"]] == [pair[0].run_id, pair[1].run_id]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["yesterday", "today"], "no run 'yesterday'"),
        ([], "name the runs"),
        (["--table"], "compare knows no --table"),
        (["seed=1"], "compare knows no setting seed=1"),
        (["--json"], "--json FILE"),
    ],
)
def test_a_mistake_is_one_line(
    root: Path,
    pair: tuple[RunFolder, RunFolder],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    named: str,
) -> None:
    assert typed(["compare", f"output_dir={root}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and named in line


def test_an_unknown_run_is_refused_with_those_there_are(
    root: Path, pair: tuple[RunFolder, RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    newest = record(root, after=BEFORE).run_id
    assert typed(["compare", newest, "yesterday", f"output_dir={root}"]) == 2
    assert newest in capsys.readouterr().err
    assert typed(["compare", newest, f"output_dir={root}"]) == 2
    assert "1 run to compare, and it takes two" in capsys.readouterr().err
    assert typed(["compare", "a", "b", f"output_dir={root}/nowhere"]) == 2
    assert "there are none there" in capsys.readouterr().err
    assert not (root / "nowhere").exists()
