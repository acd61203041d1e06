"""What an engine measures of itself, for Ray's Prometheus endpoint."""

import time

from ray.util.metrics import Counter, Gauge, Histogram

from lightning_ray.inference.recorder import OpenCall
from lightning_ray.spans import SpanStatus

SECONDS = [0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]
"""Upper bounds of the histograms' buckets."""


class EngineMeters:
    """The metrics of one engine; names begin with `lightning_ray_engine_`."""

    def __init__(self, policy: str):
        self._policy = policy
        whose = ("policy", "version")
        name = "lightning_ray_engine_"
        self._calls = Counter(name + "calls", "Calls that were recorded.", (*whose, "status"))
        self._tokens = Counter(name + "sampled_tokens", "Tokens sampled in them.", whose)
        self._prompts = Counter(name + "prompt_tokens", "Tokens of their prompts.", whose)
        self._seconds = Histogram(name + "call_seconds", "To the last token.", SECONDS, whose)
        self._first = Histogram(name + "first_token_seconds", "To the first.", SECONDS, whose)
        self._inside = Gauge(name + "calls_inside", "Calls in the engine.", ("policy",))
        self._waiting = Gauge(
            name + "calls_waiting", "Calls that wait while the weights change.", ("policy",)
        )

    def inside(self, inside: int, waiting: int) -> None:
        """How many calls there are now."""
        self._inside.set(inside, {"policy": self._policy})
        self._waiting.set(waiting, {"policy": self._policy})

    def call(self, call: OpenCall, status: SpanStatus) -> None:
        """A call is over."""
        whose = {"policy": call.policy, "version": str(call.version)}
        self._calls.inc(1, {**whose, "status": status.value})
        sampled = sum(len(choice.token_ids) for choice in call.choices.values())
        if sampled:
            self._tokens.inc(sampled, whose)
        if call.prompt_ids:
            self._prompts.inc(len(call.prompt_ids), whose)
        self._seconds.observe((time.time_ns() - call.start_ns) / 1e9, whose)
        if call.first_token_ns is not None:
            self._first.observe((call.first_token_ns - call.start_ns) / 1e9, whose)
