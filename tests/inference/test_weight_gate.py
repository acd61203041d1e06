import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray.errors import InfrastructureError
from lightning_ray.inference.gate import WeightGate

BROKEN = -1
"""Half of one version and half of another."""


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6), st.booleans()), max_size=30),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=6),
)
def test_a_call_is_sampled_by_the_version_it_was_told_from_first_to_last(
    calls: list[tuple[int, int, bool]], changes: list[tuple[int, int, bool]]
) -> None:
    """Calls (start, tokens, abandoned) and changes (pause, length, failing), in turns of a loop."""
    weights = 0

    async def turns(count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def call(gate: WeightGate, start: int, tokens: int, abandoned: bool) -> None:
        await turns(start)
        try:
            version = await gate.enter(10)
        except InfrastructureError:
            assert weights == BROKEN
            return
        try:
            for _ in range(tokens):
                assert weights == version
                await turns(1)
                if abandoned:
                    return
            assert weights == version
        finally:
            gate.leave()

    async def change(gate: WeightGate) -> None:
        nonlocal weights
        for number, (pause, length, failing) in enumerate(changes, start=1):
            await turns(pause)
            before = gate.version
            try:
                async with gate.change(number, 10):
                    assert gate.calls == 0
                    weights = BROKEN
                    await turns(length)
                    assert gate.calls == 0
                    if failing:
                        raise LookupError
                    weights = number
                    assert gate.version == before
            except LookupError:
                assert gate.version == before
            else:
                assert gate.version == number

    async def main() -> None:
        gate = WeightGate(0)
        await asyncio.gather(change(gate), *(call(gate, *one) for one in calls))
        assert gate.calls == 0

    run(main())


def test_a_change_waits_for_the_calls_inside_and_later_calls_for_the_change() -> None:
    async def main() -> None:
        gate = WeightGate(3)
        order: list[str] = []

        async def change() -> None:
            async with gate.change(4, 10):
                order.append("changed")

        assert await gate.enter(1) == 3
        changing = asyncio.create_task(change())
        await asyncio.sleep(0)
        entering = asyncio.create_task(gate.enter(10))
        await asyncio.sleep(0.01)
        assert order == [] and not entering.done() and gate.calls == 1
        gate.leave()
        assert await entering == 4 and order == ["changed"]
        await changing

    run(main())


def test_a_change_that_does_not_drain_leaves_the_calls_inside_and_keeps_later_ones_out() -> None:
    async def main() -> None:
        gate = WeightGate(0)
        assert await gate.enter(1) == 0
        async with gate.change(1, 1, drain=False):
            assert gate.calls == 1
            later = asyncio.create_task(gate.enter(5))
            await asyncio.sleep(0.05)
            assert not later.done()
        assert await later == 1
        with pytest.raises(LookupError):
            async with gate.change(2, 1, drain=False):
                raise LookupError
        with pytest.raises(InfrastructureError, match="taking on version 2"):
            await gate.enter(1)
        assert gate.calls == 2

    run(main())


def test_calls_that_do_not_end_are_named_and_the_gate_opens_again() -> None:
    async def main() -> None:
        gate = WeightGate(0)
        await gate.enter(1)
        await gate.enter(1)
        with pytest.raises(InfrastructureError) as raised:
            async with gate.change(1, 0.02):
                pytest.fail("changed under a call")
        assert str(raised.value) == (
            "2 calls were still being answered after 0.02 s, so version 1 could not be taken on"
        )
        assert await gate.enter(1) == 0

    run(main())


def test_a_call_does_not_wait_for_ever() -> None:
    async def main() -> None:
        gate = WeightGate(0)
        async with gate.change(1, 1):
            with pytest.raises(InfrastructureError, match=r"still changing after 0\.02 s"):
                await gate.enter(0.02)
        assert gate.calls == 0 and await gate.enter(1) == 1

    run(main())


def test_after_a_change_that_failed_calls_are_refused_until_one_succeeds() -> None:
    async def main() -> None:
        gate = WeightGate(0)
        with pytest.raises(LookupError):
            async with gate.change(1, 1):
                raise LookupError("no such folder")
        with pytest.raises(InfrastructureError, match="failed while taking on version 1"):
            await gate.enter(1)
        assert gate.calls == 0
        async with gate.change(2, 1):
            pass
        assert await gate.enter(1) == 2

    run(main())


def test_two_changes_at_once_are_refused() -> None:
    async def main() -> None:
        gate = WeightGate(0)
        async with gate.change(1, 1):
            with pytest.raises(InfrastructureError, match="another change"):
                async with gate.change(2, 1):
                    pytest.fail("two at once")
            # The refused one has not opened what the other closed.
            with pytest.raises(InfrastructureError):
                await gate.enter(0.01)
        assert gate.version == 1

    run(main())
