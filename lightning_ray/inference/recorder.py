"""Recording calls where they are sampled.

Invariant: every call that reached the engine for an attempt becomes one span per sampled choice,
on disk before the engine's last output is handed on: an agent never acts on an answer that is not
recorded. An abandoned call is recorded as far as it was sampled, with status "aborted".

A span stores only the tokens it adds to the call it continues. The recorder remembers digests of
the latest attempts' calls; a call whose predecessor it does not remember is stored whole, which
costs bytes and changes nothing else.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_ray.inference.attribution import Attribution
from lightning_ray.spans import SpanKind, SpanStatus, new_span_id, span

REMEMBERED_ATTEMPTS = 4096
"""Attempts whose tokens are kept in memory to find what a call continues."""

Append = Callable[[Sequence[Mapping[str, Any]]], Awaitable[object]]
Tokens = NDArray[np.int32]

_Known = dict[int, dict[bytes, str]]
"""The calls of an attempt: by their number of tokens, then by the digest of these, the span's id.

Digests, because an attempt's calls in full would take memory by the square of its turns.
"""


@dataclass
class Choice:
    """One sampled answer, as its pieces arrive."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    spans: Sequence[tuple[int, int]] = ()
    """(version, first token) of every version that sampled some of the tokens, in order; empty
    where the version that the call began with sampled them all."""

    def versions(self) -> NDArray[np.int32] | None:
        """int32[S]: the version of each token; None where there is only one."""
        began = [span for span in self.spans if span[1] < len(self.token_ids)]
        if len(began) < 2:
            return None
        ends = [first for _, first in began[1:]] + [len(self.token_ids)]
        lengths = [end - first for (_, first), end in zip(began, ends, strict=True)]
        return np.repeat(np.asarray([version for version, _ in began], np.int32), lengths)

    def first_version(self, otherwise: int) -> int:
        """The version of the first token; `otherwise` where nobody said."""
        return self.spans[0][0] if self.spans else otherwise


@dataclass
class OpenCall:
    """A call between its first token and its span."""

    attribution: Attribution
    policy: str
    version: int
    """The version that answered when the call came in."""
    sampling: Mapping[str, Any]
    """How the tokens were drawn."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """What the agent had asked for where the run set something else."""
    start_ns: int = field(default_factory=time.time_ns)
    first_token_ns: int | None = None
    prompt_ids: Sequence[int] | None = None
    choices: dict[int, Choice] = field(default_factory=dict)

    def choice(self, index: int) -> Choice:
        """The choice with this index, begun if it is new."""
        if self.first_token_ns is None:
            self.first_token_ns = time.time_ns()
        return self.choices.setdefault(index, Choice())


class CallRecorder:
    """Turns calls into spans; one per engine."""

    def __init__(
        self, append: Append, observe: Callable[[OpenCall, SpanStatus], None] | None = None
    ):
        """`append` stores rows of SPAN_SCHEMA and returns once they are on disk.

        `observe` is told of each call that is over.
        """
        self._append = append
        self._observe = observe
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self.calls = 0
        self.sampled_tokens = 0

    async def record(self, call: OpenCall, status: SpanStatus) -> None:
        """Stores the call's spans. Raises InfrastructureError when they cannot be stored."""
        if call.prompt_ids is None or not call.choices:
            return
        attempt = call.attribution.attempt_id
        prompt = np.asarray(call.prompt_ids, np.int32)
        continues, prefix = _longest_prefix(self._known.get(attempt, {}), prompt)
        end_ns = time.time_ns()
        rows = []
        learnt = []
        for index, choice in sorted(call.choices.items()):
            tokens = np.concatenate([prompt, np.asarray(choice.token_ids, np.int32)])
            span_id = new_span_id()
            learnt.append((span_id, len(tokens), _digest(tokens)))
            rows.append(
                span(
                    SpanKind.MODEL_CALL,
                    call.attribution.path,
                    run_id=call.attribution.run_id,
                    rollout_id=call.attribution.rollout_id,
                    attempt_id=attempt,
                    span_id=span_id,
                    status=status,
                    start_ns=call.start_ns,
                    end_ns=end_ns,
                    role=call.attribution.role,
                    policy=call.policy,
                    version=choice.first_version(call.version),
                    versions=choice.versions(),
                    continues=continues,
                    prefix_tokens=prefix,
                    token_ids=tokens[prefix:],
                    logprobs=np.asarray(choice.logprobs, np.float32),
                    finish_reason=choice.finish_reason,
                    attributes={
                        "choice": index,
                        "prompt_tokens": len(prompt),
                        "sampling": dict(call.sampling),
                        **({"asked": dict(call.asked)} if call.asked else {}),
                        **({"prompt": call.attribution.prompt} if call.attribution.prompt else {}),
                        "first_token_ms": _milliseconds(call.start_ns, call.first_token_ns),
                    },
                )
            )
            self.sampled_tokens += len(choice.token_ids)
        self.calls += 1
        if self._observe is not None:
            self._observe(call, status)
        await self._append(rows)
        # Only what is stored may be continued. Another call of the attempt may have ended while
        # this one was being stored, so what is known is looked up again.
        known = self._known.setdefault(attempt, {})
        for span_id, length, digest in learnt:
            known.setdefault(length, {}).setdefault(digest, span_id)
        self._known.move_to_end(attempt)
        while len(self._known) > REMEMBERED_ATTEMPTS:
            self._known.popitem(last=False)


def _longest_prefix(known: _Known, prompt: Tokens) -> tuple[str | None, int]:
    """The call whose whole token sequence is the longest prefix of `prompt`, and its length.

    One pass over the prompt, whatever the number of calls.
    """
    best: tuple[str | None, int] = (None, 0)
    read = 0
    so_far = _hash()
    for length in sorted(known):
        if length > len(prompt):
            break
        so_far.update(prompt[read:length].tobytes())
        read = length
        if length and (span_id := known[length].get(so_far.digest())) is not None:
            best = (span_id, length)
    return best


def _hash() -> "hashlib.blake2b":
    # 128 bits that nobody can find two inputs for: equal digests are equal tokens.
    return hashlib.blake2b(digest_size=16)


def _digest(tokens: Tokens) -> bytes:
    digest = _hash()
    digest.update(tokens.tobytes())
    return digest.digest()


def _milliseconds(start_ns: int, end_ns: int | None) -> float | None:
    return None if end_ns is None else (end_ns - start_ns) / 1e6
