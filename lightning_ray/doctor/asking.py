"""What the agent asked for at the door: whether it came, in which protocol, for whom, with what."""

from collections import Counter

from lightning_ray.doctor.evidence import Evidence
from lightning_ray.doctor.exchange import Exchange
from lightning_ray.doctor.finding import Finding, missing, ok, warning
from lightning_ray.gateway.intake import TOLD

_SHOWN = 80
_SEVERAL = 3
_BASE = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def check_asking(seen: Evidence) -> list[Finding]:
    """Every finding about the requests; one alone when there were none."""
    arrived = _arrived(seen)
    if not seen.exchanges:
        return [arrived]
    return [
        arrived,
        *_refusals(seen),
        *_protocols(seen),
        *_models(seen),
        *_system_prompts(seen),
        *_tools(seen),
    ]


def models_asked(seen: Evidence) -> list[str]:
    """The model names that the agent asked for, the most frequent first."""
    names = Counter(x.asked.model for x in seen.exchanges if x.asked.model is not None)
    return [name for name, _ in names.most_common()]


def _arrived(seen: Evidence) -> Finding:
    title = "base URL"
    if not seen.exchanges:
        variables = ", ".join(seen.given)
        found = f"no call arrived; the agent was given {variables}"
        if seen.hosts:
            found += f"; it tried to reach {', '.join(seen.hosts)}"
            change = (
                "make the agent take its base URL from one of these variables where it now names "
                f"{seen.hosts[0]}"
            )
        else:
            change = (
                "make the agent take its base URL from one of these variables: it may ignore them, "
                "or end before its first call"
            )
        return missing(title, found, change)
    silent = [
        run.attempt_id
        for run in seen.runs
        if not any(exchange.attempt_id == run.attempt_id for exchange in seen.exchanges)
    ]
    calls = f"{len(seen.exchanges)} requests in {len(seen.runs)} runs"
    if silent:
        return warning(
            title,
            f"{calls}; {len(silent)} runs made none",
            "a run without a call teaches nothing; see that each reaches its model call",
        )
    return ok(title, f"used: {calls}")


def _refusals(seen: Evidence) -> list[Finding]:
    refused = [x for x in seen.exchanges if x.status is not None and not x.answered]
    if not refused:
        return []
    kinds = Counter((x.method, x.path, x.status, x.error) for x in refused)
    shown = [
        f"{count} x {method} {path}: {status} {error}"
        for (method, path, status, error), count in kinds.most_common(_SEVERAL)
    ]
    found = "\n".join([f"{len(refused)} requests were refused", *shown])
    changes = dict.fromkeys(_cure(seen, exchange) for exchange in refused)
    change = "; ".join(list(changes)[:_SEVERAL])
    if any(x.method == "POST" for x in seen.answered):
        return [warning("refusals", found, change)]
    return [missing("refusals", found, change)]


def _cure(seen: Evidence, refused: Exchange) -> str:
    error = refused.error.lower()
    path = refused.path
    if path.startswith("/v1/v1/"):
        return (
            "the agent adds /v1 to a base URL that has it: take it from ANTHROPIC_BASE_URL's form"
        )
    if any(base == f"/v1{path}" for base in _BASE):
        return "the agent's client needs a base URL that ends in /v1: let it read OPENAI_BASE_URL"
    if path.endswith(("/metrics", "/logs")):
        return "of telemetry traces are taken: OTEL_METRICS_EXPORTER=none OTEL_LOGS_EXPORTER=none"
    if "tool" in error and refused.asked.tools:
        return "name vLLM's parser for the model's tool calls: inference.tool_call_parser=hermes"
    if "maximum context length" in error or "max_model_len" in error:
        return f"inference.max_model_len={2 * seen.max_model_len}, or shorter prompts"
    if refused.status == 404:
        return f"{path} is not served (docs/gateway.md lists what is); use another of these calls"
    if refused.status is not None and refused.status >= 500:
        return "a fault on our side: look at the engine with cluster.log_to_driver=true"
    return f"mend the request to {path}: the model's server refuses what it asks"


def _protocols(seen: Evidence) -> list[Finding]:
    posts = [x for x in seen.answered if x.method == "POST"]
    if not posts:
        return []
    kinds = Counter((x.path, x.asked.stream) for x in posts)
    shown = ", ".join(
        f"{path} ({count}{', streamed' if stream else ''})"
        for (path, stream), count in kinds.most_common()
    )
    return [ok("protocol", shown)]


def _models(seen: Evidence) -> list[Finding]:
    names = models_asked(seen)
    calls = [x for x in seen.exchanges if x.method == "POST" and x.path not in TOLD]
    unnamed = sum(x.asked.model is None for x in calls)
    findings = []
    if unnamed:
        findings.append(
            warning(
                "model names",
                f"{unnamed} requests name no model",
                "have the agent name one: it is how a role is told",
            )
        )
    if names:
        found = f"'gateway.models=[{','.join(names)}]'"
        if len(names) > 1:
            found += "; each can be a role of its own, one trained and one frozen"
        findings.append(ok("model names", found))
    return findings


def _system_prompts(seen: Evidence) -> list[Finding]:
    prompts = Counter(x.asked.system for x in seen.answered if x.method == "POST")
    none = prompts.pop("", 0)
    if not prompts:
        return [ok("system prompts", "none: nothing for prompt optimisation to start from")]
    shown = [_cut(text) for text, _ in prompts.most_common(_SEVERAL)]
    found = f"{len(prompts)} distinct" if len(prompts) > 1 else "one"
    if none:
        found += f", {none} calls without"
    found += ":\n" + "\n".join(shown)
    if len(prompts) > _SEVERAL:
        found += f"\nand {len(prompts) - _SEVERAL} more; it holds what differs from run to run"
    return [ok("system prompts", found)]


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _tools(seen: Evidence) -> list[Finding]:
    title = "tools"
    offering = [x for x in seen.exchanges if x.asked.tools]
    if not offering:
        return [ok(title, "none passed to the model")]
    answered = [x for x in offering if x.answered]
    made = sum(x.tool_calls for x in answered)
    most = max(x.asked.tools for x in offering)
    found = f"up to {most} passed in {len(offering)} requests, {made} calls made by the model"
    if seen.chat_template is not None and "tools" not in seen.chat_template:
        return [
            warning(
                title,
                f"{found}; the model's chat template has no place for tools, so it never sees them",
                "choose a model with tools in its template, or name one: "
                "inference.chat_template=FILE",
            )
        ]
    if answered and not made:
        return [
            warning(
                title,
                found,
                "see that inference.tool_call_parser suits the model; a model that never calls a "
                "tool has to be shown how first (finetune, or an example in the prompt)",
            )
        ]
    return [ok(title, found)]
