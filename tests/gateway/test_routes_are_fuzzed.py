"""The door's own routes, fuzzed from their description: nothing that is sent is a fault of ours."""

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import schemathesis
from doors import OpenDoor, open_door
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lightning_ray.gateway import GatewayConfig, ServingConfig
from lightning_ray.gateway.openapi import describe_routes
from lightning_ray.spans.limits import TelemetryLimits

KEY = "the key of a caller that records"
LIMITS = TelemetryLimits(max_decoded_bytes=1_000_000)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

for form in ("application/x-protobuf", "application/vnd.apache.arrow.stream"):
    schemathesis.openapi.media_type(form, st.binary(max_size=400))


@dataclass
class Fuzzed:
    door: OpenDoor
    capability: str


@pytest.fixture(scope="module")
def fuzzed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    config = GatewayConfig(max_body_bytes=200_000, telemetry=LIMITS)
    serving = ServingConfig(recorders=["web"])
    folder = tmp_path_factory.mktemp("door")
    with open_door(folder, config, keys={"web": KEY}, serving=serving) as door:
        yield Fuzzed(door, door.lease().capability)


@pytest.fixture(scope="module")
def described(fuzzed: Fuzzed) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{fuzzed.door.url}/openapi.json")


@pytest.mark.parametrize("path", describe_routes()["paths"])
def test_no_request_is_a_fault_of_the_door(
    fuzzed: Fuzzed, described: schemathesis.BaseSchema, path: str
) -> None:
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(case=described[path]["POST"].as_strategy(), known=st.booleans())
    def send(case: Case, known: bool) -> None:
        if known and "capability" in case.path_parameters:
            case.path_parameters["capability"] = fuzzed.capability
        reply = case.call(headers={"authorization": f"Bearer {KEY}"}, timeout=30)
        case.validate_response(reply, checks=CHECKS)
        answered.add(reply.status_code)

    answered: set[int] = set()
    send()
    assert 400 in answered or 415 in answered
    # What is described as good is taken; feedback needs a conversation that there is.
    assert 200 in answered or path in ("/v1/feedback", "/v1/spans", "/a/{capability}/v1/spans")


def test_the_store_goes_on_after_all_that(fuzzed: Fuzzed) -> None:
    lease = fuzzed.door.lease("afterwards")
    url = f"{fuzzed.door.url}/a/{lease.capability}/v1/rewards"
    assert httpx.post(url, json=0.5, timeout=30).json() == {"kept": 1}
    (row,) = fuzzed.door.store.get([lease.attempt_id]).to_pylist()
    assert row["value"] == 0.5
