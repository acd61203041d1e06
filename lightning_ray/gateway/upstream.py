"""Calls that somebody else's API answers: passing them on, and recording what was said.

Invariant: the upstream's key goes to the upstream alone, never into a span, a log or a reply. Every
call that the upstream answered becomes a span, on disk before the last bytes are handed on; it has
no tokens, for none are shown.
"""

import json
import zlib
from typing import Any

from lightning_ray.gateway.answered import AnsweredCall
from lightning_ray.gateway.answerers import Upstream
from lightning_ray.gateway.reply_reader import Reply
from lightning_ray.inference import Attribution, settled
from lightning_ray.spans import RequestLog, SpanClient, SpanKind, SpanStatus

Json = dict[str, Any]

_SAMPLING = (
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "seed",
    "n",
)


def upstream_url(upstream: Upstream, path: str) -> str:
    """Where a call of this path goes."""
    return upstream.base_url + path.removeprefix("/v1")


def upstream_headers(upstream: Upstream, path: str) -> dict[str, str]:
    """The upstream's key in the header that the protocol wants it in."""
    if upstream.key is None:
        return {}
    if path.startswith("/v1/messages"):
        return {"x-api-key": upstream.key}
    return {"authorization": f"Bearer {upstream.key}"}


def upstream_body(upstream: Upstream, body: Json, by: Attribution) -> Json:
    """The request as the upstream is asked: under its own model name, sampled as the run sets."""
    changed = _sampling(body, by)
    if upstream.model is not None:
        changed["model"] = upstream.model
    return {**body, **changed} if changed else body


def _sampling(body: Json, by: Attribution) -> Json:
    """What the run sets of a request's sampling, in the fields of its protocol."""
    if not by.sampling:
        return {}
    limit = "max_tokens"
    if by.path.startswith("/v1/responses"):
        limit = "max_output_tokens"
    elif by.path.startswith("/v1/chat") and "max_tokens" not in body:
        limit = "max_completion_tokens"
    asked = {name: body.get(name) for name in ("temperature", "top_p", "top_k", "seed")}
    asked["max_tokens"] = body.get(limit)
    # Nobody here counts an upstream's calls: those of an attempt that ask the same share a seed.
    number = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    changed: Json = settled(asked, by.sampling, by.attempt_id, number)
    known = () if by.path.startswith("/v1/chat") or by.path == "/v1/completions" else ("seed",)
    for name in ("top_k", *known):
        # An upstream that does not know them would refuse the call.
        changed.pop(name, None)
    if "max_tokens" in changed:
        changed[limit] = changed.pop("max_tokens")
    return changed


class UpstreamCall(AnsweredCall):
    """A call that an upstream answers."""

    def __init__(
        self,
        spans: SpanClient,
        log: RequestLog,
        upstream: Upstream,
        policy: str,
        by: Attribution,
        body: Json,
        asked_for: Json,
    ):
        """`body` is what the upstream is asked, `asked_for` what the agent sent."""
        super().__init__(spans, log, policy, by, body)
        self._upstream = upstream
        self._asked = {
            name: asked_for.get(name) for name in _SAMPLING if asked_for.get(name) != body.get(name)
        }

    async def _record(self, said: Reply, status: SpanStatus, http_status: int) -> None:
        attributes: Json = {
            **self._said(said),
            "sampling": {name: self._body[name] for name in _SAMPLING if name in self._body},
            **({"asked": self._asked} if self._asked else {}),
            "reply_id": said.reply_id,
            "upstream": self._upstream.base_url,
            "upstream_model": said.model,
            "http_status": http_status,
            "usage": {"input_tokens": said.input_tokens, "output_tokens": said.output_tokens},
            "cost_usd": self._cost(said),
        }
        if self._first_ns is not None:
            attributes["first_token_ms"] = (self._first_ns - self._start_ns) / 1e6
        await self._append(
            SpanKind.MODEL_CALL,
            said,
            status,
            attributes,
            model=said.model,
            input_tokens=said.input_tokens,
            output_tokens=said.output_tokens,
            cost_usd=self._cost(said),
        )

    def _cost(self, said: Reply) -> float | None:
        """US dollars; None without any price, or where the reply did not say how many tokens."""
        prices = self._upstream.input_per_million, self._upstream.output_per_million
        if prices == (None, None) or said.input_tokens is None or said.output_tokens is None:
            return None
        counts = said.input_tokens, said.output_tokens
        dollars = [(price or 0.0) * count for price, count in zip(prices, counts, strict=True)]
        return sum(dollars) / 1e6
