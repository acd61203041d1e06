import asyncio
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray.errors import InfrastructureError
from lightning_ray.inference import recorder as recorder_module
from lightning_ray.inference.attribution import Attribution
from lightning_ray.inference.recorder import CallRecorder, Choice, OpenCall
from lightning_ray.spans import SpansConfig, SpanStatus, to_batch
from lightning_ray.spans.store import SpanStore
from lightning_ray.trajectories.tree import Call, rebuild_trees


class Stored:
    """Rows as the store would number them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    async def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        await asyncio.sleep(0)
        for row in rows:
            self.rows.append({**row, "sequence": len(self.rows) + 1})

    def calls(self, attempt_id: str = "r/1") -> list[Call]:
        """The calls of an attempt with their tokens in full, rebuilt from what was stored."""
        trees, inexact = rebuild_trees(pa.Table.from_batches([to_batch(self.rows)]))
        assert inexact == {}
        return [call for tree in trees if tree.attempt_id == attempt_id for call in tree.calls]


def open_call(prompt: list[int], *sampled: list[int], attempt: str = "r/1") -> OpenCall:
    """A call that sampled these choices, each token with a logprob of its own."""
    call = OpenCall(
        Attribution("run", attempt.rpartition("/")[0], attempt, "gpt-4o-mini", "/v1/messages"),
        policy="policy",
        version=7,
        sampling={"temperature": 1.0},
    )
    call.prompt_ids = prompt
    for index, tokens in enumerate(sampled):
        choice = call.choice(index)
        choice.token_ids = list(tokens)
        choice.logprobs = [-0.5 * (place + 1) for place in range(len(tokens))]
        choice.finish_reason = "stop"
    return call


TOKENS = st.lists(st.integers(0, 2), max_size=4)  # few tokens, so that prefixes meet by chance


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1),  # the attempt
            st.integers(-1, 20),  # which earlier call it goes on from, or none
            st.integers(0, 40),  # how much of that call's tokens it keeps (a rewritten context)
            TOKENS,  # what the agent adds
            st.lists(TOKENS.filter(bool), min_size=1, max_size=3),  # what is sampled, by choice
        ),
        max_size=12,
    )
)
def test_what_is_stored_rebuilds_every_call_token_for_token(
    calls: list[tuple[int, int, int, list[int], list[list[int]]]],
) -> None:
    stored = Stored()
    recorder = CallRecorder(stored.append)
    made: dict[str, list[tuple[list[int], list[int]]]] = {"r/0": [], "r/1": []}
    for attempt_number, parent, kept, added, sampled in calls:
        attempt = f"r/{attempt_number}"
        earlier = made[attempt]
        history: list[int] = []
        if parent >= 0 and earlier:
            before, answer = earlier[parent % len(earlier)]
            history = (before + answer)[:kept]
        prompt = [*history, *added]
        asyncio.run(recorder.record(open_call(prompt, *sampled, attempt=attempt), SpanStatus.OK))
        made[attempt] += [(prompt, tokens) for tokens in sampled]
    if not calls:
        return
    for attempt, expected in made.items():
        rebuilt = stored.calls(attempt)
        assert [call.tokens.tolist() for call in rebuilt] == [p + s for p, s in expected]
        assert [call.prompt_length for call in rebuilt] == [len(p) for p, _ in expected]
        for call, (_, answer) in zip(rebuilt, expected, strict=True):
            assert call.logprobs.tolist() == [-0.5 * (place + 1) for place in range(len(answer))]
            assert (call.policy, call.version) == ("policy", 7)
    assert recorder.calls == len(calls)
    assert recorder.sampled_tokens == sum(len(s) for pairs in made.values() for _, s in pairs)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 12)), max_size=4),
    st.integers(0, 4),
)
def test_each_token_has_the_version_that_sampled_it(
    sampled: list[int], changes: list[tuple[int, int]], choices: int
) -> None:
    """Changes of the weights: (version, tokens that were sampled before it)."""
    starts = dict(sorted((first, version) for version, first in changes))
    spans = [(3, 0), *((version, first) for first, version in starts.items() if first)]
    call = open_call([1, 2], *[sampled] * (choices + 1))
    for choice in call.choices.values():
        choice.spans = spans
    stored = Stored()
    asyncio.run(CallRecorder(stored.append).record(call, SpanStatus.OK))
    expected = [
        [version for version, first in spans if first <= place][-1] for place in range(len(sampled))
    ]
    for found in stored.calls():
        assert found.version == 3
        told = [3] * len(sampled) if found.versions is None else found.versions.tolist()
        assert told == expected
        assert (found.versions is None) == (max(f for _, f in spans if f < len(sampled)) == 0)


def test_a_call_is_stored_against_the_longest_call_that_it_continues() -> None:
    stored = Stored()
    recorder = CallRecorder(stored.append)
    for prompt, answer in [
        ([1, 2, 3, 4], [5, 6]),
        ([1, 2], [3]),  # earlier in the conversation, though it ended later
        ([1, 2, 3, 4, 5], [9]),  # goes on from the middle of the first: only the second is whole
        ([1, 2, 3, 4, 5, 6], [7]),  # adds nothing to the first, which is longer than the second
        ([2, 3], [4]),  # begins anew
    ]:
        asyncio.run(recorder.record(open_call(prompt, answer), SpanStatus.OK))
    ids = [row["span_id"] for row in stored.rows]
    assert [row["continues"] for row in stored.rows] == [None, None, ids[1], ids[0], None]
    assert [row["prefix_tokens"] for row in stored.rows] == [0, 0, 3, 6, 0]
    assert [list(row["token_ids"]) for row in stored.rows] == [
        [1, 2, 3, 4, 5, 6],
        [1, 2, 3],
        [4, 5, 9],
        [7],
        [2, 3, 4],
    ]


def test_no_call_continues_one_of_another_attempt() -> None:
    stored = Stored()
    recorder = CallRecorder(stored.append)
    asyncio.run(recorder.record(open_call([1], [2], attempt="r/1"), SpanStatus.OK))
    asyncio.run(recorder.record(open_call([1, 2], [3], attempt="r/2"), SpanStatus.OK))
    assert stored.rows[1]["continues"] is None


def stored_per_turn(turns: int) -> tuple[float, float]:
    """Tokens and bytes that a conversation of this many turns stores for each of them."""
    stored = Stored()
    recorder = CallRecorder(stored.append)
    history: list[int] = []
    for turn in range(turns):
        prompt = [*history, *range(turn, turn + 20)]
        answer = list(range(turn, turn + 30))
        asyncio.run(recorder.record(open_call(prompt, answer), SpanStatus.OK))
        history = prompt + answer
    assert stored.calls()[-1].tokens.tolist() == history
    tokens = sum(len(row["token_ids"]) for row in stored.rows)
    return tokens / turns, sum(to_batch([row]).nbytes for row in stored.rows) / turns


def test_a_conversations_size_is_linear_in_its_turns() -> None:
    short, long = stored_per_turn(8), stored_per_turn(64)
    assert long[0] <= 1.1 * short[0]
    assert long[1] <= 1.1 * short[1]


def test_calls_that_end_together_can_all_be_continued() -> None:
    stored = Stored()
    recorder = CallRecorder(stored.append)

    async def main() -> None:
        both = [open_call([1], [2]), open_call([1], [3])]
        await asyncio.gather(*(recorder.record(call, SpanStatus.OK) for call in both))
        await recorder.record(open_call([1, 2, 4], [5]), SpanStatus.OK)
        await recorder.record(open_call([1, 3, 4], [5]), SpanStatus.OK)

    asyncio.run(main())
    assert [row["prefix_tokens"] for row in stored.rows] == [0, 0, 2, 2]


def test_only_what_was_stored_is_continued() -> None:
    stored = Stored()
    failing = True

    async def append(rows: Sequence[Mapping[str, Any]]) -> None:
        if failing:
            raise InfrastructureError("the disk is full")
        await stored.append(rows)

    recorder = CallRecorder(append)
    with pytest.raises(InfrastructureError, match="the disk is full"):
        asyncio.run(recorder.record(open_call([1], [2]), SpanStatus.OK))
    failing = False
    asyncio.run(recorder.record(open_call([1, 2], [3]), SpanStatus.OK))
    assert [call.tokens.tolist() for call in stored.calls()] == [[1, 2, 3]]


def test_an_attempt_that_was_forgotten_is_stored_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "REMEMBERED_ATTEMPTS", 2)
    stored = Stored()
    recorder = CallRecorder(stored.append)
    # "a" is used again before "c" comes, so "b" is the one that goes.
    for attempt, prompt in [("a/1", [1]), ("b/1", [1]), ("a/1", [1, 2]), ("c/1", [1])]:
        asyncio.run(recorder.record(open_call(prompt, [2], attempt=attempt), SpanStatus.OK))
    for attempt in ("a/1", "b/1"):
        asyncio.run(recorder.record(open_call([1, 2, 3], [4], attempt=attempt), SpanStatus.OK))
    assert [row["prefix_tokens"] for row in stored.rows[-2:]] == [2, 0]
    assert stored.calls("b/1")[-1].tokens.tolist() == [1, 2, 3, 4]


def test_a_span_says_who_asked_what_answered_and_how() -> None:
    stored = Stored()
    recorder = CallRecorder(stored.append)
    asyncio.run(recorder.record(open_call([1, 2], [3], [4, 5]), SpanStatus.ABORTED))
    first, second = to_batch(stored.rows).to_pylist()
    for row, sampled in ((first, [3]), (second, [4, 5])):
        assert (row["run_id"], row["rollout_id"], row["attempt_id"]) == ("run", "r", "r/1")
        assert (row["kind"], row["name"]) == ("model_call", "/v1/messages")
        assert (row["role"], row["policy"], row["version"]) == ("gpt-4o-mini", "policy", 7)
        assert (row["status"], row["finish_reason"]) == ("aborted", "stop")
        assert row["token_ids"] == [1, 2, *sampled] and len(row["logprobs"]) == len(sampled)
        assert row["start_ns"] <= row["end_ns"]
    told = [json.loads(row["attributes"]) for row in (first, second)]
    assert [one["choice"] for one in told] == [0, 1]
    assert told[0]["prompt_tokens"] == 2 and told[0]["sampling"] == {"temperature": 1.0}
    assert told[0]["first_token_ms"] >= 0


def test_a_call_without_a_token_is_no_span() -> None:
    stored = Stored()
    recorder = CallRecorder(stored.append)
    unanswered = open_call([1, 2])
    asyncio.run(recorder.record(unanswered, SpanStatus.ABORTED))
    unseen = open_call([], [3])
    unseen.prompt_ids = None
    asyncio.run(recorder.record(unseen, SpanStatus.ABORTED))
    assert stored.rows == [] and recorder.calls == 0


def test_numbers_are_stored_exactly() -> None:
    stored = Stored()
    recorder = CallRecorder(stored.append)
    call = open_call([2**31 - 1, 0])
    logprob = float(np.float32(-0.1))
    call.choices[0] = Choice([49151], [logprob], "length")
    asyncio.run(recorder.record(call, SpanStatus.OK))
    (rebuilt,) = stored.calls()
    assert rebuilt.tokens.tolist() == [2**31 - 1, 0, 49151]
    assert rebuilt.logprobs.tolist() == [logprob]


def test_a_long_conversation_costs_no_more_a_turn_than_a_short_one(tmp_path: Path) -> None:
    async def bytes_a_turn(turns: int) -> float:
        store = SpanStore(str(tmp_path / str(turns)), SpansConfig())

        async def append(rows: Sequence[Mapping[str, Any]]) -> None:
            await store.append(to_batch(rows))

        recorder = CallRecorder(append)
        conversation: list[int] = []
        for turn in range(turns):
            prompt = [*conversation, *range(60)]
            answer = [turn * 64 + place for place in range(64)]
            await recorder.record(open_call(prompt, answer), SpanStatus.OK)
            conversation = prompt + answer
        await store.close()
        return (await store.stats()).bytes / turns

    short, long = asyncio.run(bytes_a_turn(8)), asyncio.run(bytes_a_turn(64))
    assert 0 < long <= 1.1 * short


def test_what_is_remembered_of_an_attempt_grows_with_its_turns_and_not_their_square() -> None:
    def remembered(turns: int) -> int:
        recorder = CallRecorder(Stored().append)
        conversation: list[int] = []
        for turn in range(turns):
            prompt = [*conversation, *range(60)]
            asyncio.run(recorder.record(open_call(prompt, [turn] * 64), SpanStatus.OK))
            conversation = [*prompt, *[turn] * 64]
        return len(pickle.dumps(recorder._known))

    assert remembered(64) < 10 * remembered(8)
