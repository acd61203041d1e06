"""The load and the upstream that the benchmark of the gateway uses, and what it makes of them."""

import json
from collections.abc import Iterator

import pytest

from benchmarks import behind_door, gateway, report, stub_upstream
from benchmarks.http_wire import body_of
from benchmarks.peer import Helper, our_helper

HEAD = b"http/1.1 200 ok\r\n"


@pytest.fixture
def load() -> Iterator[Helper]:
    with our_helper("http_load") as helper:
        yield helper


@pytest.fixture
def chat() -> Iterator[str]:
    """The address of a stub that answers after 2 ms."""
    with our_helper("stub_upstream", "2") as stub:
        yield f"http://127.0.0.1:{stub.ready}{behind_door.CHAT}"


@pytest.mark.parametrize(
    ("head", "data", "cut"),
    [
        (b"\r\ncontent-length: 3", b"abcHTTP", (b"abc", b"HTTP")),
        (b"\r\ncontent-length: 3", b"ab", None),
        (b"\r\ncontent-length: 0", b"", (b"", b"")),
        (b"\r\ntransfer-encoding: chunked", b"2\r\nab\r\n1;x\r\nc\r\n0\r\n\r\nH", (b"abc", b"H")),
        (b"\r\ntransfer-encoding: chunked", b"2\r\nab\r\n0\r\n", None),
        (b"\r\ntransfer-encoding: chunked", b"2\r\na", None),
        (b"\r\nserver: none", b"HTTP", (b"", b"HTTP")),
    ],
)
def test_a_body_is_cut_where_it_ends(
    head: bytes, data: bytes, cut: tuple[bytes, bytes] | None
) -> None:
    assert body_of(HEAD + head, data) == cut


def test_a_load_is_answered_after_the_fixed_time_by_the_stub(
    load: Helper, chat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "MEASURE_S", 0.3)
    monkeypatch.setattr(gateway, "WARM_S", 0.05)
    for streamed in ({}, {"stream": True}):
        measured = gateway.ask(load, [chat], clients=4, **streamed)
        assert measured["units"] > 4 and measured["p99_ms"] >= measured["p50_ms"] >= 2
        assert gateway.rate(measured) == measured["units"] / 0.3


def test_a_load_of_a_number_of_requests_asks_each_once(load: Helper, chat: str) -> None:
    bodies = [behind_door.body(number) for number in range(5)]
    assert len(set(bodies)) == 5
    measured = load.ask(urls=[chat], bodies=bodies, clients=2, requests=5, same=False)
    assert measured["units"] == len(measured["replies"]) == 5
    assert {reply.encode() for reply in measured["replies"]} == {stub_upstream.reply()}


def test_a_load_that_is_refused_is_no_measurement(load: Helper, chat: str) -> None:
    with pytest.raises(RuntimeError, match="ended before it answered"):
        # The stub has to call a tool, and there is none.
        load.ask(urls=[chat], bodies=['{"tool_choice": "required"}'], clients=1, requests=2)


def test_a_call_that_must_choose_a_tool_gets_a_call_of_it() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    asked = json.dumps({"tools": tools, "tool_choice": "required"}).encode()
    choice = json.loads(stub_upstream.tool_reply(asked))["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"a": 12, "b": 30}


def test_added_time_is_over_the_stub_alone_in_the_same_round() -> None:
    measured = {
        "direct": [{"p50_ms": 5.0}, {"p50_ms": 6.0}, {"p50_ms": 5.0}],
        "ours": [{"p50_ms": 7.0}, {"p50_ms": 9.0}, {"p50_ms": 6.0}],
        "peer": [{"p50_ms": 9.0}, {"p50_ms": 9.0}, {"p50_ms": 9.0}],
    }
    one = gateway.added(1, "p50", measured)
    assert one == report.Result("added_ms_c1", 2.0, 4.0, 2.0, "ms more at p50")


def test_the_claims_are_named_as_they_were_promised() -> None:
    targets = {one.name: one.target for one in gateway.GATEWAY.claims if one.target is not None}
    assert targets == {
        "requests_c32": 5,
        "added_ms_c1": 3,
        "engine_share": 0.95,
        "warm_start": 10,
        "warm_start_langgraph": 10,
    }
