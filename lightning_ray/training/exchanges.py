"""What was said in rollouts, read from their spans: the agent's own prompts, and trials of others.

Invariant: what is read is text as it was sent and answered, never tokens turned back into text: a
call that an upstream answered tells it itself, and for one of ours the gateway keeps it where the
rollout asks for it (`RolloutSpec.note_messages`).
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from lightning_ray.algorithms.prompts import Exchange, Trial
from lightning_ray.errors import UserError
from lightning_ray.gateway import asked, system_prompt
from lightning_ray.rollouts import RolloutRecord
from lightning_ray.spans import SpanKind, SpanStatus, whole_requests
from lightning_ray.training.rolling import came_to_reward

_TOLD = (SpanKind.MODEL_CALL.value, SpanKind.MESSAGE.value)
# Nothing is said in answer to these.
_UNANSWERED = ("/v1/embeddings", "/v1/messages/count_tokens")
_COLUMNS = ["span_id", "kind", "name", "attempt_id", "policy", "status", "attributes"]
_SHOWN = 60


def find_seed(spans: pa.Table, policy: str, named: str | None) -> str:
    """The agent's own system prompt in the calls of `policy`; "" where it sends none.

    `named` is what the user says it is, or a part of it. Raises UserError when that occurs in no
    call, or when the calls differ and nothing is named.
    """
    prompts = Counter(
        system_prompt(path, told["request"]) for _, path, told in _told(spans, policy)
    )
    if not prompts:
        raise UserError(
            f"no call of the rollouts tried was for policy {policy}: nothing to improve"
        )
    if named is not None:
        if not any(named in prompt for prompt in prompts):
            raise UserError(
                f"the prompt {_short(named)} occurs in no call for policy {policy}; the agent's "
                f"system prompts are: {_list(prompts)}"
            )
        return named
    if len(prompts) > 1:
        raise UserError(
            f"the calls for policy {policy} have {len(prompts)} different system prompts: "
            f"{_list(prompts)}; name the one to optimise, or a part that all of them have, "
            "with prompt.seed='\"TEXT\"'"
        )
    return next(iter(prompts))


def as_trials(
    records: Sequence[RolloutRecord], spans: pa.Table, policy: str, seed: str
) -> list[Trial]:
    """One trial per rollout, in order; `spans` are those of the records' latest attempts.

    A trial's exchanges are the calls that the prompt under test was put into: those of `policy`
    whose system prompt held `seed`, which a span tells by its attribute `prompt`, or by `seed`
    itself where nothing was put in.
    """
    said: dict[str, list[Exchange]] = {}
    errors = {
        row["attempt_id"]: json.loads(row["attributes"] or "{}").get("stderr", "")
        for row in spans.select(_COLUMNS).to_pylist()
        if row["kind"] == SpanKind.RESOURCE.value
    }
    for attempt_id, path, told in _told(spans, policy):
        if "prompt" in told or seed in system_prompt(path, told["request"]):
            said.setdefault(attempt_id, []).append(_exchange(told))
    trials = []
    for record in records:
        task_id, task = record.spec.task_id, record.spec.task
        if not came_to_reward(record) or record.outcome is None:
            trials.append(Trial(task_id, None, task))
            continue
        rewards, printed = record.outcome.rewards, record.outcome.result
        calls = tuple(said.get(record.attempt_id, ()))
        stderr = errors.get(record.attempt_id, "")
        trials.append(Trial(task_id, rewards["reward"], task, rewards, calls, printed, stderr))
    return trials


def cost_usd(spans: pa.Table) -> float:
    """What the upstreams' answers cost, US dollars; 0 where no price is set."""
    costs = (
        json.loads(attributes or "{}").get("cost_usd")
        for attributes in spans["attributes"].to_pylist()
    )
    return sum(cost for cost in costs if cost is not None)


def _told(spans: pa.Table, policy: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(attempt, path, attributes) of the policy's calls that tell what was said, in order."""
    requests = whole_requests(spans)
    for row in spans.select(_COLUMNS).to_pylist():
        if row["kind"] not in _TOLD or row["policy"] != policy:
            continue
        if row["status"] != SpanStatus.OK.value or row["name"] in _UNANSWERED:
            continue
        told = json.loads(row["attributes"] or "{}")
        if row["span_id"] in requests and "reply" in told:
            yield row["attempt_id"], row["name"], {**told, "request": requests[row["span_id"]]}


def _exchange(told: Mapping[str, Any]) -> Exchange:
    question, reply = asked(told["request"]), told["reply"]
    calls = reply["tool_calls"]
    if question and not calls:
        return Exchange(question, reply["text"])
    given = question or json.dumps(_last(told["request"]), ensure_ascii=False)
    said = reply["text"] if not calls else json.dumps(reply, ensure_ascii=False)
    return Exchange(given, said, plain=False)


def _last(request: Mapping[str, Any]) -> object:
    """The newest thing in a request that ends otherwise than with a user's text."""
    for name in ("messages", "input"):
        given = request.get(name)
        if isinstance(given, list) and given:
            return given[-1]
    return request.get("prompt", "")


def _list(prompts: Mapping[str, int]) -> str:
    shown = [_short(prompt) for prompt in list(prompts)[:5]]
    more = len(prompts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= _SHOWN else flat[: _SHOWN - 4] + " ...")
