"""Which rewards hold: the one definition for whoever reads them out of spans.

A reward is a span of kind `reward` with a finite `value`. It has a name and belongs to one attempt:
to one `step` of it, or to the attempt as a whole where `step` is null. It may be given again, by
anybody, at any time; of one name and step the last by `sequence` holds, and every earlier one stays
in the history.

Invariant: an agent does not overrule anybody. Its own reward (`source` "agent") holds only where
nobody else gave one of that name and step, and never in an attempt that did not end well: what
crashed or was not graded has no outcome, whatever it said of itself.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.spans.schema import ATTEMPT_SPAN, SPAN_SCHEMA, SpanKind, SpanStatus

AGENT = "agent"
GRADER = "grader"
SERVICE = "service"
PERSON = "person"

VERDICTS = ("accept", "correct", "override")
"""What feedback says of an answer, as the name of its span."""
OUTCOMES = ("resolved", "unresolved", "escalated")
"""What feedback says a workflow came to, as the name of its span."""

_COLUMNS = ["rollout_id", "attempt_id", "name", "step", "value", "source", "sequence", "span_id"]
REWARD_SCHEMA = pa.schema([SPAN_SCHEMA.field(name).with_nullable(True) for name in _COLUMNS])
"""The columns of `rewards` and `reward_history`."""


def reward_history(spans: pa.Table) -> pa.Table:
    """Every reward that was ever given, ordered by attempt and `sequence` (REWARD_SCHEMA).

    Args:
        spans: Rows of SPAN_SCHEMA, of any attempts and kinds, in any order. `source` is "grader"
            for what an older version stored without one.
    """
    given = spans.filter(
        pc.and_(
            pc.equal(spans["kind"], SpanKind.REWARD.value),
            pc.fill_null(pc.is_finite(spans["value"]), False),
        )
    ).select(_COLUMNS)
    place = given.schema.get_field_index("source")
    given = given.set_column(place, "source", pc.fill_null(given["source"], GRADER))
    given = given.cast(REWARD_SCHEMA)
    return given.sort_by([("attempt_id", "ascending"), ("sequence", "ascending")])


def rewards(spans: pa.Table) -> pa.Table:
    """The rewards that hold: one row per attempt, name and step, as `reward_history` orders them.

    A name and step keep the place at which they were first given.
    """
    history = reward_history(spans)
    own = pc.equal(history["source"], AGENT)
    broken = pc.is_in(history["attempt_id"], value_set=_broken(spans))
    history = history.filter(pc.invert(pc.and_(own, broken)))
    if history.num_rows == 0:
        return history
    own = pc.equal(history["source"], AGENT)
    place = pa.array(np.arange(history.num_rows))
    keys = ["attempt_id", "name", "step"]
    numbered = history.select(keys).append_column("place", place)
    # The last of others, else the agent's last: the greatest of the two ranks.
    rank = pc.if_else(own, place, pc.add(place, history.num_rows))
    numbered = numbered.append_column("rank", rank)
    held = numbered.group_by(keys).aggregate([("rank", "max"), ("place", "min")])
    held = held.sort_by("place_min")
    chosen = held["rank_max"]
    over = pc.greater_equal(chosen, history.num_rows)
    return history.take(pc.if_else(over, pc.subtract(chosen, history.num_rows), chosen))


def _broken(spans: pa.Table) -> pa.Array:
    """The attempts whose end, as their worker recorded it, was no good one."""
    ended = pc.and_(
        pc.equal(spans["kind"], SpanKind.RESOURCE.value), pc.equal(spans["name"], ATTEMPT_SPAN)
    )
    bad = pc.and_(ended, pc.not_equal(spans["status"], SpanStatus.OK.value))
    return pc.unique(spans["attempt_id"].filter(bad)).cast(pa.string())


def whole_attempt(held: pa.Table) -> pa.Table:
    """Those of `rewards` (or of its history) that are for an attempt as a whole, not for a step."""
    return held.filter(pc.is_null(held["step"]))


def by_attempt(spans: pa.Table) -> dict[str, dict[str, float]]:
    """For each attempt, the rewards that hold for it as a whole, by name."""
    held = whole_attempt(rewards(spans))
    named: dict[str, dict[str, float]] = {}
    for attempt, name, value in zip(
        *(held[column].to_pylist() for column in ("attempt_id", "name", "value")), strict=True
    ):
        named.setdefault(attempt, {})[name] = value
    return named
