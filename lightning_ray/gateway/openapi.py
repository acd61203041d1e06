"""The OpenAPI description of the door's own routes; what engines answer is theirs to describe."""

from typing import Any

from lightning_ray.gateway.telemetry import ARROW, JSON, PROTOBUF
from lightning_ray.spans.rewards import OUTCOMES, PERSON, SERVICE, VERDICTS

Json = dict[str, Any]

_TEXT = {"type": "string", "maxLength": 100_000}
_STEP = {"type": ["integer", "null"], "minimum": 0, "maximum": 2**31 - 1}
_REWARD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 200, "default": "reward"},
        "value": {"type": "number"},
        "step": _STEP,
        "comment": {"type": "string", "maxLength": 10_000},
    },
    "required": ["value"],
    "additionalProperties": False,
}
_REWARDS = {
    "anyOf": [
        {"type": "number"},
        _REWARD,
        {"type": "array", "items": _REWARD, "minItems": 1, "maxItems": 1000},
        {"type": "object", "additionalProperties": {"type": "number"}, "minProperties": 1},
    ]
}
_FEEDBACK = {
    "type": "object",
    "properties": {
        "rollout": {**_TEXT, "description": "The conversation, as a reply's header said it."},
        "reply_id": {**_TEXT, "description": "The id of a reply, which names it as well."},
        "verdict": {"enum": list(VERDICTS)},
        "correction": {**_TEXT, "description": "What a corrected answer should have been."},
        "outcome": {"enum": list(OUTCOMES)},
        "reward": {"type": "number"},
        "rewards": {"type": "object", "additionalProperties": {"type": "number"}},
        "by": {**_TEXT, "description": "Who says so."},
        "comment": _TEXT,
        "source": {"enum": [PERSON, SERVICE]},
        "step": _STEP,
    },
    "anyOf": [{"required": ["rollout"]}, {"required": ["reply_id"]}],
    "additionalProperties": False,
}
_OTLP_JSON = {
    "type": "object",
    "properties": {"resourceSpans": {"type": "array", "items": {"type": "object"}}},
}
_STATUS = {
    "type": "object",
    "properties": {"code": {"type": "integer"}, "message": {"type": "string"}},
}
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "object", "required": ["message"]}},
    "required": ["error"],
}
_PARTIAL = {"type": "object", "properties": {"partialSuccess": {"type": "object"}}}
_BINARY = {"type": "string", "format": "binary"}


def describe_routes() -> Json:
    """The description, OpenAPI 3.1."""
    capability = {
        "name": "capability",
        "in": "path",
        "required": True,
        "schema": {"type": "string"},
        "description": "The secret part of an attempt's base URL.",
    }
    traces = {PROTOBUF: {"schema": _BINARY}, JSON: {"schema": _OTLP_JSON}}
    spans = {ARROW: {"schema": _BINARY}}
    key: list[Json] = [{"key": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Lightning Ray gateway",
            "version": "1",
            "description": "What is told beside model calls: telemetry, rewards, feedback. The "
            "protocols of model calls are those of OpenAI and Anthropic.",
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/a/{capability}/v1/traces": _post(
                "OTLP traces of an attempt.", traces, _otlp(), parameters=[capability]
            ),
            "/a/{capability}/v1/spans": _post(
                "Spans of an attempt in bulk.", spans, _told(), parameters=[capability]
            ),
            "/a/{capability}/v1/rewards": _post(
                "Rewards that an attempt gives itself.",
                {JSON: {"schema": _REWARDS}},
                _plain({"kept": {"type": "integer"}}),
                parameters=[capability],
            ),
            "/v1/traces": _post("OTLP traces of live traffic.", traces, _otlp(), security=key),
            "/v1/spans": _post("What engines of one's own recorded.", spans, _told(), security=key),
            "/v1/feedback": _post(
                "What somebody says of a conversation.",
                {JSON: {"schema": _FEEDBACK}},
                _plain({"rollout": {"type": "string"}, "kept": {"type": "boolean"}}),
                security=key,
            ),
        },
    }


def _post(summary: str, content: Json, responses: Json, **more: Any) -> Json:
    body = {"required": True, "content": content}
    return {"post": {"summary": summary, "requestBody": body, "responses": responses, **more}}


def _plain(properties: Json) -> Json:
    """Replies of the routes that speak plain JSON."""
    good = {"type": "object", "properties": properties, "required": list(properties)}
    refused = {"description": "Refused.", "content": {JSON: {"schema": _ERROR}}}
    return {
        "200": {"description": "On disk.", "content": {JSON: {"schema": good}}},
        **dict.fromkeys(("400", "401", "404", "413", "429", "503", "504"), refused),
    }


def _otlp() -> Json:
    """Replies in the encoding of the request; an encoding that is not known is told in JSON."""
    good = {PROTOBUF: {"schema": _BINARY}, JSON: {"schema": _PARTIAL}}
    refused = {PROTOBUF: {"schema": _BINARY}, JSON: {"schema": _STATUS}}
    return _replies(good, refused)


def _told() -> Json:
    return _replies({JSON: {"schema": _PARTIAL}}, {JSON: {"schema": _STATUS}})


def _replies(good: Json, refused: Json) -> Json:
    bad = {"description": "Refused.", "content": refused}
    statuses = ("400", "401", "403", "404", "413", "415", "429", "503")
    return {
        "200": {"description": "On disk, but for what is refused.", "content": good},
        **dict.fromkeys(statuses, bad),
    }
