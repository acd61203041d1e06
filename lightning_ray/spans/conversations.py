"""What a call was asked, as text, stored as what it adds to an earlier call of its attempt.

Invariant: `whole_requests` gives back every request that `RequestLog.shorten` shortened, equal to
what went in. A conversation that only grows takes bytes by its turns and not by their square; a
request whose predecessor is not remembered is stored whole.

A shortened request has, beside what it adds, `continues`: the span it goes on from, and `kept`: how
many entries of each list it has in common with it from the first on, or true for what is the same.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

Json = dict[str, Any]

REMEMBERED_ATTEMPTS = 4096
"""Attempts whose requests are remembered by one log."""

_LISTS = ("messages", "input")
"""What grows from turn to turn: chat's and Anthropic's messages, the Responses API's input."""
CONTINUES, KEPT = "continues", "kept"

_Known = dict[bytes, tuple[str, int]]
"""By the digest of a list from its first entry on: the span that asked so, and how many."""


class RequestLog:
    """Remembers what was asked in the latest attempts; one per writer."""

    def __init__(self) -> None:
        self._lists: OrderedDict[str, dict[str, _Known]] = OrderedDict()
        self._same: dict[str, dict[str, dict[str, bytes]]] = {}

    def shorten(self, attempt_id: str, request: Mapping[str, Any]) -> Json:
        """The request as what it adds to the longest earlier one that it goes on from."""
        grown = next((name for name in _LISTS if isinstance(request.get(name), list)), None)
        known = self._lists.get(attempt_id, {}).get(grown or "")
        if grown is None or known is None:
            return dict(request)
        found: tuple[str, int] | None = None
        for digest in _digests(request[grown]):
            found = known.get(digest, found)
        if found is None:
            return dict(request)
        span_id, entries = found
        before = self._same[attempt_id][span_id]
        same = [n for n in request if n != grown and before.get(n) == _digest(request[n])]
        kept: Json = {grown: entries} | dict.fromkeys(same, True)
        rest = {name: value for name, value in request.items() if name not in same}
        return {**rest, grown: request[grown][entries:], CONTINUES: span_id, KEPT: kept}

    def stored(self, attempt_id: str, span_id: str, request: Mapping[str, Any]) -> None:
        """Takes note of a request whose span is on disk: only such a one may be continued."""
        grown = next((name for name in _LISTS if isinstance(request.get(name), list)), None)
        if grown is None or not request[grown]:
            return
        known = self._lists.setdefault(attempt_id, {}).setdefault(grown, {})
        *_, whole = _digests(request[grown])
        known.setdefault(whole, (span_id, len(request[grown])))
        self._same.setdefault(attempt_id, {})[span_id] = {
            name: _digest(value) for name, value in request.items() if name != grown
        }
        self._lists.move_to_end(attempt_id)
        while len(self._lists) > REMEMBERED_ATTEMPTS:
            forgotten, _ = self._lists.popitem(last=False)
            del self._same[forgotten]


def whole_requests(spans: pa.Table) -> dict[str, Json]:
    """The requests of a table's spans (`attributes.request`) in full, by span id.

    `spans` holds every span of its attempts; a request that goes on from a span that is missing is
    left out.
    """
    told: dict[str, Json] = {}
    for span_id, attributes in zip(
        spans["span_id"].to_pylist(), spans["attributes"].to_pylist(), strict=True
    ):
        if attributes and '"request"' in attributes:
            request = json.loads(attributes).get("request")
            if isinstance(request, dict):
                told[span_id] = request
    whole: dict[str, Json] = {}
    for span_id in told:
        chain = [span_id]
        # A chain is as long as its conversation: no recursion.
        while chain[-1] not in whole and (before := told[chain[-1]].get(CONTINUES)) is not None:
            if before not in told or before in chain:
                chain = []
                break
            chain.append(before)
        for name in reversed(chain):
            if name not in whole:
                whole[name] = _joined(told[name], whole)
    return whole


def _joined(request: Json, whole: Mapping[str, Json]) -> Json:
    if CONTINUES not in request:
        return request
    before = whole[request[CONTINUES]]
    joined = {n: value for n, value in request.items() if n not in (CONTINUES, KEPT)}
    for name, entries in request[KEPT].items():
        joined[name] = before[name] if entries is True else before[name][:entries] + joined[name]
    return joined


def _digests(entries: list[Any]) -> list[bytes]:
    """For each prefix of a list, the shortest first, a digest of it."""
    digest = hashlib.blake2b(digest_size=16)
    found = []
    for entry in entries:
        digest.update(_digest(entry))
        found.append(digest.digest())
    return found


def _digest(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
