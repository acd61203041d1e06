"""Retries and limits of calls, without a network."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response, StreamingResponse

from lightning_ray.gateway import Answerer
from lightning_ray.gateway.limits import CallLimits, TooManyCallsError
from lightning_ray.gateway.replays import REPLAYED, Replays, name_of, repeats


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
def test_never_more_are_inside_than_may_be(steps: list[tuple[str, bool]]) -> None:
    limits = CallLimits(4)
    inside: dict[str, list[Callable[[], None]]] = {name: [] for name in "abc"}
    for who, leaves in steps:
        mine = inside[who]
        every = sum(map(len, inside.values()))
        if leaves and mine:
            leave = mine.pop()
            leave()
            leave()
        elif len(mine) < 2 and every < 4:
            mine.append(limits.enter(who, 2, "a.setting"))
        else:
            with pytest.raises(TooManyCallsError, match=r"a\.setting|gateway\.max_calls"):
                limits.enter(who, 2, "a.setting")


@given(st.sets(st.text("abc/:1", min_size=1), min_size=2, max_size=5), st.text())
def test_a_lost_engines_rollouts_move_and_no_others(urls: set[str], rollout: str) -> None:
    engines = sorted(urls)
    order = Answerer("p", tuple(engines)).urls_for(rollout)
    assert sorted(order) == engines
    for lost in engines:
        left = tuple(url for url in engines if url != lost)
        assert Answerer("p", left).urls_for(rollout) == [url for url in order if url != lost]


def test_a_retry_says_so() -> None:
    assert repeats({"x-stainless-retry-count": "2"}) and repeats({"idempotency-key": "k"})
    for count in ("0", "", "-1", "x", "½"):
        assert not repeats({"x-stainless-retry-count": count})
    assert not repeats({})


def test_a_name_is_that_of_one_call_of_one_attempt() -> None:
    same = ("r/1", "/v1/x?", {}, b"body")
    assert name_of(*same) == name_of("r/1", "/v1/x?", {"x-stainless-retry-count": "1"}, b"body")
    others = [
        ("r/2", "/v1/x?", {}, b"body"),
        ("r/1", "/v1/x?a", {}, b"body"),
        ("r/1", "/v1/x?", {"idempotency-key": "k"}, b"body"),
        ("r/1", "/v1/x?", {}, b"bodies"),
        ("r/1/v1/x", "?", {}, b"body"),
    ]
    assert len({name_of(*one) for one in [same, *others]}) == 6


def streamed(*parts: bytes) -> StreamingResponse:
    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    return StreamingResponse(body(), headers={"content-type": "text/event-stream"})


async def read(reply: Response) -> bytes:
    if isinstance(reply, StreamingResponse):
        return b"".join([part async for part in reply.body_iterator])  # type: ignore[misc]
    return bytes(reply.body)


def test_a_reply_that_was_given_is_given_again_streamed_or_not() -> None:
    async def main() -> None:
        replays = Replays(1000)
        for name, made in (
            (b"1", Response(b"one", headers={"x-a": "b"})),
            (b"2", streamed(b"t", b"wo")),
        ):

            async def make(made: Response = made) -> Response:
                return made

            assert await replays.again(name) is None
            first = await read(await replays.answer(name, make, []))
            again = await replays.again(name)
            assert again is not None and await read(again) == first
            assert again.headers[REPLAYED] == "true"
            assert again.headers["content-length"] == str(len(first))
        assert again.headers["content-type"] == "text/event-stream"

    asyncio.run(main())


def test_a_retry_waits_for_the_reply_that_is_being_given() -> None:
    async def main() -> None:
        replays = Replays(1000)
        go_on = asyncio.Event()

        async def slow() -> Response:
            await go_on.wait()
            return Response(b"late")

        first = asyncio.ensure_future(replays.answer(b"n", slow, []))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(replays.again(b"n"))
        await asyncio.sleep(0.01)
        assert not second.done()
        go_on.set()
        assert (await first).body == b"late"
        again = await second
        assert again is not None and again.body == b"late"

    asyncio.run(main())


@pytest.mark.parametrize("how", ["raises", "refused", "left", "left in the stream", "too large"])
def test_what_was_not_given_in_full_is_not_given_again(how: str) -> None:
    async def make() -> Response:
        if how == "raises":
            raise ValueError
        if how == "refused":
            return Response(b"no", 422)
        if how == "left in the stream":
            return streamed(b"a", b"b")
        if how == "too large":
            return Response(b"x" * 1001)
        await asyncio.sleep(60)
        raise AssertionError

    async def main() -> None:
        replays = Replays(1000)
        leaving: list[Callable[[], None]] = []
        asking = asyncio.ensure_future(replays.answer(b"n", make, leaving))
        await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(replays.again(b"n"))
        await asyncio.sleep(0.01)
        if how == "left in the stream":
            parts = (await asking).body_iterator  # type: ignore[attr-defined]
            assert await anext(parts) == b"a"
            await parts.aclose()
        asking.cancel()
        await asyncio.wait([asking])
        for leave in leaving:
            leave()
        assert await asyncio.wait_for(waiting, 1) is None
        assert await replays.again(b"n") is None

    asyncio.run(main())


def test_the_oldest_replies_are_given_up_first() -> None:
    async def main() -> None:
        replays = Replays(100)

        async def make() -> Response:
            return Response(b"x" * 40)

        for name in (b"1", b"2", b"3", b"2"):
            await replays.answer(name, make, [])
        assert await replays.again(b"1") is None
        assert await replays.again(b"2") is not None and await replays.again(b"3") is not None
        assert replays._bytes == 80

    asyncio.run(main())
