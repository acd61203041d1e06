"""Graders: how they are found, what they may answer, and what their failures say."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.agents import AgentEnd, AgentResult, GraderError, Task, grade, load_grader
from lightning_ray.errors import UserError
from lightning_ray.spans import SpanKind, span, to_batch
from lightning_ray.spans.schema import SPAN_SCHEMA

RESULT = AgentResult(AgentEnd.EXITED, 0, None, "out\n", "", 0.1, False, False)
SPANS = SPAN_SCHEMA.empty_table()
TASK = Task("t1", {"answer": 4})


def answering(value):
    return grade(lambda task, result, spans: value, TASK, RESULT, SPANS)


def test_a_grader_sees_the_task_the_result_and_the_spans():
    seen = []
    grade(lambda *arguments: seen.append(arguments) or 0, TASK, RESULT, SPANS)
    ((task, result, spans),) = seen
    assert task == {"answer": 4, "id": "t1"}
    assert result is RESULT and isinstance(spans, pa.Table)
    assert TASK.data == {"answer": 4}


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**9), 10**9))
def test_a_number_is_the_reward(value):
    scores = answering(value)
    assert scores == {"reward": float(value)} and type(scores["reward"]) is float


@pytest.mark.parametrize("value", [True, np.float32(1), np.bool_(True), np.int64(1)])
def test_other_kinds_of_numbers_count(value):
    assert answering(value) == answering({"reward": value}) == {"reward": 1.0}


def test_named_scores_are_kept():
    assert answering({"reward": 0.5, "exact": False}) == {"reward": 0.5, "exact": 0.0}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "None .NoneType. as 'reward' for task 't1': give a number"),
        ("1", "'1' .str. as 'reward'"),
        (math.nan, "nan as 'reward' for task 't1': give a finite number"),
        ({"reward": 1, "x": math.inf}, "inf as 'x'"),
        ({"exact": 1}, "no 'reward' for task 't1', only .'exact'."),
        ({"reward": 1, 2: 1}, "named a score 2"),
        (np.array([1.0, 2.0]), "give a number"),
        (1j, "give a number"),
    ],
)
def test_an_answer_that_is_no_reward_is_refused(value, message):
    with pytest.raises(GraderError, match=message):
        answering(value)


def test_a_failing_grader_is_named_with_its_line(tmp_path):
    path = tmp_path / "grader.py"
    path.write_text(
        "def helper(t):\n    return t['missing']\n\ndef grade(t, r, s):\n    return helper(t)\n"
    )
    with pytest.raises(GraderError) as caught:
        grade(load_grader(f"{path}:grade"), TASK, RESULT, SPANS)
    assert str(caught.value) == (f"grader failed on task 't1': KeyError: 'missing' ({path}:2)")
    assert isinstance(caught.value.__cause__, KeyError)


def test_graders_in_files_of_one_name_keep_apart(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "grader.py").write_text(f"def grade(*_): return {ord(name)}\n")
    graders = [load_grader(f"{tmp_path}/{name}/grader.py:grade") for name in "ab"]
    assert [grade(g, TASK, RESULT, SPANS)["reward"] for g in graders] == [97.0, 98.0]


def test_a_grader_can_live_in_a_package():
    assert load_grader("math:hypot") is math.hypot


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("grade", "must be path/to/file.py:function or package.module:function"),
        ("a.py:not a name", "must be"),
        ("missing.py:grade", "no file .*missing.py"),
        ("no.such.package:grade", "no.such.package does not import: ModuleNotFoundError"),
        ("{tmp}/good.py:other", "has no function 'other'"),
        ("{tmp}/good.py:VALUE", "has no function 'VALUE'"),
        ("{tmp}/raises.py:grade", r"does not import: ValueError: no \(.*raises.py:2\)"),
        ("{tmp}/syntax.py:grade", r"does not import: SyntaxError: .*syntax.py:1\)"),
    ],
)
def test_a_grader_that_does_not_load_is_refused(tmp_path, spec, message):
    (tmp_path / "good.py").write_text("VALUE = 1\ndef grade(*_): return 0\n")
    (tmp_path / "raises.py").write_text("import math\nraise ValueError('no')\n")
    (tmp_path / "syntax.py").write_text("def grade(:\n")
    with pytest.raises(UserError, match=message) as caught:
        load_grader(spec.replace("{tmp}", str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_an_agent_may_be_trusted_with_its_own_rewards():
    own = load_grader("lightning_ray.agents.own_rewards:grade")
    place = {"run_id": "run", "rollout_id": "r", "attempt_id": "r/1"}
    rows = [
        span(SpanKind.REWARD, name, **place, value=value, step=step, source="agent")
        | {"sequence": n}
        for n, (name, value, step) in enumerate(
            [("reward", 0.0, None), ("reward", 1.0, None), ("style", 2.0, None), ("reward", 9.0, 4)]
        )
    ]
    table = pa.Table.from_batches([to_batch(rows)])
    assert grade(own, TASK, RESULT, table) == {"reward": 1.0, "style": 2.0}
    with pytest.raises(GraderError, match="gave no 'reward'"):
        grade(own, TASK, RESULT, SPANS)
