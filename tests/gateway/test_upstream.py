"""A frozen policy behind somebody else's API: asked, paid for and recorded, its key never shown."""

import json
from collections.abc import Iterator

import httpx
import pytest
import ray
from aiohttp import web
from doors import open_door
from stub_engine import PIECES, REPLY, StubEngine, stub_engine

from lightning_ray.errors import UserError
from lightning_ray.gateway import (
    Answerer,
    GatewayConfig,
    RoleConfig,
    make_roles,
    upstream_answerer,
)
from lightning_ray.policies import PolicyConfig, PromptVersion, UpstreamConfig
from lightning_ray.rollouts import RolloutSpec
from lightning_ray.spans import whole_requests

SECRET = "sk-very-secret"
PROMPT = PromptVersion("solver", 2, "Be brief.", "Be exact.")


class Api(StubEngine):
    """An OpenAI-compatible API, which is not ours."""

    async def _answer(self, request: web.Request, how: str) -> web.StreamResponse:
        usage = {"prompt_tokens": 1000, "completion_tokens": 100}
        if how == "refuse":
            return web.json_response({"error": {"message": "no credit"}}, status=402)
        if how != "stream":
            choice = {"index": 0, "message": {"content": "42"}, "finish_reason": "stop"}
            return web.json_response({"id": "u1", "choices": [choice], "usage": usage})
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        for text in ("4", "2"):
            event = {"id": "u1", "choices": [{"index": 0, "delta": {"content": text}}]}
            await reply.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        event = {"choices": [], "usage": usage}
        await reply.write(b"data: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n")
        await reply.write_eof()
        return reply


class Door:
    def __init__(self, url: str, api: Api, engine: StubEngine, store, queue):
        self.url, self.api, self.engine, self.store, self.queue = url, api, engine, store, queue
        self._count = 0

    def ask(
        self, how: str = "", prompt: bool = False, note: bool = False, **body: object
    ) -> httpx.Response:
        """One call of a new attempt, whose id is `attempt` afterwards."""
        self._count += 1
        prompts = (PROMPT,) if prompt else ()
        spec = RolloutSpec(
            f"up-{self._count}", "task", {}, 600.0, prompts=prompts, note_messages=note
        )
        self.queue.enqueue([spec])
        lease = ray.get(self.queue.actor.dequeue.remote(5), timeout=10)
        self.attempt = lease.attempt_id
        self.base = f"{self.url}/a/{lease.capability}/v1"
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]
        return httpx.post(
            f"{self.base}/chat/completions",
            json={"model": "solver-mini", "messages": messages, **body},
            headers={"x-test": how, "authorization": "Bearer the-agents-own"},
            timeout=30,
        )

    def span(self) -> dict:
        """The one span of the latest attempt, its attributes parsed."""
        (row,) = self.store.get([self.attempt]).to_pylist()
        return {**row, "attributes": json.loads(row["attributes"])}


@pytest.fixture(scope="module")
def door(ray_cluster, tmp_path_factory) -> Iterator[Door]:
    config = GatewayConfig(
        roles={
            "planner": RoleConfig(model="planner-mini"),
            "solver": RoleConfig(model="solver-mini", policy="solver"),
        }
    )
    with pytest.MonkeyPatch.context() as patch, stub_engine() as engine, stub_engine(Api()) as api:
        patch.setenv("SOLVER_KEY", SECRET)
        upstream = UpstreamConfig(f"{api.url}/v1", "big-model", "SOLVER_KEY", 1.0, 10.0)
        answerers = [
            Answerer("planner", (engine.url,), "key"),
            upstream_answerer(PolicyConfig("solver", train=False, upstream=upstream)),
        ]
        roles = make_roles(config, "planner", ["planner", "solver"])
        with open_door(tmp_path_factory.mktemp("door"), config, answerers, roles) as door:
            yield Door(door.url, api, engine, door.store, door.queue)


def test_an_upstream_answers_under_its_own_name_and_key(door):
    reply = door.ask()
    assert reply.json()["choices"][0]["message"]["content"] == "42"
    _, path, headers, body = door.api.requests[-1]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {SECRET}"
    assert not any(name.startswith("x-lightning-ray-") for name in headers)
    assert json.loads(body)["model"] == "big-model"


