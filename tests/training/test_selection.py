"""Which samples are learnt from: chosen by reward and SQL, exact, without held-out tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.agents import Task
from lightning_ray.errors import UserError
from lightning_ray.spans import SpanKind, span, to_batch
from lightning_ray.spans.segment import SegmentWriter
from lightning_ray.training.finetuning import FinetuneConfig, check_finetune
from lightning_ray.training.order import SampleOrder
from lightning_ray.training.selection import Samples, choose_samples
from lightning_ray.trajectories import SEQUENCE_SCHEMA

Choose = Callable[..., Samples]


def attempt(
    name: str,
    sampled: list[int],
    *,
    prompt: tuple[int, ...] = (7, 8),
    task: dict[str, Any] | None = None,
    role: str = "small",
    **rewards: float,
) -> list[dict[str, Any]]:
    """The spans of one attempt with one call."""
    place: dict[str, Any] = {"run_id": "r", "rollout_id": name, "attempt_id": f"{name}/1"}
    attributes = {"task_id": f"task-{name}", "task": task or {"q": name}, "status": "succeeded"}
    rows = [
        span(
            SpanKind.MODEL_CALL,
            "/v1/chat/completions",
            **place,
            policy="policy",
            version=1,
            role=role,
            token_ids=[*prompt, *sampled],
            logprobs=[-0.5] * len(sampled),
        ),
        span(SpanKind.RESOURCE, "attempt", **place, attributes=attributes),
        *(span(SpanKind.REWARD, key, **place, value=value) for key, value in rewards.items()),
    ]
    return [{**row, "sequence": sequence} for sequence, row in enumerate(rows)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, *attempts: list[dict[str, Any]], model: Path | None = None) -> Path:
        folder = tmp_path / "outputs" / name
        (folder / "spans").mkdir(parents=True)
        (folder / "overrides.json").write_text("[]")
        (folder / "run.json").write_text(json.dumps({"base_model": str(model)} if model else {}))
        if attempts:
            writer = SegmentWriter(folder / "spans" / "00000001.arrows")
            writer.append(to_batch([row for rows in attempts for row in rows]))
            writer.close()
        return folder

    return write


@pytest.fixture
def choose(tmp_path: Path, base: Path) -> Choose:
    def with_settings(*runs: str, heldout: tuple[Task, ...] = (), **settings: Any) -> Samples:
        config = FinetuneConfig(output_dir=str(tmp_path / "outputs"), name="finetune")
        config.samples.runs = list(runs)
        for key, value in settings.items():
            setattr(config.samples, key, value)
        check_finetune(config)
        return choose_samples(config, base, heldout)

    return with_settings


def rows_of(samples: Samples) -> list[tuple[str, list[int]]]:
    return [
        (
            row["rollout_id"],
            [t for t, m in zip(row["token_ids"], row["trainable"], strict=True) if m],
        )
        for row in samples.table.to_pylist()
    ]


def test_a_reward_chooses_and_the_tokens_are_those_that_were_sampled(run, choose) -> None:
    run("one", attempt("a", [1, 2], reward=1.0), attempt("b", [3], reward=0.9))
    samples = choose("one", min_reward=1.0)
    (row,) = samples.table.to_pylist()
    assert samples.table.schema.equals(SEQUENCE_SCHEMA)
    assert row["token_ids"] == [7, 8, 1, 2] and row["trainable"] == [False, False, True, True]
    assert row["advantages"] == [0, 0, 1, 1] and row["logprobs"] == [0, 0, -0.5, -0.5]
    assert (samples.counts.attempts, samples.counts.chosen, samples.counts.tokens) == (2, 1, 2)


def test_sql_sees_the_attempts_with_their_rewards_and_all_spans(run, choose) -> None:
    run(
        "one",
        attempt("a", [1], reward=1.0, exact=0.0),
        attempt("b", [2], reward=1.0, exact=1.0),
        attempt("c", [3], reward=0.0, exact=1.0),
    )
    assert rows_of(choose("one", where="exact = 1 -- the right ones")) == [("b", [2]), ("c", [3])]
    assert rows_of(choose("one", where="exact = 1 OR calls > 9", min_reward=1.0)) == [("b", [2])]
    assert rows_of(choose("one", where="task->>'q' = 'c' AND status = 'succeeded'")) == [("c", [3])]
    sql = "WITH good AS (SELECT * FROM spans WHERE name = 'exact' AND value = 1) "
    sql += "SELECT attempt_id FROM good JOIN attempts USING (attempt_id) WHERE reward = 0;"
    assert rows_of(choose("one", sql=sql)) == [("c", [3])]


def test_the_last_reward_of_a_name_counts(run, choose) -> None:
    rows = attempt("a", [1], reward=0.0)
    later = span(SpanKind.REWARD, "reward", run_id="r", rollout_id="a", attempt_id="a/1", value=1.0)
    run("one", [*rows, {**later, "sequence": 9}], attempt("b", [2], reward=0.0))
    assert rows_of(choose("one", min_reward=1.0)) == [("a", [1])]


def test_held_out_tasks_are_never_learnt(run, choose) -> None:
    run(
        "one",
        attempt("a", [1], reward=1.0, task={"q": "x", "y": 2, "id": "other"}),
        attempt("heldout-s00000-0", [2], reward=1.0),
        attempt("c", [3], reward=1.0),
    )
    heldout = (Task("h1", {"y": 2, "q": "x"}),)
    samples = choose("one", min_reward=1.0, heldout=heldout)
    assert rows_of(samples) == [("c", [3])] and samples.counts.heldout == 2
    with pytest.raises(
        UserError, match="nothing to learn from: of 1 attempts chosen, 1 are at held"
    ):
        choose("one", sql="SELECT 'heldout-s00000-0/1' AS attempt_id")


def test_identical_samples_are_learnt_once_over_all_runs(run, choose) -> None:
    run("one", attempt("a", [1], reward=1.0), attempt("b", [1], reward=1.0))
    run("two", attempt("c", [1], reward=1.0), attempt("d", [1], prompt=(9,), reward=1.0))
    samples = choose("one", "two", "one", min_reward=1.0)
    assert rows_of(samples) == [("a", [1]), ("d", [1])]
    assert samples.counts.repeated == 2 and samples.runs == ("one", "two")
    assert len(rows_of(choose("one", "two", min_reward=1.0, deduplicate=False))) == 4


def test_fewer_samples_are_drawn_alike_each_time(run, choose) -> None:
    run("one", *(attempt(f"a{n}", [n], reward=1.0) for n in range(20)))
    some, again = (choose("one", min_reward=1.0, max_samples=6) for _ in range(2))
    assert some.digest == again.digest and some.counts.beyond == 14
    assert some.digest != choose("one", min_reward=1.0, max_samples=7).digest
    assert rows_of(some) == sorted(rows_of(some)) and len(rows_of(some)) == 6


def test_calls_of_another_role_are_context(run, choose) -> None:
    run("one", attempt("a", [1], reward=1.0), attempt("b", [2], role="large", reward=1.0))
    samples = choose("one", min_reward=1.0, role="large")
    assert rows_of(samples) == [("b", [2])] and samples.counts.empty == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "say which attempts are learnt from: min_reward"),
        ({"sql": "SELECT 1", "where": "true"}, "sql= stands alone: put what where= says"),
        (
            {"min_reward": 2.0},
            "of 2 attempts none is chosen by min_reward=2; the highest reward is 1",
        ),
        ({"min_reward": 1.0, "reward": "exakt"}, "no such reward; there are exact, reward"),
        (
            {"where": "exakt = 1"},
            'where=exakt = 1: .*"exakt" not found.*columns of attempts are .*exact',
        ),
        ({"where": "exact = 3"}, "none is chosen by where=exact = 3; widen it"),
        ({"where": "exact = 'a"}, "where=.*unterminated"),
        ({"sql": "SELEC 1"}, "sql=SELEC 1: .*syntax error"),
        ({"sql": "SELECT 1 AS n"}, "sql= gives the columns n; it must give attempt_id"),
        ({"sql": "SELECT '?' AS attempt_id"}, "sql= names no attempt of the 2"),
        ({"sql": "SELECT * FROM read_text('/etc/hosts')"}, "sql=.*disabled"),
        ({"sql": ""}, "it gives no rows"),
        (
            {"min_reward": 1.0, "policy": "planner"},
            "no call of the policy 'planner'.*there are policy",
        ),
        ({"min_reward": 1.0, "role": "big"}, "role=big: .*there are small"),
        ({"min_reward": float("nan")}, "must be a finite number"),
        ({"min_reward": 1.0, "max_samples": 0}, "max_samples=0: must be at least 1"),
    ],
)
def test_a_choice_that_gives_nothing_is_one_line(run, choose, settings, says) -> None:
    run("one", attempt("a", [1], reward=1.0, exact=1.0), attempt("b", [2], reward=0.0, exact=0.0))
    with pytest.raises(UserError, match=says) as raised:
        choose("one", **settings)
    assert len(str(raised.value).splitlines()) == 1


def test_runs_that_cannot_be_learnt_from_are_named(run, choose, tmp_path: Path) -> None:
    run("empty")
    run("large", attempt("a", [100], reward=1.0))
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text('{"other": 1}')
    run("foreign", attempt("a", [1], reward=1.0), model=other)
    for name, says in (
        ("nowhere", "from=nowhere: no such run in .*the runs there are: empty, foreign, large"),
        ("empty", "no spans in .*empty/spans"),
        ("foreign", "from=foreign: its model .*another tokenizer"),
        ("large", "the token 100, but .* has only 100"),
    ):
        with pytest.raises(UserError, match=says):
            choose(name, min_reward=1.0)
    with pytest.raises(UserError, match="from= is needed"):
        choose(min_reward=1.0)


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 5))
def test_every_epoch_holds_each_sample_once_in_batches_of_nearly_one_size(
    count, size, seed
) -> None:
    order = SampleOrder(count, size, seed)
    for epoch in range(2):
        first = epoch * order.steps_per_epoch
        batches = [order.batch(first + step) for step in range(order.steps_per_epoch)]
        assert sorted(np.concatenate(batches)) == list(range(count))
        sizes = {len(batch) for batch in batches}
        assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    again = SampleOrder(count, size, seed).batch(0)
    np.testing.assert_array_equal(order.batch(0), again)
