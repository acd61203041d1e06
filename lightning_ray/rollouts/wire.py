"""Events of the lifecycle as lines of JSON, and back.

Invariant: `decode(encode(event))` equals the event, for every event that the lifecycle makes.
"""

import json
from dataclasses import asdict
from typing import Any

from lightning_ray.policies import PromptVersion
from lightning_ray.rollouts.lives import Attempt, Event, Life
from lightning_ray.rollouts.types import AttemptOutcome, AttemptStatus, RolloutSpec, RolloutStatus


def encode(event: Event) -> bytes:
    """One line without its end. Raises TypeError or ValueError for a task that is no JSON."""
    kind, now, name, *rest = event
    match kind:
        case "enqueue":
            rest = [_spec_out(rest[0])]
        case "begin":
            rest = [rest[0].hex(), rest[1], rest[2].hex()]
        case "end":
            rest = [_outcome_out(rest[0])]
        case "restore":
            rest = [life_out(rest[0])]
    return json.dumps([kind, now, name, *rest], separators=(",", ":")).encode()


def decode(line: bytes) -> Event:
    """The event of a line. Raises ValueError, TypeError or KeyError for what is none."""
    kind, now, name, *rest = json.loads(line)
    match kind:
        case "enqueue":
            rest = [_spec_in(rest[0])]
        case "begin":
            rest = [bytes.fromhex(rest[0]), rest[1], bytes.fromhex(rest[2])]
        case "end":
            rest = [_outcome_in(rest[0])]
        case "restore":
            rest = [life_in(rest[0])]
    return (kind, now, name, *rest)


def life_out(life: Life) -> dict[str, Any]:
    """A rollout as JSON values."""
    return {
        "spec": _spec_out(life.spec),
        "status": life.status.value,
        "attempts": [_attempt_out(attempt) for attempt in life.attempts],
        "outcome": _outcome_out(life.outcome),
        "tries": life.tries,
        "faults": life.faults,
        "retried": life.retried,
        "ticket": life.ticket,
    }


def life_in(values: dict[str, Any]) -> Life:
    """The rollout of `life_out`."""
    attempts = [_attempt_in(attempt) for attempt in values["attempts"]]
    own = {
        "spec": _spec_in(values["spec"]),
        "status": RolloutStatus(values["status"]),
        "attempts": attempts,
        "outcome": _outcome_in(values["outcome"]),
    }
    return Life(**(values | own))


def _spec_out(spec: RolloutSpec) -> dict[str, Any]:
    values = {key: value for key, value in vars(spec).items() if value != _DEFAULTS.get(key)}
    if spec.prompts:
        values["prompts"] = [asdict(prompt) for prompt in spec.prompts]
    return values


def _spec_in(values: dict[str, Any]) -> RolloutSpec:
    if "prompts" in values:
        values["prompts"] = tuple(
            PromptVersion(
                **(prompt | {"demonstrations": tuple(map(tuple, prompt["demonstrations"]))})
            )
            for prompt in values["prompts"]
        )
    if "retry_on" in values:
        values["retry_on"] = tuple(map(AttemptStatus, values["retry_on"]))
    return RolloutSpec(**values)


def _outcome_out(outcome: AttemptOutcome | None) -> dict[str, Any] | None:
    return None if outcome is None else dict(vars(outcome))


def _outcome_in(values: dict[str, Any] | None) -> AttemptOutcome | None:
    if values is None:
        return None
    return AttemptOutcome(**(values | {"status": AttemptStatus(values["status"])}))


def _attempt_out(attempt: Attempt) -> dict[str, Any]:
    own = {
        "digest": attempt.digest.hex(),
        "request": attempt.request.hex(),
        "outcome": _outcome_out(attempt.outcome),
    }
    return vars(attempt) | own


def _attempt_in(values: dict[str, Any]) -> Attempt:
    own = {
        "digest": bytes.fromhex(values["digest"]),
        "request": bytes.fromhex(values["request"]),
        "status": AttemptStatus(values["status"]),
        "outcome": _outcome_in(values["outcome"]),
    }
    return Attempt(**(values | own))


_DEFAULTS = {
    key: value
    for key, value in vars(RolloutSpec("", "", {}, 0.0)).items()
    if key not in ("rollout_id", "task_id", "task", "timeout_s")
}
