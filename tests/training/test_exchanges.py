"""What was said in rollouts, read from spans of both kinds of answerers."""

from typing import Any

import pyarrow as pa
import pytest

from lightning_ray.errors import UserError
from lightning_ray.rollouts import AttemptOutcome, AttemptStatus, RolloutRecord, RolloutSpec
from lightning_ray.rollouts.types import RolloutStatus
from lightning_ray.spans import SpanKind, SpanStatus, span
from lightning_ray.spans.rows import to_batch
from lightning_ray.training.exchanges import as_trials, cost_usd, find_seed

CHAT = "/v1/chat/completions"
OWN = "You plan. Be exact."


def messages(system: str | None, *said: tuple[str, Any]) -> dict[str, Any]:
    turns = [("system", system)] if system is not None else []
    return {"messages": [{"role": r, "content": c} for r, c in (*turns, *said)]}


def call(
    request: dict[str, Any],
    text: str = "fine",
    attempt: str = "a/1",
    policy: str = "planner",
    kind: SpanKind = SpanKind.MODEL_CALL,
    path: str = CHAT,
    status: SpanStatus = SpanStatus.OK,
    tool_calls: tuple[dict[str, str], ...] = (),
    **more: Any,
) -> dict[str, Any]:
    reply = {"text": text, "tool_calls": list(tool_calls)}
    return span(
        kind,
        path,
        run_id="r",
        rollout_id=attempt.partition("/")[0],
        attempt_id=attempt,
        status=status,
        policy=policy,
        attributes={"request": request, "reply": reply, **more},
    )


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_batches([to_batch(rows)])


def record(name: str, reward: float | None, task: str = "t") -> RolloutRecord:
    spec = RolloutSpec(name, task, {"question": "?"}, 60.0)
    if reward is None:
        outcome = AttemptOutcome(AttemptStatus.FAILED, error="crashed")
        status, ended = RolloutStatus.FAILED, AttemptStatus.FAILED
    else:
        outcome = AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": reward}, "printed")
        status, ended = RolloutStatus.SUCCEEDED, AttemptStatus.SUCCEEDED
    return RolloutRecord(spec, status, ((f"{name}/1", ended),), outcome)


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        (CHAT, messages(OWN, ("user", "hi"))),
        ("/v1/messages", {"system": OWN, **messages(None, ("user", "hi"))}),
        ("/v1/responses", {"instructions": OWN, "input": "hi"}),
    ],
)
@pytest.mark.parametrize("kind", [SpanKind.MODEL_CALL, SpanKind.MESSAGE])
def test_the_agents_own_prompt_is_found_in_every_protocol(path, request_, kind):
    spans = table(
        call(request_, path=path, kind=kind),
        call(messages("another policy's"), policy="solver"),
        call(messages("never answered"), status=SpanStatus.ERROR),
    )
    assert find_seed(spans, "planner", None) == OWN
    assert find_seed(spans, "planner", "Be exact") == "Be exact"
    (trial,) = as_trials([record("a", 1.0)], spans, "planner", OWN)
    assert [(e.asked, e.said, e.plain) for e in trial.exchanges] == [("hi", "fine", True)]


def test_a_seed_that_never_occurs_is_one_line_with_the_prompts_there_are():
    spans = table(call(messages(OWN)), call(messages("x" * 100)))
    with pytest.raises(UserError, match="occurs in no call") as raised:
        find_seed(spans, "planner", "Be quick.")
    message = str(raised.value)
    assert "'Be quick.'" in message and repr(OWN) in message and "x ..." in message
    assert len(message.splitlines()) == 1


def test_prompts_that_differ_want_a_choice():
    spans = table(call(messages("It is Monday. " + OWN)), call(messages("It is Friday. " + OWN)))
    with pytest.raises(UserError, match=r"2 different system prompts.*prompt\.seed"):
        find_seed(spans, "planner", None)
    assert find_seed(spans, "planner", OWN) == OWN


def test_an_agent_without_a_system_prompt_has_an_empty_one():
    assert find_seed(table(call(messages(None, ("user", "hi")))), "planner", None) == ""


def test_a_policy_that_nobody_asked():
    with pytest.raises(UserError, match="no call of the rollouts tried was for policy solver"):
        find_seed(table(call(messages(OWN))), "solver", None)


def test_a_trial_holds_the_calls_that_the_prompt_was_put_into():
    spans = table(
        call(messages("new text", ("user", "one")), "1", prompt="planner@3"),
        call(messages("another part's", ("user", "two")), "2"),
        call(messages(OWN, ("user", "three")), "3", attempt="b/1"),
        span(
            SpanKind.RESOURCE,
            "attempt",
            run_id="r",
            rollout_id="a",
            attempt_id="a/1",
            attributes={"stderr": "careful"},
        ),
    )
    first, second, lost = as_trials(
        [record("a", 0.5, "ta"), record("b", 1.0, "tb"), record("c", None, "tc")],
        spans,
        "planner",
        OWN,
    )
    assert [e.asked for e in first.exchanges] == ["one"] and first.errors == "careful"
    assert [e.asked for e in second.exchanges] == ["three"] and second.score == 1.0
    assert (lost.score, lost.exchanges, lost.task_id) == (None, (), "tc")


@pytest.mark.parametrize(
    "row",
    [
        call(messages(OWN, ("user", "hi"), ("tool", "42"))),
        call(messages(OWN, ("user", [{"type": "image_url", "image_url": {}}]))),
        call(messages(OWN, ("user", "hi")), tool_calls=({"name": "f", "arguments": "{}"},)),
        call({"prompt": "once upon"}, path="/v1/completions"),
    ],
)
def test_what_is_no_plain_text_is_told_but_not_shown(row):
    seed = "" if row["name"] == "/v1/completions" else OWN
    (trial,) = as_trials([record("a", 1.0)], table(row), "planner", seed)
    (exchange,) = trial.exchanges
    assert not exchange.plain and exchange.asked


def test_what_upstreams_took_is_added_up():
    rows = [call(messages(OWN), cost_usd=cost) for cost in (0.25, None, 0.5)]
    assert cost_usd(table(*rows, call(messages(OWN)))) == 0.75
