"""What each rollout came to, read off a table of spans with SQL: one `Outcome` per rollout.

Invariant: the latest attempt decides a rollout. Costs alone count every attempt, for a retry is
paid for as well.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lightning_ray.errors import UserError
from lightning_ray.spans import Query, query, querying
from lightning_ray.spans.rewards import OUTCOMES, VERDICTS, by_attempt

ROLLBACK_ATTRIBUTE = "lightning_ray.rollback"

_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")

# The number of an attempt is what follows the last slash of its id.
_LATEST = """
    WITH latest AS (
        SELECT max_by(attempt_id, coalesce(try_cast(split_part(attempt_id, '/', -1) AS BIGINT), 0))
            AS attempt_id
        FROM spans GROUP BY rollout_id
    )
"""


@dataclass(frozen=True)
class Usage:
    """What calls of one policy used that no span gives the cost of."""

    policy: str
    input_tokens: int
    """Prompt tokens; those of a call with several choices count once."""
    output_tokens: int
    uncounted: int
    """Calls whose tokens are not recorded."""


@dataclass(frozen=True)
class Outcome:
    """One rollout, as its latest attempt left it."""

    rollout_id: str
    attempt_id: str = ""
    """Empty for a rollout that left no span."""
    task_id: str | None = None
    task: str = ""
    """The task as JSON with sorted keys; empty where no span carries it."""
    output: str = ""
    error: str = ""
    status: str | None = None
    """As its attempt's span says (succeeded, failed, ...); None where there is no such span."""
    rewards: dict[str, float] = field(default_factory=dict)
    """What holds for the attempt as a whole, by name (`spans.rewards`)."""
    tool_calls: int = 0
    tool_calls_ok: int = 0
    observed: bool = False
    """Whether it would have shown a rollback: it has tool calls, steps, or the attribute."""
    rolled_back: bool = False
    verdicts: tuple[str, ...] = ()
    """Feedback on it by name: accept, correct, override."""
    said: str | None = None
    """What feedback last said it came to: resolved, unresolved or escalated."""
    cost_usd: float | None = None
    """Sum of what its spans give as `cost_usd`, over all attempts; None where none gives it."""
    usage: tuple[Usage, ...] = ()
    """Of its model calls without `cost_usd`, over all attempts."""

    @property
    def failed(self) -> bool:
        """Whether it came to no outcome of the agent: a crash, a timeout, a lost worker."""
        return not self.attempt_id or self.status not in (None, "succeeded")


def read_outcomes(
    spans: pa.Table,
    *,
    rollback_words: Sequence[str] = (),
    where: str | None = None,
    rollout_ids: Sequence[str] | None = None,
) -> list[Outcome]:
    """The outcomes of the rollouts in `spans` (SPAN_SCHEMA), by rollout id.

    `where` is an SQL condition on spans: only rollouts whose latest attempt has a span that fulfils
    it are returned. With `rollout_ids`, those alone and in this order; one without spans counts as
    failed. Raises UserError when the condition cannot be read.
    """
    # On a connection of its own, for its text is the user's.
    chosen = None if where is None else _chosen(spans, where)
    with querying(spans) as ask:
        rollouts: dict[str, dict[str, Any]] = {
            row["rollout_id"]: {"rollout_id": row["rollout_id"], "attempt_id": row["attempt_id"]}
            for row in _rows(ask, "SELECT rollout_id, attempt_id FROM decided GROUP BY ALL")
            if chosen is None or row["attempt_id"] in chosen
        }
        deciding = {fields["attempt_id"] for fields in rollouts.values()}
        rewards = _rewards(spans, deciding)
        telemetry = _telemetry(ask, rollback_words)
        for part in (_attempts(ask), rewards, telemetry, _verdicts(ask), _costs(ask)):
            for rollout_id, fields in part:
                if rollout_id in rollouts:
                    rollouts[rollout_id] |= fields
    if rollout_ids is not None:
        return [Outcome(**rollouts.get(name, {"rollout_id": name})) for name in rollout_ids]
    return [Outcome(**rollouts[name]) for name in sorted(rollouts)]


def is_rollback(name: str, words: Collection[str]) -> bool:
    """Whether one of `words` is a word of `name`: undo_last, RevertOrder and db.rollback are."""
    wanted = {word.lower() for word in words}
    return any(word.lower() in wanted for word in _WORDS.findall(name))


Fields = list[tuple[str, dict[str, Any]]]


def _rows(ask: Query, select: str, parameters: Sequence[object] = ()) -> list[dict[str, Any]]:
    """The answer to `select`, in which `decided` are the spans of the attempts that decide."""
    decided = ", decided AS (SELECT spans.* FROM spans JOIN latest USING (attempt_id)) "
    return ask(_LATEST + decided + select, parameters).to_pylist()


def _chosen(spans: pa.Table, where: str) -> set[str]:
    try:
        # On a line of its own, so that a comment in it ends there.
        found = query(spans, f"SELECT DISTINCT attempt_id FROM spans WHERE (\n{where}\n)")
    except UserError as error:
        raise UserError(f"where={where}: {error}") from error
    return set(found["attempt_id"].to_pylist())


