"""Finding out where an agent goes that does not come to us."""

import asyncio
import textwrap
from pathlib import Path

import pytest

from lightning_ray.agents import AgentConfig, Task
from lightning_ray.doctor.elsewhere import hosts_asked, proxied_host

PYTHON = """
    import http.client, sys, urllib.error, urllib.request
    for url in ("http://one.invalid:8080/v1/models", "https://two.invalid/v1/chat/completions"):
        try:
            urllib.request.urlopen(url, timeout=5)
        except OSError as error:
            print(error)
"""


def test_the_hosts_of_an_agent_are_seen_and_not_reached(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(textwrap.dedent(PYTHON))
    agent = AgentConfig(name="a", command=["python", "agent.py"], cwd=str(tmp_path), grader="")
    found = asyncio.run(hosts_asked(agent, Task("t", {}), {"OPENAI_BASE_URL": "http://x/v1"}))
    assert found == ["one.invalid:8080", "two.invalid"]


def test_an_agent_that_asks_nobody_gives_nothing_and_is_bounded(tmp_path: Path) -> None:
    command = ["sh", "-c", "sleep 60"]
    agent = AgentConfig(name="a", command=command, cwd=str(tmp_path), grader="", timeout_s=0.3)
    assert asyncio.run(asyncio.wait_for(hosts_asked(agent, Task("t", {}), {}), 20)) == []


@pytest.mark.parametrize(
    ("line", "host"),
    [
        (b"CONNECT api.example.com:443 HTTP/1.1\r\n", "api.example.com"),
        (b"CONNECT api.example.com:8443 HTTP/1.1\r\n", "api.example.com:8443"),
        (b"POST http://localhost:11434/api/chat HTTP/1.1\r\n", "localhost:11434"),
        (b"GET / HTTP/1.1\r\n", ""),
        (b"\x16\x03\x01 garbage\r\n", ""),
        (b"", ""),
    ],
)
def test_the_first_line_of_a_proxied_request(line: bytes, host: str) -> None:
    assert proxied_host(line) == host
