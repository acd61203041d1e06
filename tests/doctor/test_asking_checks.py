"""What is said of an agent's requests."""

import pytest
from doctor_support import asked, ended, evidence, only

from lightning_ray.doctor.asking import check_asking, models_asked
from lightning_ray.doctor.finding import Level


def test_an_agent_that_never_calls_is_told_its_variables_and_where_it_went() -> None:
    seen = evidence([ended()], given=["OPENAI_BASE_URL"], hosts=["api.example.com"])
    (finding,) = check_asking(seen)
    assert finding.level is Level.MISSING
    assert "given OPENAI_BASE_URL; it tried to reach api.example.com" in finding.found
    (unseen,) = check_asking(evidence([ended()], given=["OPENAI_BASE_URL"]))
    assert "tried" not in unseen.found and "may ignore them" in unseen.change


def test_runs_without_a_call_are_a_warning() -> None:
    seen = evidence([ended("a/1"), ended("b/1")], [asked("a/1")])
    finding = only(check_asking(seen), "base URL")
    assert finding.level is Level.WARNING and "1 runs made none" in finding.found


def test_protocols_are_counted_by_path_and_stream() -> None:
    requests = [asked(), asked(), asked(path="/v1/messages", stream=True)]
    requests += [asked(path="/v1/models", method="GET", model=None)]
    findings = check_asking(evidence([ended()], requests))
    found = only(findings, "protocol").found
    assert found == "/v1/chat/completions (2), /v1/messages (1, streamed)"
    assert {finding.level for finding in findings} == {Level.OK}


@pytest.mark.parametrize(
    ("path", "status", "error", "what", "change"),
    [
        ("/v1/v1/messages", 404, "not served", {}, "base URL that has it"),
        ("/chat/completions", 404, "not served", {}, "ends in /v1"),
        ("/v1/assistants", 404, "not served", {}, "/v1/assistants is not served"),
        ("/v1/metrics", 404, "not served", {}, "OTEL_METRICS_EXPORTER=none"),
        (None, 400, '"auto" tool choice requires --x', {"tools": 2}, "tool_call_parser"),
        (None, 400, "maximum context length is 2048", {}, "inference.max_model_len=4096"),
        (None, 500, "oops", {}, "a fault on our side"),
        (None, 422, "bad field", {}, "mend the request"),
    ],
)
def test_a_refusal_comes_with_its_cure(
    path: str | None, status: int, error: str, what: dict, change: str
) -> None:
    refused = asked(path=path or "/v1/chat/completions", status=status, error=error, **what)
    missing = only(check_asking(evidence([ended()], [refused])), "refusals")
    assert missing.level is Level.MISSING and change in missing.change
    assert f"{status} {error}" in missing.found
    # An agent that gets its answers elsewhere can be trained.
    warning = only(check_asking(evidence([ended()], [refused, asked()])), "refusals")
    assert warning.level is Level.WARNING


def test_models_are_named_as_the_configuration_wants_them() -> None:
    requests = [asked(model="small"), asked(model="large"), asked(model="large")]
    seen = evidence([ended()], requests)
    assert models_asked(seen) == ["large", "small"]
    assert "'gateway.models=[large,small]'" in only(check_asking(seen), "model names").found
    nameless = only(check_asking(evidence([ended()], [asked(model=None)])), "model names")
    assert nameless.level is Level.WARNING


def test_distinct_system_prompts_are_shown_by_their_beginning() -> None:
    requests = [asked(system="Plan." + "x" * 100), asked(system="Solve."), asked()]
    found = only(check_asking(evidence([ended()], requests)), "system prompts").found
    assert found.startswith("2 distinct, 1 calls without:")
    assert "'Solve.'" in found and "x" * 75 + "..." in found and "x" * 76 not in found
    many = [asked(system=f"Today is day {day}.") for day in range(9)]
    assert "and 6 more" in only(check_asking(evidence([ended()], many)), "system prompts").found


@pytest.mark.parametrize(
    ("template", "calls", "level"),
    [
        ("{% if tools %}", 1, Level.OK),
        ("{% if tools %}", 0, Level.WARNING),
        ("{{ messages }}", 1, Level.WARNING),
        (None, 1, Level.OK),
    ],
)
def test_tools_must_reach_the_model_and_be_called(
    template: str | None, calls: int, level: Level
) -> None:
    seen = evidence([ended()], [asked(tools=3, tool_calls=calls)], chat_template=template)
    finding = only(check_asking(seen), "tools")
    assert finding.level is level and f"{calls} calls made" in finding.found
