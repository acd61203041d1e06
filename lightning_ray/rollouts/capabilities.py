"""Which capabilities are open, for whom, and which worker has their attempts.

Invariant: neither a capability nor a request is kept, only their hashes: whoever reads the queue's
memory or its journal learns none that opens a door.
"""

import base64
import hashlib
import hmac
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from lightning_ray.rollouts.lives import Attempt
from lightning_ray.rollouts.roster import NOWHERE, Roster
from lightning_ray.rollouts.types import Identity, RolloutSpec


def digest(secret: str) -> bytes:
    """What is kept of a capability or a request."""
    return hashlib.sha256(secret.encode()).digest()


def capability_of(request: str, attempt_id: str) -> str:
    """The capability of an attempt that was asked for with `request`.

    Of the request, so that asking again gives the same one and nobody need keep it.
    """
    made = hmac.digest(request.encode(), attempt_id.encode(), "sha256")
    return base64.urlsafe_b64encode(made[:24]).decode()


class Capabilities:
    """Of the attempts of one run."""

    def __init__(self, run_id: str, linger_s: float):
        """`linger_s`: so long after its end an attempt may still tell, seconds."""
        self._run_id = run_id
        self._linger_s = linger_s
        self._open: dict[bytes, Identity] = {}
        self._closed: dict[bytes, Identity] = {}
        self._until: deque[tuple[float, bytes]] = deque()
        self._requests: dict[bytes, str] = {}
        self._held: dict[str, set[str]] = {}
        self._roster: Roster | None = None

    def show(self, roster: Roster) -> None:
        """From now on whoever is let in is also seen in a roster, which is empty."""
        self._roster = roster
        for key, identity in self._open.items():
            self._open[key] = replace(identity, seat=roster.take(key))

    def open(self, attempt: Attempt, spec: RolloutSpec) -> None:
        """An attempt begins."""
        self._requests[attempt.request] = attempt.attempt_id
        self._held.setdefault(attempt.worker, set()).add(attempt.attempt_id)
        self._open[attempt.digest] = Identity(
            self._run_id,
            spec.rollout_id,
            attempt.attempt_id,
            spec.prompts,
            spec.note_messages,
            spec.sampling,
            spec.answered_by,
            NOWHERE if self._roster is None else self._roster.take(attempt.digest),
        )

    def close(self, attempt: Attempt, now: float) -> None:
        """An attempt is over: from now on it may only tell, and not for long."""
        attempt.live = False
        self._requests.pop(attempt.request, None)
        if (held := self._held.get(attempt.worker)) is not None:
            held.discard(attempt.attempt_id)
            if not held:
                del self._held[attempt.worker]
        identity = self._open.pop(attempt.digest, None)
        if identity is not None and self._roster is not None:
            self._roster.leave(identity.seat)
        if identity is not None and self._linger_s > 0:
            self._closed[attempt.digest] = identity
            self._until.append((now + self._linger_s, attempt.digest))

    def expire(self, now: float) -> None:
        """Closes to those that have lingered long enough."""
        while self._until and self._until[0][0] < now:
            self._closed.pop(self._until.popleft()[1], None)

    def is_open(self, attempt: Attempt) -> bool:
        """Whether an attempt's agent may go on."""
        return attempt.digest in self._open

    def resolve(self, capability: str, telling: bool) -> Identity | None:
        """Whom a capability stands for; `telling`, also a while after its attempt's end."""
        key = digest(capability)
        identity = self._open.get(key)
        return self._closed.get(key) if identity is None and telling else identity

    @property
    def lingering(self) -> int:
        """Attempts that are over and may still tell."""
        return len(self._closed)

    def asked_with(self, request: str) -> str | None:
        """The attempt that was handed out for a request and is not over."""
        return self._requests.get(digest(request))

    def held_by(self, worker: str) -> list[str]:
        """The attempts of a worker, sorted."""
        return sorted(self._held.get(worker, ()))

    def held(self) -> dict[str, int]:
        """How many attempts each worker has."""
        return {worker: len(attempts) for worker, attempts in self._held.items() if attempts}

    def all_held(self) -> Iterable[str]:
        """The attempts of all workers."""
        return [attempt_id for attempts in self._held.values() for attempt_id in attempts]
