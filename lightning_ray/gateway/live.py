"""Live traffic at the door: keys, conversations, and what people say of them.

Invariant: a caller reaches only what its key allows, and feedback that was acknowledged is on disk.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway.config import ServingConfig
from lightning_ray.gateway.desk import LIVE, Desk, LivePolicy, Passage
from lightning_ray.gateway.given_rewards import check_whole, finite, step_number
from lightning_ray.spans import SpanKind, span
from lightning_ray.spans.rewards import OUTCOMES, PERSON, SERVICE, VERDICTS

ROLLOUT_HEADER = "x-lightning-ray-rollout"
"""On every reply of live traffic: what feedback names."""

_REPLY_ID = re.compile(rf"({LIVE}[0-9a-f]+-[0-9a-f]+)")
_TEXT_LIMIT = 100_000


@dataclass(frozen=True)
class LiveDoor:
    """What the door needs to serve live traffic."""

    desk: ActorHandle
    config: ServingConfig
    run_id: str


class LiveDesk:
    """The actor around `Desk`: the clock, and the tags of live calls."""

    def __init__(self, run_id: str, keys: Mapping[str, str], idle_s: float):
        self._desk = Desk(run_id, keys, idle_s)

    async def caller(self, key: str) -> str | None:
        """The name of the caller with this key."""
        return self._desk.caller(key)

    async def admit(
        self, caller: str, conversation: str, policy: str, trace_id: str = ""
    ) -> Passage | None:
        """Who answers the next call of a conversation."""
        return self._desk.admit(caller, conversation, policy, time.monotonic(), trace_id)

    async def locate(
        self, caller: str, names: list[str], traces: dict[str, str]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Where telemetry of a caller belongs."""
        return self._desk.locate(caller, names, traces, time.monotonic())

    async def release(self, policies: list[LivePolicy]) -> None:
        """Takes on where releases stand."""
        for policy in policies:
            self._desk.release(policy)

    async def owns(self, caller: str, rollout_id: str) -> bool:
        """Whether a conversation is this caller's."""
        return self._desk.owns(caller, rollout_id)

    async def active_on(self, policy: str, version: int) -> int:
        """How many conversations stay on a version."""
        return self._desk.active_on(policy, version, time.monotonic())


