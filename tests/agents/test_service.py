"""Agents that are services: asked by HTTP, by a real client of a real server."""

import asyncio
import json
import socket
from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_ray.agents import (
    AgentConfig,
    AgentEnd,
    ServiceConfig,
    Task,
    attempt_environment,
    check_agent,
    make_launcher,
)
from lightning_ray.errors import InfrastructureError, UserError

ENV = attempt_environment("http://gateway:8000/a/capability", "key")


@dataclass
class Service:
    """A server that does what each task says, one request a connection."""

    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    hanging: int = 0
    """Requests that are being answered, slowly."""
    abandoned: int = 0
    """Connections that the client closed before it had its answer."""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.requests.append((head[0], headers, body))
        status, content = body.get("status", 200), body.get("content", "fine").encode("latin-1")
        if body.get("slow"):
            self.hanging += 1
            gone = await reader.read(1) == b""
            self.abandoned += gone
            self.hanging -= 1
        elif not body.get("breaks off"):
            writer.write(f"HTTP/1.1 {status} Said\r\nContent-Length: {len(content)}\r\n".encode())
            writer.write(b"Set-Cookie: kept=1\r\nLocation: http://127.0.0.1:1/\r\n\r\n" + content)
            await writer.drain()
        writer.close()


def asked(use, **settings):
    """What `use(launcher, service)` gives, with a service that runs meanwhile."""

    async def main():
        service = Service()
        server = await asyncio.start_server(service.handle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/solve?x=1"
        launcher = make_launcher(config(url=url, **settings))
        await launcher.start()
        try:
            async with asyncio.timeout(30):
                return await use(launcher, service)
        finally:
            await launcher.close()
            server.close()

    return asyncio.run(main())


def config(max_output_bytes=1 << 20, **service):
    return AgentConfig(
        name="s", service=ServiceConfig(**service), grader="x:y", max_output_bytes=max_output_bytes
    )


def one(task, timeout_s=10.0, **settings):
    """(result, the service) of one attempt."""

    async def use(launcher, service):
        return await launcher.run(Task("t1", task), ENV, timeout_s), service

    return asked(use, **settings)


def test_a_request_holds_the_task_and_says_where_the_attempt_lives():
    headers = {"Authorization": "Bearer mine", "X-Lightning-Ray-Api-Key": "not this"}
    result, service = one(
        {"question": "ä?", "lightning_ray": "a field of its own"}, headers=headers
    )
    ((line, sent, body),) = service.requests
    assert line == "POST /solve?x=1 HTTP/1.1"
    told = {
        "base_url": "http://gateway:8000/a/capability/v1",
        "anthropic_base_url": "http://gateway:8000/a/capability",
        "api_key": "key",
        "reward_url": "http://gateway:8000/a/capability/v1/rewards",
        "otlp_endpoint": "http://gateway:8000/a/capability",
    }
    assert body == {"question": "ä?", "id": "t1", "lightning_ray": told}
    ours = {name: value for name, value in sent.items() if name.startswith("x-lightning-ray-")}
    assert ours == {f"x-lightning-ray-{k.replace('_', '-')}": v for k, v in told.items()}
    assert (sent["content-type"], sent["authorization"]) == ("application/json", "bearer mine")
    assert (result.end, result.exit_code, result.output) == (AgentEnd.EXITED, 0, "fine")
    assert (result.stderr, result.reason, result.fault, result.warm) == ("", "", "", False)


@pytest.mark.parametrize("status", [200, 201, 299])
def test_any_good_answer_is_the_output(status):
    result, _ = one({"status": status, "content": "a\xff"}, method="PUT")
    assert (result.end, result.exit_code, result.output) == (AgentEnd.EXITED, 0, "a\ufffd")


@pytest.mark.parametrize("status", [302, 404, 500, 503])
def test_any_other_answer_is_a_failed_attempt_with_its_beginning(status):
    result, service = one({"status": status, "content": "no\n such thing " + "x" * 9000})
    assert (result.end, result.exit_code, result.fault) == (AgentEnd.REFUSED, None, "")
    assert result.reason.startswith(f"the service answered with HTTP {status}: no such thing xxx")
    assert len(result.reason) < 600 and len(service.requests) == 1


def test_an_answer_without_a_word_is_a_failed_attempt():
    result, _ = one({"breaks off": True})
    assert result.end is AgentEnd.REFUSED and "the service broke off: Server" in result.reason


def test_a_long_answer_is_cut():
    result, _ = one({"content": "x" * 500_000}, max_output_bytes=1000)
    assert (result.output, result.truncated, result.end) == ("x" * 1000, True, AgentEnd.EXITED)


def test_nobody_at_the_address_is_a_fault_of_the_machinery():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"

    async def use():
        launcher = make_launcher(config(url=url))
        await launcher.start()
        try:
            return await launcher.run(Task("1", {}), ENV, 5)
        finally:
            await launcher.close()

    result = asyncio.run(use())
    assert (result.end, result.exit_code) == (AgentEnd.LAUNCH_FAILED, None)
    assert result.fault == f"agent.service.url: {url} takes no connection: Connection refused"


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("timeouts", [(0.3, None), (20.0, 0.3)])
def test_an_attempt_that_takes_too_long_closes_its_connection(timeouts):
    limit, setting = timeouts

    async def use(launcher, service):
        result = await launcher.run(Task("1", {"slow": True}), ENV, limit)
        await until(lambda: service.abandoned == 1)
        return result

    result = asked(use, timeout_s=setting)
    assert (result.end, result.exit_code) == (AgentEnd.TIMED_OUT, None)
    assert 0.3 <= result.seconds < 5


def test_a_cancelled_attempt_closes_its_connection():
    async def use(launcher, service):
        run = asyncio.create_task(launcher.run(Task("1", {"slow": True}), ENV, 60))
        await until(lambda: service.hanging == 1)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        await until(lambda: service.abandoned == 1)
        return await launcher.run(Task("2", {}), ENV, 60)

    assert asked(use).end is AgentEnd.EXITED


def test_closing_cancels_the_attempts_in_flight():
    async def use(launcher, service):
        task = Task("1", {"slow": True})
        runs = [asyncio.create_task(launcher.run(task, ENV, 60)) for _ in range(20)]
        await until(lambda: service.hanging == 20)
        await launcher.close()
        results = await asyncio.gather(*runs)
        await until(lambda: service.abandoned == 20)
        with pytest.raises(InfrastructureError, match="launcher is closed"):
            await launcher.run(task, ENV, 60)
        return results

    assert {result.end for result in asked(use)} == {AgentEnd.CANCELLED}


def test_attempts_have_nothing_in_common():
    async def use(launcher, service):
        for number in range(3):
            await launcher.run(Task(str(number), {}), ENV, 10)
        return service.requests

    requests = asked(use)
    assert len(requests) == 3 and not any("cookie" in headers for _, headers, _ in requests)


def test_the_schema_is_one_for_hydra():
    schema = OmegaConf.structured(AgentConfig)
    given = {"name": "a", "grader": "g:f", "service": {"url": "http://h/", "headers": {"A": "1"}}}
    agent = OmegaConf.to_object(OmegaConf.merge(schema, given))
    assert agent.service == ServiceConfig(url="http://h/", headers={"A": "1"})


@pytest.mark.parametrize(
    ("service", "settings", "message"),
    [
        ({"url": "host:80/x"}, {}, "agent.service.url must be http"),
        ({"url": "http:///x"}, {}, "must be http"),
        ({"url": "http://h:port/x"}, {}, "must be http"),
        ({"url": "http://[h/x"}, {}, "must be http"),
        ({"headers": {"A B": "1"}}, {}, "agent.service.headers: 'A B' is no header"),
        ({"url": "http://me:pass@h/"}, {}, "agent.service.url holds a name or a password"),
        ({"method": "GET"}, {}, "agent.service.method=GET: must be POST or PUT or PATCH"),
        ({"timeout_s": 0}, {}, "agent.service.timeout_s=0: must be above 0"),
        ({"headers": {"A": "1\n2"}}, {}, "agent.service.headers: 'A' is no header"),
        ({}, {"command": ["true"]}, "agent.command and agent.service.url are both given"),
        ({}, {"max_memory_mb": 5}, "agent.max_memory_mb is for an agent that is started here"),
        ({}, {"task_env": {"A": "b"}}, "agent.task_env is for an agent that is started here"),
        ({}, {"timeout_s": 0}, "agent.timeout_s=0: must be above 0"),
    ],
)
def test_a_wrong_service_is_refused_in_one_line(tmp_path, service, settings, message):
    (tmp_path / "grader.py").write_text("def grade(*_): return 0\n")
    agent = config(url="http://127.0.0.1:9/")
    agent.grader = f"{tmp_path}/grader.py:grade"
    check_agent(agent, [Task("1", {})])
    for name, value in service.items():
        setattr(agent.service, name, value)
    for name, value in settings.items():
        setattr(agent, name, value)
    with pytest.raises(UserError, match=message) as caught:
        check_agent(agent, [Task("1", {})])
    assert "\n" not in str(caught.value) and "pass@" not in str(caught.value)
