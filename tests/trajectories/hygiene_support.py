"""Clean attempts as the recorder and the worker store them, to put one defect into."""

from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from lightning_ray.spans import SPAN_SCHEMA, SpanKind, span, to_batch
from lightning_ray.training.names import place_of, rollout_id
from lightning_ray.trajectories import (
    HygieneConfig,
    HygieneReport,
    attempts_of_spans,
    distinct_spans,
    inspect,
    rebuild_trees,
    task_keys,
)

Row = dict[str, Any]


@dataclass
class CleanAttempt:
    """One attempt's rows, by what they are."""

    attempt_id: str
    task: Row
    calls: list[Row]
    end: Row
    rewards: list[Row] = field(default_factory=list)

    def rows(self) -> list[Row]:
        rows = [*self.calls, self.end, *self.rewards]
        return [{**row, "sequence": number} for number, row in enumerate(rows, start=1)]


@dataclass
class Folder:
    """The attempts of a step: `groups[g][s]`."""

    groups: list[list[CleanAttempt]]
    heldout: list[Row]

    def table(self, extra: list[Row] | None = None) -> pa.Table:
        rows = [row for group in self.groups for attempt in group for row in attempt.rows()]
        return pa.Table.from_batches([to_batch([*rows, *(extra or [])])], SPAN_SCHEMA)

    def report(self, extra: list[Row] | None = None, **settings: Any) -> HygieneReport:
        """The report as `spans check` makes it."""
        config = replace(HygieneConfig(), **settings)
        spans, repeated = distinct_spans(self.table(extra), config)
        _, inexact = rebuild_trees(spans)
        return inspect(
            spans,
            attempts_of_spans(spans, place_of),
            config,
            inexact=inexact,
            repeated=repeated,
            heldout=task_keys((f"heldout-{n}", task) for n, task in enumerate(self.heldout)),
        )

    def found(self, extra: list[Row] | None = None, **settings: Any) -> dict[str, int]:
        """The checks that found something, with their counts."""
        counts = self.report(extra, **settings).counts
        return {check.value: count for check, count in counts.items() if count}


def clean_attempt(
    group: int, sample: int, turns: list[tuple[int, int]], worth: float, task: Row
) -> CleanAttempt:
    """An attempt whose calls each continue the last: (prompt tokens, sampled tokens) per turn."""
    rollout = rollout_id("s00001", "abc123", group, sample)
    place = {"run_id": "run", "rollout_id": rollout, "attempt_id": f"{rollout}/1"}
    calls: list[Row] = []
    length = 0
    for turn, (given, sampled) in enumerate(turns):
        # Tokens that no other attempt samples.
        tokens = [*range(given), *(1000 * (sample + 1) + turn * 50 + n for n in range(sampled))]
        calls.append(
            span(
                SpanKind.MODEL_CALL,
                "/v1/chat/completions",
                **place,
                policy="policy",
                version=0,
                continues=calls[-1]["span_id"] if calls else None,
                prefix_tokens=length,
                token_ids=tokens,
                logprobs=[-0.25] * sampled,
                finish_reason="stop",
            )
        )
        length += len(tokens)
    end = span(SpanKind.RESOURCE, "attempt", **place, attributes=end_attributes(task, f"g{group}"))
    rewards = [
        span(SpanKind.REWARD, name, **place, value=value)
        for name, value in (("reward", worth), ("exact", worth))
    ]
    return CleanAttempt(place["attempt_id"], task, calls, end, rewards)


def end_attributes(task: Row, group: str, **changes: Any) -> Row:
    """What the worker writes into an attempt's last span."""
    base = {"task_id": task["id"], "task": task, "group_id": group, "status": "succeeded"}
    return {**base, "stdout": "", "error": "", "end": "exited", "exit_code": 0, **changes}


@st.composite
def folders(draw: st.DrawFn) -> Folder:
    """Clean steps of at least two groups, each with attempts of different worth."""
    turns = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)
    groups = []
    for group in range(draw(st.integers(2, 3))):
        task = {"id": f"t{group}", "question": f"What is {group} plus 1?", "answer": group + 1}
        size = draw(st.integers(2, 4))
        worth = draw(
            st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=size, max_size=size).filter(
                lambda values: min(values) < max(values)
            )
        )
        groups.append([clean_attempt(group, s, draw(turns), worth[s], task) for s in range(size)])
    return Folder(groups, [{"id": "h0", "question": "What is 9 plus 9?", "answer": 18}])
