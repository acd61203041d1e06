"""A call waits inside the door for an engine that died and is replaced at its address."""

import asyncio
import socket
import time

import aiohttp
import pytest
from aiohttp import web

from lightning_ray.gateway.answerers import Answerer
from lightning_ray.gateway.engines import Engines

BACK_AFTER_S = 1.5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("wait_s", [0.0, 20.0])
def test_a_call_waits_for_an_engine_to_come_back_as_long_as_it_may(wait_s: float) -> None:
    port = free_port()
    answerer = Answerer("policy", (f"http://127.0.0.1:{port}",), "key")

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="back: " + await request.text())

    async def come_back() -> web.AppRunner:
        await asyncio.sleep(BACK_AFTER_S)
        app = web.Application()
        app.router.add_post("/v1/chat", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner

    async def main() -> tuple[str, float]:
        coming = asyncio.create_task(come_back())
        begun = time.monotonic()
        async with aiohttp.ClientSession() as session:
            try:
                reply = await Engines().ask(
                    session, "POST", answerer, "rollout", "/v1/chat", {}, wait_s, data=b"hello"
                )
                text = await reply.text()
            except aiohttp.ClientConnectionError:
                text = "nobody"
        took = time.monotonic() - begun
        await (await coming).cleanup()
        return text, took

    text, took = asyncio.run(asyncio.wait_for(main(), 60))
    if wait_s:
        assert text == "back: hello" and took >= BACK_AFTER_S
    else:
        assert text == "nobody" and took < BACK_AFTER_S
