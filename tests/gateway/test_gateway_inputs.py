import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.errors import UserError
from lightning_ray.gateway import (
    GatewayConfig,
    ServingConfig,
    check_gateway,
    check_serving,
    choose_port,
)
from lightning_ray.gateway.protocols import CALLS, LISTINGS, error_body, parse_body


@pytest.mark.parametrize("path", sorted(CALLS | LISTINGS))
def test_an_error_has_the_shape_that_the_clients_of_its_protocol_read(path: str) -> None:
    body = json.loads(error_body(path, 404, "no model"))
    assert body["error"]["message"] == "no model"
    assert body["error"]["type"] == "not_found_error"
    if path.startswith("/v1/messages"):
        assert body["type"] == "error"
    else:
        assert body["error"]["code"] == 404 and body["error"]["param"] is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (504, "api_error")],
)
def test_an_errors_type_follows_its_status(status: int, kind: str) -> None:
    assert json.loads(error_body("/v1/messages", status, ""))["error"]["type"] == kind


@given(
    st.dictionaries(
        st.sampled_from(["model", "messages", "n"]), st.none() | st.integers() | st.text()
    )
)
def test_a_body_is_read_whatever_its_content(request: dict[str, object]) -> None:
    assert parse_body(json.dumps(request).encode()) == request


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"model"', b"\xff\xfe", b"[" * 100_000, b"9" * 5000]
)
def test_a_body_that_is_no_json_object_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError):
        parse_body(body)


def test_a_port_in_use_is_one_line_that_says_what_to_change() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as raised:
            choose_port(GatewayConfig(port=port))
    assert str(raised.value) == (
        f"gateway.port={port}: cannot listen on 127.0.0.1:{port} (Address already in use); "
        "choose another port, or 0 for any free one"
    )


def test_a_free_port_is_found_and_can_be_listened_on() -> None:
    port = choose_port(GatewayConfig(port=0))
    assert port > 0 and choose_port(GatewayConfig(port=port)) == port


def test_a_host_that_is_not_ours_is_one_line() -> None:
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.77:0"):
        choose_port(GatewayConfig(host="192.0.2.77"))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"port": 70000}, "gateway.port=70000"),
        ({"num_replicas": 0}, "gateway.num_replicas=0"),
        ({"models": []}, "gateway.models"),
        ({"call_timeout_s": 0}, "gateway.call_timeout_s"),
        ({"max_body_bytes": 0}, "gateway.max_body_bytes"),
    ],
)
def test_settings_that_no_gateway_can_run_with_are_refused(
    wrong: dict[str, object], named: str
) -> None:
    check_gateway(GatewayConfig())
    with pytest.raises(UserError, match=named):
        check_gateway(GatewayConfig(**wrong))  # type: ignore[arg-type]


def test_a_recorder_is_one_of_the_callers() -> None:
    check_serving(ServingConfig(keys={"web": "WEB_API_KEY"}, recorders=["web"]))
    with pytest.raises(UserError, match=r"serving.recorders: 'engine' is no caller .* are: web"):
        check_serving(ServingConfig(keys={"web": "WEB_API_KEY"}, recorders=["engine"]))
