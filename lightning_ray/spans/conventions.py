"""What the conventions of telemetry call things, in terms of our columns.

Three are understood: OpenTelemetry's GenAI conventions (`gen_ai.*`), OpenInference
(`openinference.span.kind`, `llm.*`, `tool.*`) and Traceloop's OpenLLMetry (`traceloop.*`).

Invariant: what is read here is a copy; a span's attributes stay as they were sent. A model call
that telemetry tells of is a `message`, never a `model_call`: those are recorded where tokens are
sampled, and an agent's own account of one must not count as a second.
"""

import math
from collections.abc import Mapping
from typing import Any

from lightning_ray.spans.schema import SpanKind

Attributes = Mapping[str, Any]

ROLLOUT_ATTRIBUTE = "lightning_ray.rollout_id"
CONVERSATION_ATTRIBUTE = "gen_ai.conversation.id"
STEP_ATTRIBUTE = "lightning_ray.step"
COST_ATTRIBUTE = "cost_usd"
EVALUATION_EVENT = "gen_ai.evaluation.result"

_OPERATIONS = {
    "chat": SpanKind.MESSAGE,
    "text_completion": SpanKind.MESSAGE,
    "generate_content": SpanKind.MESSAGE,
    "embeddings": SpanKind.MESSAGE,
    "execute_tool": SpanKind.TOOL_CALL,
}
_OPENINFERENCE = {
    "LLM": SpanKind.MESSAGE,
    "EMBEDDING": SpanKind.MESSAGE,
    "TOOL": SpanKind.TOOL_CALL,
}
_TRACELOOP = {"tool": SpanKind.TOOL_CALL}

# Each column's names, the best first: what answered before what was asked for.
_AGENT = ("gen_ai.agent.name", "agent.name")
_TOOL = ("gen_ai.tool.name", "tool.name")
_MODEL = (
    "gen_ai.response.model",
    "gen_ai.request.model",
    "llm.response.model_name",
    "llm.model_name",
    "llm.request.model_name",
    "embedding.model_name",
    "reranker.model_name",
)
_INPUT_TOKENS = (
    "gen_ai.usage.input_tokens",
    "gen_ai.usage.prompt_tokens",
    "llm.token_count.prompt",
    "llm.usage.prompt_tokens",
)
_OUTPUT_TOKENS = (
    "gen_ai.usage.output_tokens",
    "gen_ai.usage.completion_tokens",
    "llm.token_count.completion",
    "llm.usage.completion_tokens",
)
_COST = ("llm.cost.total", "gen_ai.usage.cost", COST_ATTRIBUTE)
_LARGEST_COUNT = 1 << 53


def kind_of(attributes: Attributes) -> SpanKind:
    """What a span records; a step of the agent where no convention says otherwise."""
    if (operation := _text(attributes, "gen_ai.operation.name")) is not None:
        return _OPERATIONS.get(operation.lower(), SpanKind.AGENT_STEP)
    if (kind := _text(attributes, "openinference.span.kind")) is not None:
        return _OPENINFERENCE.get(kind.upper(), SpanKind.AGENT_STEP)
    if (kind := _text(attributes, "traceloop.span.kind")) is not None:
        return _TRACELOOP.get(kind.lower(), SpanKind.AGENT_STEP)
    if _text(attributes, "mcp.method.name") == "tools/call" or "gen_ai.tool.name" in attributes:
        return SpanKind.TOOL_CALL
    # Instrumentation of a provider's client says no kind: it names the model.
    if "llm.request.type" in attributes or "gen_ai.request.model" in attributes:
        return SpanKind.MESSAGE
    return SpanKind.AGENT_STEP


def columns_of(kind: SpanKind, name: str, attributes: Attributes) -> dict[str, Any]:
    """The columns `agent`, `tool`, `model`, `input_tokens`, `output_tokens` and `cost_usd`.

    `name` is the span's. A value of another type than its column's is left to the attributes.
    """
    entity = _text(attributes, "traceloop.entity.name")
    traceloop = (_text(attributes, "traceloop.span.kind") or "").lower()
    agent = _first_text(attributes, _AGENT)
    tool = None
    if kind is SpanKind.TOOL_CALL:
        tool = _first_text(attributes, _TOOL)
        if tool is None and traceloop == "tool":
            tool = entity
        if tool is None:
            tool = name.removeprefix("execute_tool ").removeprefix("tools/call ") or None
    if agent is None and traceloop == "agent":
        agent = entity
    return {
        "agent": agent,
        "tool": tool,
        "model": _first_text(attributes, _MODEL),
        "input_tokens": _first_count(attributes, _INPUT_TOKENS),
        "output_tokens": _first_count(attributes, _OUTPUT_TOKENS),
        "cost_usd": _first_cost(attributes, _COST),
    }


def step_of(attributes: Attributes) -> int | None:
    """The step that a reward is for, where `lightning_ray.step` names one."""
    value = attributes.get(STEP_ATTRIBUTE)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value < 2**31 else None


def named_conversation(span: Attributes, resource: Attributes) -> tuple[str | None, str | None]:
    """(rollout id, conversation) that a span is said to belong to; the span's own word first."""
    for attributes in (span, resource):
        rollout = _text(attributes, ROLLOUT_ATTRIBUTE)
        conversation = _text(attributes, CONVERSATION_ATTRIBUTE)
        if rollout is not None or conversation is not None:
            return rollout, conversation
    return None, None


def _text(attributes: Attributes, name: str) -> str | None:
    value = attributes.get(name)
    return value if isinstance(value, str) and value else None


def _first_text(attributes: Attributes, names: tuple[str, ...]) -> str | None:
    return next((t for name in names if (t := _text(attributes, name)) is not None), None)


def _first_count(attributes: Attributes, names: tuple[str, ...]) -> int | None:
    for name in names:
        number = _number(attributes.get(name))
        if number is not None and number <= _LARGEST_COUNT and number == int(number):
            return int(number)
    return None


def _first_cost(attributes: Attributes, names: tuple[str, ...]) -> float | None:
    return next((n for name in names if (n := _number(attributes.get(name))) is not None), None)


def _number(value: Any) -> float | None:
    """A finite number of at least 0, also where it was sent as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and len(value) > 32:
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