class DeskClient:
    """The desk as the job that serves sees it: with timeouts, and without Ray's exceptions."""

    def __init__(self, actor: ActorHandle):
        self.actor = actor

    def release(self, policies: list[LivePolicy], timeout_s: float = 10.0) -> None:
        """Takes on where releases stand."""
        self._get(self.actor.release.remote(policies), timeout_s, "take on a release")

    def active_on(self, policy: str, version: int, timeout_s: float = 10.0) -> int:
        """How many conversations stay on a version."""
        counting = self.actor.active_on.remote(policy, version)
        found: int = self._get(counting, timeout_s, "count conversations")
        return found

    def _get(self, reference: "ray.ObjectRef", timeout_s: float, what: str) -> Any:
        try:
            return ray.get(reference, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise InfrastructureError(f"the desk did not {what} in {timeout_s:g} s") from error
        except ray.exceptions.RayActorError as error:
            raise InfrastructureError(f"the desk of live traffic died: {error}") from error


def start_desk(run_id: str, keys: Mapping[str, str], idle_s: float) -> DeskClient:
    """Starts the desk; `keys` as in `Desk`."""
    actor = ray.remote(LiveDesk).options(num_cpus=0, max_concurrency=10_000)
    return DeskClient(actor.remote(run_id, dict(keys), idle_s))


@dataclass(frozen=True)
class Feedback:
    """What somebody said of a conversation or of one reply in it."""

    rollout_id: str
    reply_id: str | None
    verdict: str | None
    correction: str | None
    rewards: Mapping[str, float]
    by: str | None
    comment: str | None
    source: str = SERVICE
    """"person" or "service"."""
    step: int | None = None
    """The step that it is about; None is the conversation as a whole."""
    outcome: str | None = None
    """What the conversation came to."""

    def spans(self, run_id: str, caller: str) -> list[dict[str, Any]]:
        """As spans of the conversation's attempt."""
        place: dict[str, Any] = {
            "run_id": run_id,
            "rollout_id": self.rollout_id,
            "attempt_id": f"{self.rollout_id}/1",
        }
        said = {
            "by": self.by,
            "caller": caller,
            "reply_id": self.reply_id,
            "correction": self.correction,
            "comment": self.comment,
        }
        attributes = {name: value for name, value in said.items() if value is not None}
        about: dict[str, Any] = {"source": self.source, "step": self.step, "attributes": attributes}
        rows = []
        if self.verdict is not None:
            rows.append(span(SpanKind.FEEDBACK, self.verdict, **place, **about))
        if self.outcome is not None:
            rows.append(span(SpanKind.FEEDBACK, self.outcome, **place, **about | {"step": None}))
        for name, value in self.rewards.items():
            rows.append(span(SpanKind.REWARD, name, **place, value=value, **about))
        return rows


def parse_feedback(body: Mapping[str, Any]) -> Feedback:
    """Reads the body of a POST to /v1/feedback. Raises ValueError, saying what to change."""
    known = {"rollout", "reply_id", "verdict", "correction", "reward", "rewards", "by", "comment"}
    known |= {"source", "step", "outcome"}
    if unknown := sorted(set(body) - known):
        raise ValueError(f"{unknown[0]!r} is no field; the fields are: {', '.join(sorted(known))}")
    reply_id, verdict = _text(body, "reply_id"), _text(body, "verdict")
    rollout_id = _text(body, "rollout")
    if rollout_id is None and reply_id is not None:
        found = _REPLY_ID.search(reply_id)
        rollout_id = found[1] if found else None
    if rollout_id is None:
        raise ValueError(
            f"name the conversation: `rollout`, as the header {ROLLOUT_HEADER} of a reply says it, "
            "or `reply_id`, the id of a reply"
        )
    if verdict is not None and verdict not in VERDICTS:
        raise ValueError(f"verdict {verdict!r} is none of {', '.join(VERDICTS)}")
    correction = _text(body, "correction")
    outcome = _text(body, "outcome")
    if outcome is not None and outcome not in OUTCOMES:
        raise ValueError(f"outcome {outcome[:100]!r} is none of {', '.join(OUTCOMES)}")
    if verdict == "correct" and correction is None:
        raise ValueError("verdict 'correct' needs `correction`: what the answer should have been")
    by, source = _text(body, "by"), _text(body, "source")
    if source is None:
        # Whoever has a name is a person, unless it is said otherwise.
        source = SERVICE if by is None else PERSON
    if source not in (PERSON, SERVICE):
        raise ValueError(f"source {source[:100]!r} is neither {PERSON!r} nor {SERVICE!r}")
    rewards = _rewards(body)
    if verdict is None and outcome is None and not rewards:
        raise ValueError("say something: `verdict`, `outcome`, `reward` or `rewards`")
    return Feedback(
        rollout_id,
        reply_id,
        verdict,
        correction,
        rewards,
        by,
        _text(body, "comment"),
        source,
        step_number(body),
        outcome,
    )


def _rewards(body: Mapping[str, Any]) -> dict[str, float]:
    named = body.get("rewards")
    if named is not None and not isinstance(named, dict):
        raise ValueError("`rewards` is to be an object of names and numbers")
    given: dict[str, Any] = dict(named or {})
    if body.get("reward") is not None:
        given["reward"] = body["reward"]
    for name in given:
        check_whole(name)
    return {name: finite(name, value) for name, value in given.items()}


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _TEXT_LIMIT:
        raise ValueError(f"`{name}` is to be a text of at most {_TEXT_LIMIT} characters")
    check_whole(value)
    return value
