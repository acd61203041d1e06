"""What the door measures of itself, for Ray's Prometheus endpoint."""

import asyncio
from functools import cache
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from lightning_ray.gateway.visits import Visit

SECONDS = [0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]
"""Upper bounds of the histograms' buckets."""
TELL_EVERY_S = 0.25
"""How often the gauge is set, seconds; Ray collects it every few."""


class Meters:
    """The metrics of one replica; names begin with `lightning_ray_gateway_`."""

    def __init__(self) -> None:
        whose = ("policy", "role")
        name = "lightning_ray_gateway_"
        self._calls = Counter(
            name + "calls",
            "Calls of agents by protocol and HTTP status; status 0 is a client that left.",
            (*whose, "path", "status"),
        )
        self._seconds = Histogram(
            name + "call_seconds", "From a call's request to its last byte.", SECONDS, whose
        )
        self._first = Histogram(
            name + "first_byte_seconds", "From a call's request to its first byte.", SECONDS, whose
        )
        self._inside = Gauge(name + "requests_inside", "Requests that are being answered.")
        self._replayed = Counter(
            name + "replayed_calls", "Retries that got the reply of the call they repeat.", whose
        )
        self._count = 0
        self._telling: asyncio.TimerHandle | None = None

    def enter(self) -> None:
        """A request has come."""
        self._count += 1
        self._tell_soon()

    def leave(self) -> None:
        """A request is over."""
        self._count -= 1
        self._tell_soon()

    def _tell_soon(self) -> None:
        # Setting a gauge takes a good part of the time that the door has for a request.
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_EVERY_S, self._tell)

    def _tell(self) -> None:
        self._telling = None
        self._inside.set(self._count)

    def call(self, visit: "Visit", seconds: float) -> None:
        """A call is over."""
        whose = {"policy": visit.policy, "role": visit.role}
        self._calls.inc(1, {**whose, "path": visit.path, "status": str(visit.status)})
        self._seconds.observe(seconds, whose)
        if visit.first_s is not None:
            self._first.observe(visit.first_s, whose)

    def replayed(self, policy: str, role: str) -> None:
        """A retry was answered from what is kept."""
        self._replayed.inc(1, {"policy": policy, "role": role})


@cache
def meters() -> Meters:
    """This process's."""
    return Meters()
