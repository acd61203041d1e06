"""Where an agent goes when it does not come to us: one more run, behind a proxy that stops it all.

Most clients of HTTP go through the proxy that HTTP_PROXY and HTTPS_PROXY name. This one notes which
host was asked for and refuses, so the run reaches nobody. A client that knows no proxies is not
seen.
"""

import asyncio
from collections.abc import Mapping
from urllib.parse import urlsplit

from lightning_ray.agents import AgentConfig, CommandLauncher, Task

LIMIT_S = 20.0
_HEAD_S = 5.0
_REFUSAL = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n"
    b"Proxy-Connection: close\r\n\r\n"
)


async def hosts_asked(agent: AgentConfig, task: Task, env: Mapping[str, str]) -> list[str]:
    """The hosts (HOST or HOST:PORT) that the agent tries to reach on one task, first asked first.

    `env` is what an attempt sets. The run takes at most LIMIT_S and the launcher's own grace.
    Raises what a `Launcher` raises.
    """
    hosts: dict[str, None] = {}

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n"), _HEAD_S)
            if host := proxied_host(head):
                hosts[host] = None
            writer.write(_REFUSAL)
            await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # Whoever that was, it was no client of a proxy.
        finally:
            writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    proxy = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    proxies = dict.fromkeys((*names, *map(str.lower, names)), proxy)
    launcher = CommandLauncher(agent)
    try:
        await launcher.start()
        await launcher.run(task, {**env, **proxies}, min(LIMIT_S, agent.timeout_s))
    finally:
        await launcher.close()
        server.close()
    return list(hosts)


def proxied_host(line: bytes) -> str:
    """The host in the first line of a request to a proxy; empty where it is none."""
    words = line.decode("latin-1").split()
    if len(words) != 3 or not words[2].startswith("HTTP/"):
        return ""
    if words[0] == "CONNECT":
        return words[1].removesuffix(":443")
    return urlsplit(words[1]).netloc
