"""Rewards that an attempt gives itself: what a POST to its `/v1/rewards` may say.

Agents that were written for Agent Lightning 1.0 post events, of which some are rewards. They are
taken here as well, so that such an agent needs another address and nothing else.

Invariant: what is stored is finite and named, and says that the agent gave it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.spans import SpanKind, span
from lightning_ray.spans.rewards import AGENT

_FIELDS = frozenset({"name", "value", "step", "comment"})
_NAME_LIMIT = 200
_COMMENT_LIMIT = 10_000
_MOST = 1000
_DATA_LIMIT = 1 << 20
_LAST_STEP = 2**31 - 1


@dataclass(frozen=True)
class GivenReward:
    """One reward as it was posted."""

    name: str
    value: float
    step: int | None
    comment: str | None
    data: Mapping[str, Any] = field(default_factory=dict)
    """What an event said beside its value."""

    def span(self, run_id: str, rollout_id: str, attempt_id: str) -> dict[str, Any]:
        """As a span of the attempt that gave it."""
        return span(
            SpanKind.REWARD,
            self.name,
            run_id=run_id,
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            value=self.value,
            step=self.step,
            source=AGENT,
            attributes=(
                {**self.data, **({} if self.comment is None else {"comment": self.comment})} or None
            ),
        )


@dataclass(frozen=True)
class GivenEvent:
    """An event that is no reward: something that the agent wants to have noted."""

    name: str
    data: Mapping[str, Any]

    def span(self, run_id: str, rollout_id: str, attempt_id: str) -> dict[str, Any]:
        """As a step of the attempt that told it."""
        return span(
            SpanKind.AGENT_STEP,
            self.name,
            run_id=run_id,
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            source=AGENT,
            attributes=dict(self.data) or None,
        )


def parse_rewards(body: Any) -> Sequence[GivenReward | GivenEvent]:
    """Reads what was posted. Raises ValueError, saying what to change.

    One reward is `{"name": "reward", "value": 1.0, "step": 3}`, of which `name` and `step` may be
    left out; several are a list of such, or an object of names and numbers. An event is
    `{"event_type": "reward", "data": {"value": 1.0, "reason": "..."}}`, or of another type with any
    data.
    """
    if isinstance(body, dict) and isinstance(body.get("event_type"), str):
        return [_event(body["event_type"], body.get("data", {}))]
    if isinstance(body, list):
        given = [_reward(one) for one in body]
    elif isinstance(body, dict) and "value" in body:
        given = [_reward(body)]
    elif isinstance(body, dict):
        given = [_reward({"name": name, "value": value}) for name, value in body.items()]
    else:
        given = [_reward({"value": body})]
    if not given or len(given) > _MOST:
        raise ValueError(f"give 1 to {_MOST} rewards at a time, not {len(given)}")
    return given


def _event(kind: str, data: Any) -> GivenReward | GivenEvent:
    _check_texts(kind, "", "event_type")
    if not isinstance(data, dict):
        raise ValueError("`data` of an event is to be an object")
    try:
        size = len(json.dumps(data, ensure_ascii=False, allow_nan=False).encode())
    except ValueError as error:
        raise ValueError(f"`data` of an event is no JSON that can be kept: {error}") from error
    if size > _DATA_LIMIT:
        raise ValueError(f"`data` of an event is {size} bytes; give at most {_DATA_LIMIT}")
    if kind != "reward":
        return GivenEvent(kind, data)
    if "value" not in data:
        raise ValueError('a reward is an event {"event_type": "reward", "data": {"value": 1.0}}')
    rest = {name: value for name, value in data.items() if name != "value"}
    return GivenReward("reward", finite("reward", data["value"]), None, None, rest)


def _reward(one: Any) -> GivenReward:
    if not isinstance(one, dict) or "value" not in one:
        raise ValueError('a reward is an object: {"name": "reward", "value": 1.0}')
    if unknown := sorted(set(one) - _FIELDS):
        raise ValueError(
            f"{str(unknown[0])[:100]!r} is no field of a reward; the fields are: "
            f"{', '.join(sorted(_FIELDS))}"
        )
    name = one.get("name", "reward")
    comment = one.get("comment")
    if comment is not None and (not isinstance(comment, str) or len(comment) > _COMMENT_LIMIT):
        raise ValueError(f"`comment` is to be a text of at most {_COMMENT_LIMIT} characters")
    _check_texts(name, comment or "", "name")
    return GivenReward(name, finite(name, one["value"]), step_number(one), comment)


def _check_texts(name: Any, comment: str, field_name: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= _NAME_LIMIT:
        raise ValueError(f"`{field_name}` is to be a text of 1 to {_NAME_LIMIT} characters")
    for text in (name, comment):
        check_whole(text)


def finite(name: str, value: Any) -> float:
    """A reward's value. Raises ValueError for anything but a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        good = number and math.isfinite(value)
    except OverflowError:
        good = False
    if not good:
        raise ValueError(f"reward {name!r} is {str(value)[:100]}: give a finite number")
    return float(value)


def check_whole(text: str) -> None:
    """Raises ValueError for a text that no encoding can write."""
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("a text has half of a character in it (an unpaired surrogate)")


def step_number(body: Mapping[str, Any]) -> int | None:
    """The step that a reward is for, counted from 0; None for the attempt as a whole."""
    step = body.get("step")
    if step is None:
        return None
    whole = isinstance(step, int) and not isinstance(step, bool)
    if not whole or not 0 <= step <= _LAST_STEP:
        raise ValueError("`step` is to be a whole number, the first step is 0")
    return int(step)
