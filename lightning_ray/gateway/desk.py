"""The desk of live traffic: which conversation a call belongs to, and which version answers it.

Invariants: a conversation stays on the version that it began with, for as long as that version has
engines; a new conversation goes where the release stands at that moment; what a caller learns of
one conversation opens no other caller's. `now` is a number of seconds from one clock.
"""

import hashlib
import hmac
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_ray.gateway.answerers import Answerer
from lightning_ray.policies import PromptVersion
from lightning_ray.rollouts import Identity

LIVE = "live-"
_TAG_LENGTH = 8
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True)
class LivePolicy:
    """How the calls for one policy are shared out, as the job that serves last said."""

    policy: str
    answerers: Mapping[int, Answerer]
    """By version; one that has no engines is not in it. An upstream is version 0."""
    champion: int
    candidate: int | None = None
    share: float = 0.0
    prompts: tuple[PromptVersion, ...] = ()


@dataclass(frozen=True)
class Passage:
    """Leave to go on: whose call it is, and who answers."""

    identity: Identity
    answerer: Answerer
    version: int


@dataclass
class _Conversation:
    rollout_id: str
    seen: float
    versions: dict[str, int] = field(default_factory=dict)
    """The version that answers, for each policy that was asked."""
    calls: int = 0


class Desk:
    """Conversations and releases, without network or clock; one for all replicas of the door."""

    def __init__(self, run_id: str, keys: Mapping[str, str], idle_s: float, limit: int = 100_000):
        """`keys` are the callers' names and the SHA-256 of their keys, in hexadecimal digits.

        A conversation without a call for `idle_s` seconds is over; the newest `limit` are kept.
        """
        self._run_id = run_id
        self._keys = dict(keys)
        self._idle_s = idle_s
        self._limit = limit
        self._policies: dict[str, LivePolicy] = {}
        self._conversations: OrderedDict[tuple[str, str], _Conversation] = OrderedDict()
        self._traces: OrderedDict[tuple[str, str], str] = OrderedDict()

    def caller(self, key: str) -> str | None:
        """The name of the caller with this key, or None."""
        digest = digest_of(key)
        found = None
        for name, known in self._keys.items():
            # All are compared, so that the time says nothing.
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def release(self, policy: LivePolicy) -> None:
        """Takes on where a policy's release stands; from the next call on."""
        self._policies[policy.policy] = policy

    def admit(
        self, caller: str, conversation: str, policy: str, now: float, trace_id: str = ""
    ) -> Passage | None:
        """Who answers the next call of a conversation; None when nobody serves the policy.

        `trace_id` is the trace that the call is part of, where it says one.
        """
        live = self._policies.get(policy)
        if live is None or live.champion not in live.answerers:
            return None
        entry = self._conversation(caller, conversation, now)
        version = entry.versions.get(policy)
        if version is None or version not in live.answerers:
            version = self._choose(live, entry.rollout_id)
            entry.versions[policy] = version
        entry.calls += 1
        self._follow(caller, trace_id, entry.rollout_id)
        identity = Identity(
            self._run_id, entry.rollout_id, f"{entry.rollout_id}/1", prompts=live.prompts
        )
        return Passage(identity, live.answerers[version], version)

    def locate(
        self, caller: str, names: Iterable[str], traces: Mapping[str, str], now: float
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Where telemetry of a caller belongs: rollout ids by name, and by trace id.

        `names` are "rollout:ID", of which only the caller's own are found, and "header:NAME", a
        conversation that begins here if it has not begun. `traces` are the traces of the spans,
        each with a name that one of its spans has, or with an empty one: a trace belongs where its
        calls went, else where it was named first.
        """
        named = {name: self._named(caller, name, now) for name in names}
        placed: dict[str, str | None] = {}
        for trace_id, name in traces.items():
            rollout = self._traces.get((caller, trace_id))
            if rollout is None and name:
                rollout = named[name] if name in named else self._named(caller, name, now)
                if rollout is not None:
                    self._follow(caller, trace_id, rollout)
            placed[trace_id] = rollout
        return _present(named), _present(placed)

    def owns(self, caller: str, rollout_id: str) -> bool:
        """Whether a conversation is this caller's; known from its id, however old it is."""
        return rollout_id.startswith(owner_of(caller))

    def active_on(self, policy: str, version: int, now: float) -> int:
        """How many conversations that are not over stay on a version."""
        return sum(
            entry.versions.get(policy) == version and now - entry.seen <= self._idle_s
            for entry in self._conversations.values()
        )

    def _named(self, caller: str, name: str, now: float) -> str | None:
        form, _, said = name.partition(":")
        if form == "rollout":
            return said if self.owns(caller, said) else None
        return self._conversation(caller, name, now).rollout_id

    def _follow(self, caller: str, trace_id: str, rollout_id: str) -> None:
        if trace_id:
            self._traces[caller, trace_id] = rollout_id
            self._traces.move_to_end((caller, trace_id))
            while len(self._traces) > self._limit:
                self._traces.popitem(last=False)

    def _choose(self, live: LivePolicy, rollout_id: str) -> int:
        if live.candidate is None or live.candidate not in live.answerers:
            return live.champion
        # By the conversation's own id, which is random: no state, and exact over many.
        place = int(hashlib.sha256(rollout_id.encode()).hexdigest()[:8], 16) / 2**32
        return live.candidate if place < live.share else live.champion

    def _conversation(self, caller: str, conversation: str, now: float) -> _Conversation:
        key = (caller, conversation)
        entry = self._conversations.get(key)
        if entry is None or now - entry.seen > self._idle_s:
            entry = _Conversation(owner_of(caller) + secrets.token_hex(8), now)
            self._conversations[key] = entry
        entry.seen = now
        self._conversations.move_to_end(key)
        while len(self._conversations) > self._limit:
            self._conversations.popitem(last=False)
        return entry


def conversation_of(headers: Mapping[str, str], header: str, body: Mapping[str, Any]) -> str:
    """What tells a caller's conversations apart: a header, or else how the conversation begins.

    The beginning is everything up to the first message of the user, which every later request of
    the same conversation repeats. Two that begin alike are one, unless the header tells them apart.
    """
    named = headers.get(header)
    if named:
        return "header:" + named
    parts: list[Any] = [body.get("model"), body.get("system"), body.get("instructions")]
    turns = body.get("messages", body.get("input", body.get("prompt")))
    if isinstance(turns, list):
        for turn in turns:
            parts.append(turn)
            if isinstance(turn, dict) and turn.get("role") == "user":
                break
    else:
        parts.append(turns)
    content = json.dumps(parts, sort_keys=True, default=str)
    return "begins:" + hashlib.sha256(content.encode()).hexdigest()


def trace_of(headers: Mapping[str, str]) -> str:
    """The trace that a call is part of, as its header `traceparent` says (W3C); else empty."""
    found = _TRACEPARENT.match(headers.get("traceparent", ""))
    return found[1] if found and found[1] != "0" * 32 else ""


def digest_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def _present(found: Mapping[str, str | None]) -> dict[str, str]:
    return {key: value for key, value in found.items() if value is not None}


def owner_of(caller: str) -> str:
    """How the ids of a caller's rollouts begin."""
    tag = hashlib.sha256(b"caller:" + caller.encode()).hexdigest()[:_TAG_LENGTH]
    return f"{LIVE}{tag}-"
