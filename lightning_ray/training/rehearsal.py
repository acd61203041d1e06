"""The rehearsal: a few rollouts before a run begins, so that what cannot work is said at once.

An agent that cannot run, a grader that raises and a role that nobody plays cost seconds to find out
here, and minutes after a whole evaluation.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.errors import UserError
from lightning_ray.gateway import Role, describe
from lightning_ray.rollouts import RolloutRecord, RolloutStatus
from lightning_ray.spans import SpanKind

REHEARSED_TASKS = 4


def why(record: RolloutRecord) -> str:
    """Why a rollout came to no reward: its last attempt's status and the end of its stderr."""
    if record.outcome is None:
        return f"{record.spec.rollout_id}: {record.status.value}"
    error = " | ".join(line for line in record.outcome.error.splitlines() if line.strip())
    tail = error if len(error) <= 400 else error[:120] + " ... " + error[-270:]
    return f"{record.spec.rollout_id} ({record.outcome.status.value}): {tail}"


def check_rehearsal(
    records: Sequence[RolloutRecord],
    spans: pa.Table,
    roles: Sequence[Role],
    trained: Sequence[str],
) -> str | None:
    """What a person should know before the run goes on, or None; `trained` are policies.

    `spans` are those of the records' latest attempts. Raises UserError when no rollout came to a
    reward, or when the agent asked for no model at all.
    """
    if not any(record.status is RolloutStatus.SUCCEEDED for record in records):
        raise UserError(
            f"none of {len(records)} rollouts tried before the run came to a reward; "
            f"the first: {why(records[0])}"
        )
    calls = spans.filter(pc.equal(spans["kind"], SpanKind.MODEL_CALL.value))
    if calls.num_rows == 0:
        raise UserError(
            "the agent ended well and asked no model: it must take its address from "
            "OPENAI_BASE_URL or ANTHROPIC_BASE_URL"
        )
    answered = set(calls["policy"].to_pylist())
    if not (idle := [policy for policy in trained if policy not in answered]):
        return None
    asked = ", ".join(sorted(set(calls["role"].to_pylist())))
    return (
        f"no call of {len(records)} rollouts was for {' and '.join(idle)}, which is to be trained, "
        f"only for {asked}; the roles: {describe(roles)}"
    )


def no_call_for(trained: Sequence[str], roles: Sequence[Role]) -> UserError:
    """The error for a step in which none of the trained policies was ever asked."""
    names = " and ".join(trained)
    return UserError(
        f"no rollout of the step asked the policy {names}, which is to be trained; make "
        f"gateway.roles match what the agent sends: {describe(roles)}"
    )
