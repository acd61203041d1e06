"""The door on a real Ray Serve, in front of a stub that answers with known bytes."""

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from doors import OpenDoor, open_door
from stub_engine import LARGE_PART, LARGE_PARTS, PIECES, REPLY, StubEngine, stub_engine

from lightning_ray.gateway import Answerer, GatewayConfig
from lightning_ray.rollouts import AttemptOutcome, AttemptStatus
from lightning_ray.rollouts.types import Lease

KEY = "the engines' own key"
CHAT = "/v1/chat/completions"
CALL_TIMEOUT_S = 5.0
MAX_BODY_BYTES = 10_000


class Door:
    """The gateway under test, the queue that knows who may enter, and the stub behind."""

    def __init__(self, door: OpenDoor, stub: StubEngine):
        self.port, self.queue, self.lease = door.port, door.queue, door.lease
        self.stub = stub

    def send(
        self, capability: str, path: str = CHAT, body: Any = None, how: str = "", **more: str
    ) -> http.client.HTTPResponse:
        """Sends a request as an agent would; `how` tells the stub how to answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        if body is None:
            body = {"model": "gpt-4o-mini", "messages": []}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", "x-test": how, **more}
        method = "GET" if body == b"" else "POST"
        connection.request(method, f"/a/{capability}{path}", content, headers)
        reply = connection.getresponse()
        reply.connection = connection  # type: ignore[attr-defined]
        return reply


@pytest.fixture(scope="module")
def door(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    config = GatewayConfig(
        models=["gpt-4o-mini", "planner"],
        max_body_bytes=MAX_BODY_BYTES,
        call_timeout_s=CALL_TIMEOUT_S,
    )
    with stub_engine() as stub:
        answerers = [Answerer("policy", (stub.url,), KEY)]
        with open_door(tmp_path_factory.mktemp("door"), config, answerers) as door:
            yield Door(door, stub)


@pytest.fixture
def lease(door: Door) -> Lease:
    door.stub.requests.clear()
    door.stub.gone.clear()
    return door.lease()


def refusal(reply: http.client.HTTPResponse) -> tuple[int, str]:
    error = json.loads(reply.read())["error"]
    return reply.status, error["message"]


def test_a_reply_is_passed_on_byte_by_byte(door: Door, lease: Lease) -> None:
    body = b'{"model":  "planner", "messages": []}'
    reply = door.send(lease.capability, f"{CHAT}?beta=1&x=%20", body)
    assert (reply.status, reply.read()) == (200, REPLY)
    assert reply.getheader("content-type") == "application/json"
    ((method, path, _, seen),) = door.stub.requests
    assert (method, path.replace("+", "%20"), seen) == ("POST", f"{CHAT}?beta=1&x=%20", body)


def test_an_engines_own_refusal_is_passed_on_as_it_is(door: Door, lease: Lease) -> None:
    reply = door.send(lease.capability, how="refuse")
    assert (reply.status, reply.read()) == (422, b'{"error": "mine"}')
    assert reply.getheader("x-engine") == "1"


def test_a_stream_is_passed_on_while_it_is_written(door: Door, lease: Lease) -> None:
    door.stub.piece.release()  # the first piece; every other only after the one before was read
    reply = door.send(lease.capability, how="stream")
    assert reply.getheader("content-type") == "text/event-stream; charset=utf-8"
    for piece in PIECES:
        read = b""
        while len(read) < len(piece):
            read += reply.read1(len(piece) - len(read))
        assert read == piece
        door.stub.piece.release()
    assert reply.read() == b""


def test_the_engine_is_told_whose_call_it_is_and_no_agent_can_pretend(
    door: Door, lease: Lease
) -> None:
    forged = {
        "X-Lightning-Ray-Attempt": "someone/1",
        "x-lightning-ray-key": "guess",
        "x-lightning-ray-anything": "1",
        "Authorization": "Bearer secret",
        "x-api-key": "secret",
        "anthropic-version": "2023-06-01",
        "traceparent": "00-1-2-01",
    }
    door.send(lease.capability, **forged).read()
    ((_, _, headers, _),) = door.stub.requests
    assert {n: v for n, v in headers.items() if n.startswith("x-lightning-ray-")} == {
        "x-lightning-ray-key": KEY,
        "x-lightning-ray-run": "run",
        "x-lightning-ray-rollout": lease.rollout_id,
        "x-lightning-ray-attempt": lease.attempt_id,
        "x-lightning-ray-role": "gpt-4o-mini",
    }
    assert "secret" not in str(headers)
    assert headers["anthropic-version"] == "2023-06-01" and headers["traceparent"] == "00-1-2-01"
    # Nobody asked for a compressed reply, and it would be passed on compressed.
    assert "accept-encoding" not in headers


def test_the_models_can_be_listed(door: Door, lease: Lease) -> None:
    reply = door.send(lease.capability, "/v1/models", b"")
    assert (reply.status, reply.read()) == (200, REPLY)
    assert door.stub.requests[0][:2] == ("GET", "/v1/models")


def test_only_a_running_attempt_may_enter(door: Door, lease: Lease) -> None:
    assert refusal(door.send("guess")) == (401, "this base URL belongs to no running attempt")
    outcome = AttemptOutcome(AttemptStatus.SUCCEEDED)
    assert ray.get(door.queue.actor.finish.remote(lease.attempt_id, outcome), timeout=10)
    assert refusal(door.send(lease.capability))[0] == 401
    assert door.stub.requests == []


@pytest.mark.parametrize("how", ["", "hang", "large stream"])
def test_an_attempt_that_has_just_ended_gets_no_byte_more(
    door: Door, lease: Lease, how: str
) -> None:
    # So lately that its next call goes to the engine while the queue is asked.
    assert door.send(lease.capability).read() == REPLY
    outcome = AttemptOutcome(AttemptStatus.SUCCEEDED)
    assert ray.get(door.queue.actor.finish.remote(lease.attempt_id, outcome), timeout=10)
    begin = time.monotonic()
    reply = door.send(lease.capability, how=how)
    assert refusal(reply) == (401, "this base URL belongs to no running attempt")
    assert time.monotonic() - begin < CALL_TIMEOUT_S - 1
    if how and len(door.stub.requests) > 1:
        # The engine was asked, and works for nobody now.
        assert door.stub.gone.wait(10)
    # Neither is it asked again, nor does a wrong call learn more than that.
    assert refusal(door.send(lease.capability, body={"model": "gpt-5"}, how="again"))[0] == 401
    assert refusal(door.send(lease.capability, how="again"))[0] == 401
    # By its name, for the call before may arrive there only now.
    assert "again" not in [headers["x-test"] for _, _, headers, _ in door.stub.requests]


def test_a_cookie_of_one_reply_is_sent_with_no_other_call(door: Door, lease: Lease) -> None:
    reply = door.send(lease.capability, how="cookie")
    assert reply.getheader("set-cookie") == "session=1"
    door.send(lease.capability).read()
    assert "cookie" not in door.stub.requests[-1][2]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (CHAT, {"model": "gpt-5"}, 404, "no model 'gpt-5' here; the models are: gpt-4o-mini, plan"),
        (CHAT, {"messages": []}, 404, "no model None here"),
        ("/tokenize", None, 404, "POST /tokenize is not served here"),
        ("/v1/load_lora_adapter", None, 404, "is not served here"),
        ("/v1/chat/../../tokenize", None, 404, "is not served here"),
        ("/v1/models", None, 404, "POST /v1/models is not served here"),
        (CHAT, b"", 404, f"GET {CHAT} is not served here"),
        (CHAT, b"{not json", 400, "the body cannot be read"),
        (CHAT, b"[" * 5000, 400, "nested too deeply"),
        (CHAT, b" " * (MAX_BODY_BYTES + 1), 413, f"larger than {MAX_BODY_BYTES} bytes"),
    ],
)
def test_what_the_door_does_not_serve_is_refused_with_a_reason(
    door: Door, lease: Lease, path: str, body: Any, status: int, message: str
) -> None:
    found, reason = refusal(door.send(lease.capability, path, body))
    assert found == status and message in reason
    assert door.stub.requests == []


def test_an_anthropic_client_is_refused_in_its_own_words(door: Door, lease: Lease) -> None:
    reply = door.send(lease.capability, "/v1/messages", {"model": "claude"})
    body = json.loads(reply.read())
    assert reply.status == 404 and body["type"] == "error"
    assert body["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("how", ["hang in a stream", "hang"])
def test_an_agent_that_goes_away_frees_the_engine(door: Door, lease: Lease, how: str) -> None:
    if how == "hang":
        connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=30)
        body = json.dumps({"model": "planner"})
        connection.request("POST", f"/a/{lease.capability}{CHAT}", body, {"x-test": how})
        deadline = time.monotonic() + 10
        while not door.stub.requests and time.monotonic() < deadline:
            time.sleep(0.01)
    else:
        reply = door.send(lease.capability, how=how)
        assert reply.read1(1) == PIECES[0][:1]
        connection = reply.connection  # type: ignore[attr-defined]
        reply.close()
    connection.close()
    # Long before the call would have timed out by itself.
    assert door.stub.gone.wait(CALL_TIMEOUT_S / 2)


@pytest.mark.parametrize("how", ["hang in a stream", "hang"])
def test_a_call_without_an_end_is_ended(door: Door, lease: Lease, how: str) -> None:
    begun = time.monotonic()
    reply = door.send(lease.capability, how=how)
    if how == "hang":
        status, message = refusal(reply)
        assert status == 504 and f"no answer within {CALL_TIMEOUT_S:g} s" in message
    else:
        # Cut off, so that no client takes what it has for the whole.
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            reply.read()
    assert CALL_TIMEOUT_S - 1 < time.monotonic() - begun < CALL_TIMEOUT_S + 10
    assert door.stub.gone.wait(5)


def test_a_stream_whose_engine_dies_is_cut_off_at_once(door: Door, lease: Lease) -> None:
    begun = time.monotonic()
    reply = door.send(lease.capability, how="die in a stream")
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        reply.read()
    assert time.monotonic() - begun < CALL_TIMEOUT_S / 2
    assert door.send(lease.capability).status == 200


def test_a_slow_reader_is_waited_for_and_keeps_nobody_waiting(door: Door, lease: Lease) -> None:
    reply = door.send(lease.capability, how="large stream")
    assert reply.read1(10) == LARGE_PART[:10]
    for _ in range(5):
        assert door.send(lease.capability).read() == REPLY
    time.sleep(0.5)
    # What nobody has read yet stays with the engine: the door holds no more than buffers do.
    assert door.stub.sent * len(LARGE_PART) < 40e6
    assert 10 + len(reply.read()) == LARGE_PARTS * len(LARGE_PART)