@pytest.mark.parametrize("how", ["", "stream"])
def test_what_an_upstream_said_and_cost_is_recorded_and_its_key_is_not(door, how):
    door.ask(how).read()
    span = door.span()
    told = span["attributes"]
    assert (span["kind"], span["policy"], span["role"]) == ("model_call", "solver", "solver")
    assert span["token_ids"] is None and span["version"] is None
    assert told["reply"]["text"] == "42"
    assert told["usage"] == {"input_tokens": 1000, "output_tokens": 100}
    assert told["cost_usd"] == pytest.approx(0.002)
    assert (span["input_tokens"], span["output_tokens"]) == (1000, 100)
    assert span["cost_usd"] == told["cost_usd"]
    assert told["request"]["messages"][0]["content"] == "Be brief."
    assert SECRET not in json.dumps(span) and "the-agents-own" not in json.dumps(span)


def test_a_conversation_is_stored_as_what_each_turn_adds(door):
    door.ask().raise_for_status()
    messages = json.loads(door.api.requests[-1][3])["messages"]
    said = [{"role": "assistant", "content": "42"}, {"role": "user", "content": "Sure?"}]
    asked = {"model": "solver-mini", "messages": messages + said}
    httpx.post(f"{door.base}/chat/completions", json=asked, timeout=30).raise_for_status()
    spans = door.store.get([door.attempt])
    first, second = (json.loads(told)["request"] for told in spans["attributes"].to_pylist())
    assert first == {"messages": messages} and second["messages"] == said
    assert list(whole_requests(spans).values()) == [first, {"messages": messages + said}]


def test_an_upstreams_refusal_is_passed_on_and_recorded_as_an_error(door):
    reply = door.ask("refuse")
    assert reply.status_code == 402 and "no credit" in reply.text
    assert door.span()["status"] == "error"


def test_a_prompt_version_reaches_the_upstream_and_is_named_on_the_span(door):
    door.ask(prompt=True)
    body = json.loads(door.api.requests[-1][3])
    assert body["messages"][0] == {"role": "system", "content": "Be exact."}
    assert door.span()["attributes"]["prompt"] == "solver@2"


@pytest.mark.parametrize("note", [False, True])
@pytest.mark.parametrize("how", ["", "stream"])
def test_what_an_engine_said_is_kept_as_text_only_where_a_rollout_asks(door, how, note):
    for _ in PIECES:
        door.engine.piece.release()
    reply = door.ask(how, note=note, model="planner-mini")
    # Byte for byte as the engine wrote it, read or not.
    assert reply.content == (b"".join(PIECES) if how else REPLY)
    rows = door.store.get([door.attempt]).to_pylist()
    if not note:
        assert rows == []
        return
    (row,) = rows
    told = json.loads(row["attributes"])
    assert (row["kind"], row["policy"], row["token_ids"]) == ("message", "planner", None)
    assert told["request"]["messages"][0]["content"] == "Be brief."
    assert told["reply"]["text"] == ("" if how else "ü ü")


def test_what_an_upstream_said_is_kept_once(door):
    door.ask(note=True)
    assert door.span()["kind"] == "model_call"


def test_every_role_has_its_model_in_the_list(door):
    door.ask()
    spec = RolloutSpec("listing", "task", {}, 600.0)
    door.queue.enqueue([spec])
    lease = ray.get(door.queue.actor.dequeue.remote(5), timeout=10)
    models = httpx.get(f"{door.url}/a/{lease.capability}/v1/models", timeout=30).json()["data"]
    assert [model["id"] for model in models] == ["planner-mini", "solver-mini"]


def test_a_key_that_is_not_set_is_said_before_anything_starts(monkeypatch):
    monkeypatch.delenv("SOLVER_KEY", raising=False)
    upstream = UpstreamConfig("https://api.example.com/v1", api_key_env="SOLVER_KEY")
    with pytest.raises(UserError, match="environment variable SOLVER_KEY; it is not set"):
        upstream_answerer(PolicyConfig("solver", train=False, upstream=upstream))
