"""An engine whose node is lost comes up elsewhere, and calls find it there."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway.answerers import Answerer
from lightning_ray.gateway.engines import Engines

NOBODY = "http://127.0.0.1:9"
SILENT = "http://192.0.2.1:9"
"""An address of documentation (RFC 5737): packets to it go nowhere."""


@asynccontextmanager
async def engine(name: str) -> AsyncIterator[str]:
    """An engine that says its name; its address."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=f"{name}: {await request.text()}")

    app = web.Application()
    app.router.add_post("/v1/chat", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def ask(engines: Engines, answerer: Answerer, text: str, wait_s: float = 20.0) -> str:
    limit = aiohttp.ClientTimeout(sock_connect=0.5)
    async with aiohttp.ClientSession(timeout=limit) as session:
        reply = await engines.ask(
            session, "POST", answerer, "rollout", "/v1/chat", {}, wait_s, data=text.encode()
        )
        return await reply.text()


def test_a_call_finds_an_engine_that_moved_and_later_ones_go_there_at_once() -> None:
    asked: list[str] = []

    async def main() -> None:
        async with engine("new") as url:

            async def moved(policy: str) -> Sequence[str]:
                asked.append(policy)
                if len(asked) == 1:
                    return ()
                if len(asked) == 2:
                    raise InfrastructureError("the queue restarts")
                return (url,)

            engines = Engines(moved)
            answerer = Answerer("policy", (NOBODY,), "key")
            assert await ask(engines, answerer, "first") == "new: first"
            assert await ask(engines, answerer, "second") == "new: second"
            assert asked == ["policy"] * 3, "the second call asked nobody"
            # Who never moved is asked where it is.
            other = Answerer("other", (NOBODY,), "key")
            assert engines.order(other, "rollout") == [NOBODY]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_one_that_moved_is_found_although_another_answers() -> None:
    async def main() -> None:
        async with engine("stayed") as stayed, engine("moved") as moved_to:

            async def moved(policy: str) -> Sequence[str]:
                return (stayed, moved_to)

            engines = Engines(moved)
            answerer = Answerer("policy", (stayed, NOBODY), "key")
            # The rollouts of the lost address go where its engine is now.
            lost = next(f"r{n}" for n in range(99) if answerer.urls_for(f"r{n}")[0] == NOBODY)
            async with aiohttp.ClientSession() as session:
                reply = await engines.ask(session, "POST", answerer, lost, "/v1/chat", {}, 20.0)
                assert reply.status == 200
            assert set(engines.order(answerer, lost)) == {stayed, moved_to}

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_node_that_swallows_packets_is_one_that_does_not_answer() -> None:
    async def main() -> None:
        async with engine("other") as url:
            answerer = Answerer("policy", (SILENT, url), "key")
            lost = next(f"r{n}" for n in range(99) if answerer.urls_for(f"r{n}")[0] == SILENT)
            limit = aiohttp.ClientTimeout(sock_connect=0.5)
            async with aiohttp.ClientSession(timeout=limit) as session:
                reply = await Engines().ask(session, "POST", answerer, lost, "/v1/chat", {}, 5.0)
                assert (await reply.text()).startswith("other")
        # It is no timeout of the call's, which would be another answer.
        alone = Answerer("policy", (SILENT,), "key")
        with pytest.raises(aiohttp.ClientConnectionError) as raised:
            await ask(Engines(), alone, "nobody", wait_s=0.0)
        assert not isinstance(raised.value, TimeoutError)

    asyncio.run(asyncio.wait_for(main(), 60))
