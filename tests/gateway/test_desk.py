"""Conversations and releases: who answers whom, and that nothing moves that should stay."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.gateway.answerers import Answerer
from lightning_ray.gateway.desk import Desk, LivePolicy, conversation_of, digest_of, trace_of
from lightning_ray.gateway.live import parse_feedback

KEYS = {"web": digest_of("k" * 20), "app": digest_of("a" * 20)}


def live(champion: int, candidate: int | None = None, share: float = 0.0, loaded=(1, 2, 3)):
    answerers = {version: Answerer("helper", (f"http://{version}",)) for version in loaded}
    return LivePolicy("helper", answerers, champion, candidate, share)


def desk(policy: LivePolicy, idle_s: float = 100.0) -> Desk:
    made = Desk("run", KEYS, idle_s)
    made.release(policy)
    return made


def test_only_a_known_key_has_a_name():
    made = desk(live(1))
    assert (made.caller("k" * 20), made.caller("a" * 20)) == ("web", "app")
    assert made.caller("") is None and made.caller("k" * 19) is None


def test_nobody_serves_before_a_release():
    assert Desk("run", KEYS, 100.0).admit("web", "c", "helper", 0) is None
    assert desk(live(4)).admit("web", "c", "helper", 0) is None


@given(
    st.lists(
        st.tuples(st.sampled_from(["call", "release"]), st.integers(0, 9), st.integers(1, 3)),
        max_size=60,
    )
)
def test_a_conversation_stays_on_its_version_whatever_is_released(events):
    made = desk(live(1))
    first: dict[int, int] = {}
    champion = 1
    for event, conversation, version in events:
        if event == "release":
            champion = version
            made.release(live(version))
            continue
        passage = made.admit("web", str(conversation), "helper", 0)
        assert passage.version == first.setdefault(conversation, champion)
        assert passage.answerer.urls == (f"http://{passage.version}",)


@given(st.floats(0.05, 0.95))
def test_a_candidate_gets_its_share_of_new_conversations(share):
    made = desk(live(1, candidate=2, share=share))
    chosen = [made.admit("web", str(i), "helper", 0).version for i in range(600)]
    assert abs(chosen.count(2) / 600 - share) < 0.12


def test_a_conversation_moves_when_its_version_has_no_engines_any_more():
    made = desk(live(1))
    assert made.admit("web", "c", "helper", 0).version == 1
    made.release(live(2, loaded=(2, 3)))
    assert made.admit("web", "c", "helper", 0).version == 2


def test_a_conversation_that_was_silent_for_long_is_a_new_one():
    made = desk(live(1), idle_s=10)
    before = made.admit("web", "c", "helper", 0).identity.rollout_id
    assert made.admit("web", "c", "helper", 9).identity.rollout_id == before
    assert made.active_on("helper", 1, 19) == 1 and made.active_on("helper", 1, 20) == 0
    made.release(live(2))
    after = made.admit("web", "c", "helper", 30)
    assert after.identity.rollout_id != before and after.version == 2


def test_callers_do_not_share_conversations():
    made = desk(live(1))
    web, app = (made.admit(caller, "c", "helper", 0).identity for caller in ("web", "app"))
    assert web.rollout_id != app.rollout_id
    assert made.owns("web", web.rollout_id) and not made.owns("app", web.rollout_id)
    assert not made.owns("web", "s00001-0000")


def request(*turns: str, system: str = "Help.") -> dict:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"model": "m", "messages": [{"role": "system", "content": system}, *messages]}


def test_a_conversation_is_known_by_how_it_begins():
    def of(body, **headers):
        return conversation_of(headers, "x-conversation-id", body)

    first = of(request("Hello"))
    assert of(request("Hello", "Hi", "More")) == first
    assert of(request("Bye")) != first and of(request("Hello", system="Harm.")) != first
    named = {"x-conversation-id": "7"}
    assert of(request("Hello"), **named) == of(request("Bye"), **named) != first
    for odd in ({}, {"messages": "?"}, {"messages": [1]}, {"input": None}, {"prompt": ["a"]}):
        assert of(odd)


TRACE = "0a" * 16


def test_a_trace_belongs_where_its_calls_went():
    made = desk(live(1))
    header = {"traceparent": f"00-{TRACE}-{'0b' * 8}-01"}
    assert trace_of(header) == TRACE
    for odd in ("", "00-1-2-01", f"00-{'0' * 32}-{'0b' * 8}-01", f"00-{TRACE}"):
        assert trace_of({"traceparent": odd}) == ""
    passage = made.admit("web", "begins:x", "helper", 0.0, TRACE)
    rollout = passage.identity.rollout_id
    # Whatever its spans call the conversation.
    assert made.locate("web", [], {TRACE: "header:c"}, 1.0) == ({}, {TRACE: rollout})
    assert made.locate("web", [], {TRACE: ""}, 1.0) == ({}, {TRACE: rollout})
    # Another caller has a trace of the same id in a conversation of its own, or in none.
    assert made.locate("app", [], {TRACE: ""}, 1.0) == ({}, {})
    _, found = made.locate("app", [], {TRACE: "header:c"}, 1.0)
    assert made.owns("app", found[TRACE]) and not made.owns("web", found[TRACE])


def test_telemetry_and_calls_that_name_a_conversation_meet_in_it():
    made = desk(live(1))
    named, found = made.locate("web", ["header:c"], {TRACE: "header:c"}, 0.0)
    assert found == {TRACE: named["header:c"]}
    passage = made.admit("web", "header:c", "helper", 1.0)
    assert passage.identity.rollout_id == named["header:c"]
    names = [f"rollout:{passage.identity.rollout_id}", "rollout:live-00000000-1", "rollout:"]
    assert list(made.locate("web", names, {}, 2.0)[0]) == names[:1]
    assert made.locate("app", names, {TRACE: names[0]}, 2.0) == ({}, {})


ROLLOUT = "live-0a1b2c3d-0123456789abcdef"


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ({"rollout": ROLLOUT, "verdict": "accept"}, ["feedback"]),
        ({"reply_id": f"chatcmpl-{ROLLOUT}-00ff", "reward": 1}, ["reward"]),
        (
            {
                "rollout": ROLLOUT,
                "verdict": "correct",
                "correction": "42",
                "rewards": {"tone": 0.5},
            },
            ["feedback", "reward"],
        ),
        ({"rollout": ROLLOUT, "outcome": "resolved", "by": "ann"}, ["feedback"]),
        (
            {"rollout": ROLLOUT, "verdict": "override", "outcome": "escalated"},
            ["feedback", "feedback"],
        ),
    ],
)
def test_feedback_becomes_spans_of_its_conversation(body, kinds):
    rows = parse_feedback(body).spans("run", "web")
    assert [row["kind"] for row in rows] == kinds
    for row in rows:
        assert (row["rollout_id"], row["attempt_id"]) == (ROLLOUT, f"{ROLLOUT}/1")
        assert json.loads(row["attributes"])["caller"] == "web"


@pytest.mark.parametrize(
    ("said", "source"),
    [({}, "service"), ({"by": "ann"}, "person"), ({"by": "ci", "source": "service"}, "service")],
)
def test_feedback_says_who_gave_it_and_for_which_step(said, source):
    body = {"rollout": ROLLOUT, "verdict": "accept", "reward": 1, "step": 2, **said}
    for row in parse_feedback(body).spans("run", "web"):
        assert (row["source"], row["step"]) == (source, 2)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"rollout": ROLLOUT, "reward": 1, "source": "grader"}, "neither 'person' nor 'service'"),
        ({"rollout": ROLLOUT, "reward": 1, "step": -1}, "`step` is to be"),
        ({"verdict": "accept"}, "name the conversation"),
        ({"reply_id": "chatcmpl-1", "verdict": "accept"}, "name the conversation"),
        ({"rollout": ROLLOUT}, "say something"),
        ({"rollout": ROLLOUT, "verdict": "great"}, "none of accept, correct, override"),
        ({"rollout": ROLLOUT, "outcome": "won"}, "none of resolved, unresolved, escalated"),
        ({"rollout": ROLLOUT, "verdict": "correct"}, "needs `correction`"),
        ({"rollout": ROLLOUT, "reward": "1"}, "give a finite number"),
        ({"rollout": ROLLOUT, "reward": float("nan")}, "give a finite number"),
        ({"rollout": ROLLOUT, "reward": True}, "give a finite number"),
        ({"rollout": ROLLOUT, "rewards": [1]}, "an object of names and numbers"),
        ({"rollout": 7, "reward": 1}, "`rollout` is to be a text"),
        ({"rollout": ROLLOUT, "verdict": "accept", "by": "\ud800"}, "half of a character"),
        ({"rollout": ROLLOUT, "rewards": {"\udfff": 1}}, "half of a character"),
        ({"rollout": ROLLOUT, "score": 1}, "'score' is no field"),
    ],
)
def test_feedback_that_says_nothing_is_refused_with_what_to_change(body, message):
    with pytest.raises(ValueError, match=message):
        parse_feedback(body)
