import json
from pathlib import Path

from lightning_ray.evaluation import HeldoutReport, completion_quality, write_report


def test_a_report_measures_each_reward_and_counts_faults_apart(tmp_path: Path) -> None:
    rewards = [{"exact": 1.0, "format": 1.0}, {"exact": 0.0, "format": 1.0}, None, {"format": 0.25}]
    report = HeldoutReport.from_rewards(rewards, policy="policy", version=4, step=40)
    assert (report.n, report.failed) == (3, 1)
    assert report.measures["exact"] == completion_quality([1.0, 0.0])
    assert report.measures["format"].mean == 0.75
    write_report(tmp_path / "heldout.json", report)
    written = json.loads((tmp_path / "heldout.json").read_text())
    assert written["measures"]["exact"]["n"] == 2
    assert written["failed"] == 1 and written["version"] == 4


def test_a_report_of_faults_alone_has_no_measure(tmp_path: Path) -> None:
    report = HeldoutReport.from_rewards([None, None], policy="policy", version=0, step=0)
    assert (report.n, report.failed, dict(report.measures)) == (0, 2, {})


def test_a_single_reward_is_written_with_open_bounds(tmp_path: Path) -> None:
    report = HeldoutReport.from_rewards([{"score": 0.3}], policy="policy", version=0, step=0)
    write_report(tmp_path / "heldout.json", report)
    measure = json.loads((tmp_path / "heldout.json").read_text())["measures"]["score"]
    assert measure == {"mean": 0.3, "low": None, "high": None, "n": 1}
