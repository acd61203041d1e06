"""The one Arrow schema of spans: what happened in an attempt, one row per event.

Invariant: for a model call, following `continues` back to a call without one, taking the first
`prefix_tokens` tokens of the call it names and appending `token_ids`, gives exactly the tokens the
engine saw followed by the tokens it sampled. The last `len(logprobs)` of `token_ids` are the
sampled ones. Nothing is ever tokenised again.

Order within an attempt is `sequence`, which the store assigns as spans arrive; clocks only say how
long things took.

The schema's version stands in every segment's metadata. A column is only ever added, and may be
null: what an older version wrote reads with nulls in the columns that it did not have (`conform`).
"""

from enum import StrEnum

import pyarrow as pa

from lightning_ray.errors import InfrastructureError

SCHEMA_VERSION = 3
VERSION_KEY = b"lightning_ray.span_schema"


ATTEMPT_SPAN = "attempt"
"""The name of the RESOURCE span that says how an attempt ended."""


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
        # The version that sampled each token that has a logprob, where the weights changed while
        # the call was answered; null where `version`, which is the first of them, sampled them all.
        pa.field("versions", pa.list_(pa.int32())),
        # A reward's number; its name is `name`. `step` is the step of the attempt that it is for,
        # counted from 0; without one it is for the attempt as a whole. `source` says who gave it:
        # "grader", "agent", "service" or "person".
        pa.field("value", pa.float64()),
        pa.field("step", pa.int32()),
        pa.field("source", pa.string()),
        # What the call or the tool's own telemetry says of it: the model by the name its server
        # gave, the tool, tokens as they were counted there, and what it cost, US dollars.
        pa.field("model", pa.string()),
        pa.field("tool", pa.string()),
        pa.field("input_tokens", pa.int64()),
        pa.field("output_tokens", pa.int64()),
        pa.field("cost_usd", pa.float64()),
        # Everything else, a JSON object.
        pa.field("attributes", pa.string()),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)


def check_written_by(schema: pa.Schema, where: str) -> None:
    """Raises InfrastructureError when `schema`, found at `where`, is not one that can be read."""
    version = (schema.metadata or {}).get(VERSION_KEY, b"").decode(errors="replace")
    if not version.isdecimal():
        raise InfrastructureError(f"{where} does not begin with a span schema")
    if int(version) > SCHEMA_VERSION:
        raise InfrastructureError(
            f"{where} was written with span schema {version}; this version reads up to "
            f"{SCHEMA_VERSION}: use a newer lightning-ray"
        )
    for field in schema:
        place = SPAN_SCHEMA.get_field_index(field.name)
        if place < 0 or SPAN_SCHEMA.field(place).type != field.type:
            raise InfrastructureError(
                f"{where}: column {field.name} ({field.type}) is none of the span schema"
            )
    present = set(schema.names)
    for field in SPAN_SCHEMA:
        if not field.nullable and field.name not in present:
            raise InfrastructureError(f"{where}: the span schema's column {field.name} is missing")


def conform(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch of an older schema version as one of SPAN_SCHEMA; its buffers are shared.

    `check_written_by` has said that its schema can be read.
    """
    if batch.schema.equals(SPAN_SCHEMA):
        return batch
    present = set(batch.schema.names)
    columns = [
        batch.column(field.name) if field.name in present else pa.nulls(batch.num_rows, field.type)
        for field in SPAN_SCHEMA
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SPAN_SCHEMA)
