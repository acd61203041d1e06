"""The spans that both sides store: made from numbers alone, so both make the same ones.

Standard library only, for it is imported by the peer's interpreter as well as by ours.

One span is one model call of 64 tokens, 32 of the prompt and 32 sampled, each sampled one with its
logprob; a short question, a short answer, usage and the model's name. Everything is derived from
the call's number, so a call has the same ids, tokens and texts wherever it is made.
"""

import hashlib
import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PROMPT_TOKENS = 32
SAMPLED_TOKENS = 32
SPANS_PER_ROLLOUT = 8
SPANS_PER_BATCH = 512
"""Spans of one batch: what OpenTelemetry's batch processor exports at once by default."""
VOCABULARY = 49_152
BEGIN_NS = 1_750_000_000_000_000_000
"""When the first call began, nanoseconds since the epoch."""
SERVED_MODEL = "smollm2-135m-instruct"
"""What the server calls the model."""
ASKED_MODEL = "gpt-4o-mini"
"""What the agent asked for."""


@dataclass(frozen=True)
class Call:
    """One model call, in the form of neither side."""

    number: int
    trace_id: str
    """32 hex digits, one per rollout of `SPANS_PER_ROLLOUT` calls."""
    span_id: str
    """16 hex digits."""
    start_ns: int
    end_ns: int
    prompt_ids: list[int]
    """PROMPT_TOKENS token ids."""
    sampled_ids: list[int]
    """SAMPLED_TOKENS token ids."""
    logprobs: list[float]
    """One per sampled token, natural logarithm, exact in 32 bits."""
    question: str
    answer: str


def call(number: int) -> Call:
    """The call of this number."""
    rng = random.Random(number)
    tokens = [rng.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS + SAMPLED_TOKENS)]
    logprobs = [_float32(-rng.expovariate(2.0)) for _ in range(SAMPLED_TOKENS)]
    start = BEGIN_NS + number * 1_000_000
    a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
    return Call(
        number=number,
        trace_id=_hex(f"trace {number // SPANS_PER_ROLLOUT}", 32),
        span_id=_hex(f"span {number}", 16),
        start_ns=start,
        end_ns=start + 350_000_000,
        prompt_ids=tokens[:PROMPT_TOKENS],
        sampled_ids=tokens[PROMPT_TOKENS:],
        logprobs=logprobs,
        question=f"What is {a} plus {b}? Write it for the calculator.",
        answer=f"I will use the calculator for this one: calc({a} + {b})",
    )


def calls(first: int, count: int) -> list[Call]:
    """`count` calls, numbered from `first`."""
    return [call(number) for number in range(first, first + count)]


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """`items` in pieces of `size`, the last maybe shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def attributes(one: Call) -> dict[str, Any]:
    """What an agent's own telemetry says of the call, in OpenTelemetry attributes.

    The names and forms of agentlightning's tracer (AgentOps' instrumentation of `openai`, with its
    own additions): messages, model and usage, token ids as two lists of integers, and logprobs as
    the JSON text of the reply's `logprobs.content`. Both sides' OTLP bodies carry exactly these.
    """
    return {
        "agentops.span.kind": "llm",
        "gen_ai.system": "OpenAI",
        "gen_ai.request.model": ASKED_MODEL,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.max_tokens": SAMPLED_TOKENS,
        "gen_ai.request.streaming": False,
        "gen_ai.prompt.0.role": "user",
        "gen_ai.prompt.0.content": one.question,
        "gen_ai.response.id": f"chatcmpl-{one.span_id}",
        "gen_ai.response.model": SERVED_MODEL,
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.content": one.answer,
        "gen_ai.completion.0.finish_reason": "stop",
        "gen_ai.usage.prompt_tokens": PROMPT_TOKENS,
        "gen_ai.usage.completion_tokens": SAMPLED_TOKENS,
        "gen_ai.usage.total_tokens": PROMPT_TOKENS + SAMPLED_TOKENS,
        "prompt_token_ids": one.prompt_ids,
        "response_token_ids": one.sampled_ids,
        "logprobs.content": json.dumps(
            [
                {
                    "token": text,
                    "bytes": list(text.encode()),
                    "logprob": logprob,
                    "top_logprobs": [],
                }
                for text, logprob in zip(_texts(one), one.logprobs, strict=True)
            ]
        ),
    }


def _texts(one: Call) -> list[str]:
    """The sampled tokens as text: the answer cut into pieces of two characters, then repeated."""
    pieces = [one.answer[i : i + 2] for i in range(0, len(one.answer), 2)]
    return [pieces[i % len(pieces)] for i in range(SAMPLED_TOKENS)]


def _hex(what: str, digits: int) -> str:
    return hashlib.sha256(what.encode()).hexdigest()[:digits]


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]
