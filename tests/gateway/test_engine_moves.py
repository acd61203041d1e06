"""An engine whose node is lost comes up elsewhere, and the calls that waited find it there."""

import asyncio
from collections.abc import Sequence

import aiohttp
from aiohttp import web

from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway.answerers import Answerer
from lightning_ray.gateway.engines import Engines

NOBODY = "http://127.0.0.1:9"


async def answer(request: web.Request) -> web.Response:
    return web.Response(text="here: " + await request.text())


def test_a_call_finds_an_engine_that_moved_and_later_ones_go_there_at_once() -> None:
    async def main() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        asked: list[str] = []

        async def moved(policy: str) -> Sequence[str]:
            asked.append(policy)
            if len(asked) == 1:
                return ()
            if len(asked) == 2:
                raise InfrastructureError("the queue restarts")
            return (f"http://127.0.0.1:{port}",)

        engines = Engines(moved)
        answerer = Answerer("policy", (NOBODY,), "key")
        async with aiohttp.ClientSession() as session:
            for text in ("first", "second"):
                reply = await engines.ask(
                    session, "POST", answerer, "rollout", "/v1/chat", {}, 20.0, data=text.encode()
                )
                assert await reply.text() == f"here: {text}"
        assert asked == ["policy"] * 3, "the second call asked nobody"
        # Who never moved is asked where it is.
        assert engines.order(Answerer("other", (NOBODY,), "key"), "rollout") == [NOBODY]
        await runner.cleanup()

    asyncio.run(asyncio.wait_for(main(), 60))
