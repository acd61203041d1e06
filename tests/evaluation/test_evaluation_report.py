"""The two files of an evaluation: JSON in its documented layout, and a page that stands alone."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from evaluation_support import attempt, call, make, table

from lightning_ray.evaluation import (
    EvaluationConfig,
    GateConfig,
    Side,
    evaluate,
    read_outcomes,
    write_evaluation,
)
from lightning_ray.spans import SpanKind

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """The tags and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    def side(label: str, values: list[float]) -> Side:
        rows = [make(SpanKind.TOOL_CALL, "undo", "0/1"), call("0/1", prompt_tokens=10)]
        for number, value in enumerate(values):
            task = {"question": f"{HOSTILE} {number}"}
            rewards = {"reward": value, f"<b>{number % 2}": 1.0}
            rows += attempt(f"{number}/1", f"t{number}", rewards, output=HOSTILE, task=task)
        rows += attempt("x/1", "t9", status="failed")
        return Side(label, read_outcomes(table(rows), rollback_words=["undo"]))

    prices = {"policy": {"input_per_million": 1.0, "output_per_million": 2.0}}
    config = EvaluationConfig(prices=prices)
    ours, theirs = side("version 2", [1.0, 0.3, 1.0, 0.0]), side(HOSTILE, [0.0, 0.3, 1.0, 1.0])
    evaluation = evaluate(ours, theirs, config, GateConfig(min_completion=0.9))
    about = {"run": "calculator", "tasks": 4}
    folder = tmp_path_factory.mktemp("evaluation")
    paths = write_evaluation(folder, evaluation, ours, theirs, config, about)
    assert [path.name for path in paths] == ["evaluation.json", "evaluation.html"]
    return json.loads(paths[0].read_text()), paths[1].read_text()


def test_the_json_has_the_documented_layout(written: tuple[dict[str, Any], str]) -> None:
    found, _ = written
    assert list(found) == [
        "layout",
        "about",
        "subject",
        "against",
        "comparison",
        "gates",
        "passed",
    ]
    assert found["layout"] == 1 and found["about"] == {"run": "calculator", "tasks": 4}
    subject = found["subject"]
    assert (subject["label"], subject["rollouts"], subject["failed"]) == ("version 2", 5, 1)
    assert list(subject["measures"]) == [
        "completion_quality",
        "tool_discipline",
        "rollback_frequency",
        "override_rate",
        "cost_per_resolved",
    ]
    quality = subject["measures"]["completion_quality"]
    assert quality["value"] == pytest.approx(2.3 / 4) and quality["n"] == 4
    assert quality["low"] < quality["value"] < quality["high"]
    override = subject["measures"]["override_rate"]
    assert (override["value"], override["low"], override["n"]) == (None, None, 0)
    assert override["not_measurable"].startswith("no feedback spans")
    # 10 tokens in at 1 USD a million and 2 out at 2, for two resolved.
    assert subject["measures"]["cost_per_resolved"]["value"] == pytest.approx(14e-6 / 2)
    comparison = found["comparison"]
    assert [comparison[key] for key in ("wins", "ties", "losses")] == [1, 2, 1]
    assert comparison["difference"]["mean"] == 0 and comparison["p_value"] == 1
    assert comparison["tasks"][1] == {"task_id": "t1", "reward": 0.3, "against": 0.3}
    (gate,) = found["gates"]
    assert (gate["name"], gate["limit"], gate["passed"]) == ("min_completion", 0.9, False)
    assert found["passed"] is False


def test_the_page_stands_alone_and_runs_nothing(written: tuple[dict[str, Any], str]) -> None:
    _, html = written
    page = Page(html)
    assert "script" not in page.tags and "onerror" not in re.sub(r"&lt;.*?&gt;", "", html)
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    assert "&lt;script&gt;alert(1)" in html
    assert "default-src 'none'" in html


def test_the_page_shows_what_lost_most_first(written: tuple[dict[str, Any], str]) -> None:
    _, html = written
    assert re.findall(r"<summary>(t\d)", html) == ["t3", "t1", "t2", "t0"]
    assert "not measurable: no feedback spans" in html


def test_one_rollout_and_no_reward_make_a_page_too(tmp_path: Path) -> None:
    for rows in (attempt("a/1", "t", {"reward": 0.5}), [call("a/1")]):
        side = Side("few $ _", read_outcomes(table(rows)))
        config = EvaluationConfig()
        evaluation = evaluate(side, side, config, GateConfig())
        written_, page = write_evaluation(tmp_path, evaluation, side, side, config, {})
        assert json.loads(written_.read_text())["passed"] is True
        assert page.read_text().startswith("<!doctype html>")
        assert all(abs(value) < float("inf") for value in evaluation.metrics().values())