def _attempts(ask: Query) -> Fields:
    select = """
        SELECT rollout_id, max_by(attributes, sequence) AS attributes FROM decided
        WHERE kind = 'resource' AND name = 'attempt' GROUP BY rollout_id
    """
    found = []
    for row in _rows(ask, select):
        said = json.loads(row["attributes"] or "{}")
        task = said.get("task")
        fields = {
            "task_id": said.get("task_id"),
            "task": "" if task is None else json.dumps(task, sort_keys=True, ensure_ascii=False),
            "output": str(said.get("output", said.get("stdout")) or ""),
            "error": str(said.get("error") or ""),
            "status": said.get("status"),
        }
        found.append((row["rollout_id"], fields))
    return found


def _rewards(spans: pa.Table, deciding: Collection[str]) -> Fields:
    return [
        (attempt_id.rpartition("/")[0], {"rewards": named})
        for attempt_id, named in by_attempt(spans).items()
        if attempt_id in deciding
    ]


def _telemetry(ask: Query, rollback_words: Sequence[str]) -> Fields:
    steps = "kind IN ('tool_call', 'agent_step')"
    every = f"SELECT name FROM spans WHERE {steps} UNION SELECT tool FROM spans WHERE {steps}"
    names = [name for name in ask(every)["name"].to_pylist() if name is not None]
    undoing = [name for name in names if is_rollback(name, rollback_words)]
    marked = f"""attributes->>'$."{ROLLBACK_ATTRIBUTE}"'"""
    select = f"""
        SELECT rollout_id,
            count(*) FILTER (kind = 'tool_call') AS tool_calls,
            count(*) FILTER (kind = 'tool_call' AND status = 'ok') AS tool_calls_ok,
            bool_or({steps} OR {marked} IS NOT NULL) AS observed,
            coalesce(
                bool_or(
                    ({steps} AND (list_contains($1, name) OR list_contains($1, tool)))
                    OR {marked} = 'true'
                ), false
            ) AS rolled_back
        FROM decided GROUP BY rollout_id
    """
    return [(row.pop("rollout_id"), row) for row in _rows(ask, select, [undoing])]


def _verdicts(ask: Query) -> Fields:
    # An agent's verdict on itself is no measure of it.
    select = """
        SELECT rollout_id,
            list(name ORDER BY sequence) FILTER (list_contains($1, name)) AS verdicts,
            max_by(name, sequence) FILTER (list_contains($2, name)) AS said
        FROM decided
        WHERE kind = 'feedback' AND source IS DISTINCT FROM 'agent' GROUP BY rollout_id
    """
    rows = _rows(ask, select, [list(VERDICTS), list(OUTCOMES)])
    return [
        (row["rollout_id"], {"verdicts": tuple(row["verdicts"] or ()), "said": row["said"]})
        for row in rows
    ]


def _costs(ask: Query) -> Fields:
    """Per rollout, what its spans cost and what the others used; every attempt counts."""
    select = """
        WITH used AS (
            SELECT rollout_id, kind, coalesce(policy, '') AS policy,
                -- What telemetry says that a step or a model call costs is paid for in the calls
                -- recorded here, or in those inside the step; a tool's cost is nobody else's.
                coalesce(
                    CASE WHEN kind IN ('model_call', 'tool_call') THEN cost_usd END,
                    try_cast(attributes->>'$.cost_usd' AS DOUBLE)
                ) AS cost,
                -- Choices of one call share its prompt.
                CASE WHEN coalesce(try_cast(attributes->>'$.choice' AS BIGINT), 0) > 0 THEN 0
                ELSE coalesce(
                    try_cast(attributes->>'$.prompt_tokens' AS BIGINT),
                    try_cast(attributes->>'$.usage.input_tokens' AS BIGINT),
                    try_cast(attributes->>'$."gen_ai.usage.input_tokens"' AS BIGINT)
                ) END AS input,
                coalesce(
                    len(logprobs),
                    try_cast(attributes->>'$.usage.output_tokens' AS BIGINT),
                    try_cast(attributes->>'$."gen_ai.usage.output_tokens"' AS BIGINT)
                ) AS output
            FROM spans
        )
        SELECT rollout_id, policy,
            sum(cost) AS cost,
            count(*) FILTER (open) AS calls,
            coalesce(sum(input) FILTER (open), 0)::BIGINT AS input,
            coalesce(sum(output) FILTER (open), 0)::BIGINT AS output,
            count(*) FILTER (open AND (input IS NULL OR output IS NULL)) AS uncounted
        FROM (SELECT *, kind = 'model_call' AND cost IS NULL AS open FROM used)
        GROUP BY rollout_id, policy ORDER BY rollout_id, policy
    """
    found: dict[str, dict[str, Any]] = {}
    for row in ask(select).to_pylist():
        fields = found.setdefault(row["rollout_id"], {"cost_usd": None, "usage": ()})
        if row["cost"] is not None:
            fields["cost_usd"] = (fields["cost_usd"] or 0.0) + row["cost"]
        if row["calls"]:
            used = Usage(row["policy"], row["input"], row["output"], row["uncounted"])
            fields["usage"] += (used,)
    return list(found.items())
