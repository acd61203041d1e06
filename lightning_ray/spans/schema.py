"""The one Arrow schema of spans: what happened in an attempt, one row per event.

Invariant: for a model call, following `continues` back to a call without one, taking the first
`prefix_tokens` tokens of the call it names and appending `token_ids`, gives exactly the tokens the
engine saw followed by the tokens it sampled. The last `len(logprobs)` of `token_ids` are the
sampled ones. Nothing is ever tokenised again.

Order within an attempt is `sequence`, which the store assigns as spans arrive; clocks only say how
long things took.
"""

from enum import StrEnum

import pyarrow as pa

SCHEMA_VERSION = 1


class SpanKind(StrEnum):
    """What a span records."""

    MODEL_CALL = "model_call"
    """One completion: tokens in, tokens out, logprobs, the policy version that sampled them."""
    TOOL_CALL = "tool_call"
    """The agent ran a tool, as its own telemetry tells."""
    AGENT_STEP = "agent_step"
    """A step of the agent's framework, as its own telemetry tells."""
    MESSAGE = "message"
    """Text between agents, or between an agent and a person."""
    REWARD = "reward"
    """A named number given by a grader, the agent, a service or a person."""
    FEEDBACK = "feedback"
    """A person's or a service's verdict that is not a number: accept, correct, override."""
    RESOURCE = "resource"
    """How an attempt was run and how it ended: exit code, seconds, output, fault."""


class SpanStatus(StrEnum):
    """How what the span records ended."""

    OK = "ok"
    ERROR = "error"
    """It failed; `attributes` says how."""
    ABORTED = "aborted"
    """Somebody went away before the end; what was recorded is exact as far as it goes."""


SPAN_SCHEMA = pa.schema(
    [
        # Identity. Ids are the caller's or the store's; a span id is stored once.
        pa.field("span_id", pa.string(), nullable=False),
        pa.field("trace_id", pa.string()),
        pa.field("parent_span_id", pa.string()),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        # Where it belongs: run > rollout > attempt ("ROLLOUT/N"), and its place in the attempt.
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("attempt_id", pa.string(), nullable=False),
        pa.field("sequence", pa.int64(), nullable=False),
        # Nanoseconds since the epoch.
        pa.field("start_ns", pa.int64(), nullable=False),
        pa.field("end_ns", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        # Who acted, and which version of which policy answered.
        pa.field("agent", pa.string()),
        pa.field("role", pa.string()),
        pa.field("policy", pa.string()),
        pa.field("version", pa.int32()),
        # A model call's tokens; see the invariant above. Logprobs are natural logarithms under the
        # sampling policy at temperature 1 ("raw"), one per sampled token.
        pa.field("continues", pa.string()),
        pa.field("prefix_tokens", pa.int32()),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("finish_reason", pa.string()),
        # A reward's number; its name is `name`.
        pa.field("value", pa.float64()),
        # Everything else, a JSON object.
        pa.field("attributes", pa.string()),
    ],
    metadata={"lightning_ray.span_schema": str(SCHEMA_VERSION)},
)
