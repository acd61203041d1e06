"""What is said of the tokens that a learner would get."""

from typing import Any

import pytest
from doctor_support import asked, call, ended, evidence, only

from lightning_ray.doctor.finding import Finding, Level
from lightning_ray.doctor.learning import check_learning
from lightning_ray.spans import SpanStatus


def findings(*calls: dict[str, Any], **more: Any) -> list[Finding]:
    attempts = dict.fromkeys(row["attempt_id"] for row in calls)
    return check_learning(evidence([*calls, *(ended(a) for a in attempts)], **more))


def test_exact_calls_are_counted() -> None:
    found = only(findings(call("a/1"), call("b/1")), "tokens").found
    assert found.startswith("exact: 2 calls") and found.endswith("6 tokens in, 4 sampled")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"version": None}, "has no version"),
        ({"token_ids": None}, "has no tokens"),
        ({"logprobs": None}, "has no logprobs"),
        ({"continues": "gone", "prefix_tokens": 2}, "which is not in the attempt"),
    ],
)
def test_a_call_that_cannot_be_learnt_from_is_missing(broken: dict, reason: str) -> None:
    finding = only(findings(call("a/1"), call("b/1", **broken)), "tokens")
    assert finding.level is Level.MISSING and reason in finding.found


def test_requests_without_a_sampled_token_teach_nothing() -> None:
    seen = evidence([ended()], [asked(path="/v1/embeddings")])
    assert only(check_learning(seen), "tokens").level is Level.MISSING
    assert check_learning(evidence([ended()])) == []


def test_turns_that_repeat_what_was_said_are_one_sequence() -> None:
    first = call("a/1", [1, 2], [3, 4])
    second = call("a/1", [1, 2, 3, 4, 9], [5])
    finding = only(findings(first, second), "turns")
    assert finding.level is Level.OK and finding.found.startswith("1 of 1 later calls continue")


def test_a_rewritten_context_is_a_warning() -> None:
    finding = only(findings(call("a/1", [1, 2], [3]), call("a/1", [1, 7], [3])), "turns")
    assert finding.level is Level.WARNING and "rewrites its context" in finding.found


def test_a_template_that_changes_the_answers_is_told_from_an_agent_that_does() -> None:
    calls = call("a/1", [1, 2], [3]), call("a/1", [1, 2, 8, 9], [5])
    history = [
        asked("a/1", messages=("q",), replies=(False,)),
        asked("a/1", messages=("q", "r", "q2"), replies=(False, True, False)),
    ]
    finding = only(findings(*calls, exchanges=history), "turns")
    assert "though 1 repeat the earlier messages" in finding.found
    dropped = [history[0], asked("a/1", messages=("other", "r", "q2"), replies=(False, True, True))]
    assert "rewrites" in only(findings(*calls, exchanges=dropped), "turns").found


@pytest.mark.parametrize(
    ("first", "second", "level", "words"),
    [
        ({"temperature": 0}, {"temperature": 0}, Level.MISSING, "2 of 2 calls use temperature 0"),
        ({"temperature": 0}, {}, Level.WARNING, "1 of 2 calls use temperature 0"),
        ({"seed": 7}, {"seed": 7}, Level.MISSING, "2 of 2 calls set a seed"),
        ({"seed": 7}, {"temperature": 0}, Level.MISSING, "and 1 of 2 calls set a seed"),
        ({"temperature": 0.7}, {}, Level.WARNING, "temperature 0.7 in 1 of 2 calls"),
        ({"top_p": 0.9}, {}, Level.WARNING, "cut the choice of tokens in 1 of 2"),
        ({"top_k": 20}, {}, Level.WARNING, "cut the choice of tokens in 1 of 2"),
        ({"n": 4}, {}, Level.WARNING, "several at a time"),
        ({"top_p": 1.0, "top_k": 0}, {"top_k": -1}, Level.OK, "temperature 1"),
    ],
)
def test_sampling_that_hurts(first: dict, second: dict, level: Level, words: str) -> None:
    finding = only(findings(call("a/1", sampling=first), call("b/1", sampling=second)), "sampling")
    assert finding.level is level and words in finding.found


def test_two_runs_of_a_task_that_say_the_same_have_no_contrast() -> None:
    same = only(findings(call("a/1", sampled=[4]), call("b/1", sampled=[4])), "contrast")
    assert same.level is Level.WARNING and "0 of 1 tasks differ" in same.found
    other = only(findings(call("a/1", sampled=[4]), call("b/1", sampled=[6])), "contrast")
    assert other.level is Level.OK and "1 of 1 tasks differ" in other.found
    once = only(findings(call("a/1")), "contrast")
    assert once.level is Level.WARNING and "samples=2" in once.change


def test_answers_that_a_limit_cuts() -> None:
    cut = [call("a/1", finish_reason="length"), call("b/1")]
    finding = only(findings(*cut), "answer length")
    assert finding.level is Level.WARNING and "(50%), at max_tokens 20" in finding.found
    full = only(findings(*cut, max_model_len=5), "answer length")
    assert "inference.max_model_len=10" in full.change
    few = [call(f"{n}/1") for n in range(5)] + [call("z/1", finish_reason="length")]
    assert only(findings(*few), "answer length").level is Level.OK


def test_answers_that_nobody_read_to_the_end() -> None:
    finding = only(findings(call(), call(status=SpanStatus.ABORTED)), "abandoned calls")
    assert finding.level is Level.WARNING and "1 of 2 answers" in finding.found
