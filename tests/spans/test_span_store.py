import asyncio
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spans_support import batch, stored_ids

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.spans import SpansConfig, check_spans
from lightning_ray.spans.segment import SUFFIX
from lightning_ray.spans.store import SpanStore

NO_SPACE = OSError(28, "No space left on device")


def ids_and_numbers(store: SpanStore, *attempts: str) -> list[tuple[str, int]]:
    table = asyncio.run(store.read(attempts))
    return list(zip(table["span_id"].to_pylist(), table["sequence"].to_pylist(), strict=True))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 12), st.integers(1, 3)), min_size=1, max_size=4),
            st.booleans(),
        ),
        max_size=8,
    )
)
def test_a_span_is_stored_once_and_numbered_in_the_order_of_arrival(
    tmp_path_factory: pytest.TempPathFactory, appends: list[tuple[list[tuple[int, int]], bool]]
) -> None:
    """Spans (id, attempt) are sent in batches, some again; True reopens the store after a batch."""
    folder = tmp_path_factory.mktemp("spans")
    expected: dict[str, list[str]] = defaultdict(list)
    sent: set[tuple[str, str]] = set()

    async def run() -> SpanStore:
        store = SpanStore(str(folder), SpansConfig())
        for spans, reopen in appends:
            answers = []
            new = 0
            for number, attempt in spans:
                attempt_id = f"r/{attempt}"
                span_id = f"{number:016x}"
                answers.append(store.append(batch(span_id, attempt_id=attempt_id)))
                if (attempt_id, span_id) not in sent:
                    sent.add((attempt_id, span_id))
                    new += 1
                    expected[attempt_id].append(span_id)
            assert sum(await asyncio.gather(*answers)) == new
            if reopen:
                await store.close()
                store = SpanStore(str(folder), SpansConfig())
        return store

    store = asyncio.run(run())
    for attempt_id, span_ids in expected.items():
        found = ids_and_numbers(store, attempt_id)
        assert found == list(zip(span_ids, range(1, len(span_ids) + 1), strict=True))
    assert sorted(stored_ids(folder)) == sorted(span_id for _, span_id in sent)


def test_an_append_is_told_how_many_of_its_spans_were_new(tmp_path: Path) -> None:
    async def run() -> None:
        store = SpanStore(str(tmp_path), SpansConfig())
        together = [store.append(batch("a", "b")), store.append(batch("b", "c"))]
        assert await asyncio.gather(*together) == [2, 1]
        assert await store.append(batch("a", "c")) == 0
        stats = await store.stats()
        assert (stats.spans, stats.duplicates) == (3, 3)

    asyncio.run(run())


def test_spans_come_back_by_attempt_in_order_whatever_is_asked_for(tmp_path: Path) -> None:
    async def run() -> None:
        store = SpanStore(str(tmp_path), SpansConfig())
        for span_id, attempt in [("a", "x/1"), ("b", "x/2"), ("c", "x/1"), ("d", "y/1")]:
            await store.append(batch(span_id, attempt_id=attempt))
        assert (await store.read(["x/1"]))["span_id"].to_pylist() == ["a", "c"]
        assert (await store.read(["x/2"]))["span_id"].to_pylist() == ["b"]
        both = await store.read(["y/1", "x/1"])
        assert both["span_id"].to_pylist() == ["d", "a", "c"]
        whole = await store.rollouts(["y", "x"])
        assert whole["span_id"].to_pylist() == ["d", "a", "c", "b"]
        assert (await store.read(["unknown/1"])).num_rows == 0
        assert (await store.read([])).num_rows == 0
        assert (await store.rollouts(["unknown", "y"]))["span_id"].to_pylist() == ["d"]

    asyncio.run(run())


def test_appends_that_come_together_share_one_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> int:
        store = SpanStore(str(tmp_path), SpansConfig())
        await store.append(batch("first"))
        count = 0
        real = os.fsync

        def counted(descriptor: int) -> None:
            nonlocal count
            count += 1
            real(descriptor)

        monkeypatch.setattr(os, "fsync", counted)
        await asyncio.gather(*(store.append(batch(f"{n:016x}")) for n in range(200)))
        return count

    # All 200 were there before the first write began.
    assert asyncio.run(run()) == 1
    assert len(stored_ids(tmp_path)) == 201


def test_a_full_segment_is_followed_by_the_next(tmp_path: Path) -> None:
    async def run() -> None:
        store = SpanStore(str(tmp_path), SpansConfig(segment_bytes=4000))
        for number in range(9):
            await store.append(batch(f"{number:016x}"))
        stats = await store.stats()
        assert stats.segments > 2
        assert stats.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*" + SUFFIX))

    asyncio.run(run())
    again = SpanStore(str(tmp_path), SpansConfig())
    assert [number for _, number in ids_and_numbers(again, "r/1")] == list(range(1, 10))


@pytest.mark.parametrize("failing", ["fsync", "truncate too", "the next segment"])
def test_spans_that_a_full_disk_refused_may_be_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def refuse(*_: object) -> None:
        raise NO_SPACE

    async def run() -> None:
        limit = 2000 if failing == "the next segment" else 1 << 20
        store = SpanStore(str(tmp_path), SpansConfig(segment_bytes=limit))
        await store.append(batch("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            if failing == "truncate too":
                writer = store._segments._writer
                assert writer is not None
                patch.setattr(writer, "_file", _Unwritable(writer._file))
            answers = [store.append(batch("b")), store.append(batch("c"))]
            refused = await asyncio.gather(*answers, return_exceptions=True)
            # A caller that went away meanwhile must not keep the others waiting.
            gone = asyncio.ensure_future(store.append(batch("e")))
            await asyncio.sleep(0)
            gone.cancel()
            refused += await asyncio.gather(store.append(batch("f")), return_exceptions=True)
        for error in refused:
            assert isinstance(error, InfrastructureError)
            assert "No space left on device" in str(error) and str(tmp_path) in str(error)
        assert (await store.read(["r/1"]))["span_id"].to_pylist() == ["a"]
        assert (await store.stats()).spans == 1
        assert await store.append(batch("c", "d")) == 2
        on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*" + SUFFIX))
        assert (await store.stats()).bytes == on_disk

    asyncio.run(asyncio.wait_for(run(), 30))
    again = SpanStore(str(tmp_path), SpansConfig())
    assert ids_and_numbers(again, "r/1") == [("a", 1), ("c", 2), ("d", 3)]


class _Unwritable:
    """A file of a disk that has failed for good."""

    def __init__(self, file: object):
        self._file = file
        self.closed = False

    def write(self, buffer: bytes) -> int:
        raise NO_SPACE

    def truncate(self, size: int) -> None:
        raise NO_SPACE

    def close(self) -> None:
        self.closed = True


def test_a_batch_that_meets_the_end_of_the_disk_is_refused_whole(tmp_path: Path) -> None:
    # The kernel's own limit on a file's size stands for the disk; it holds for a whole process.
    script = """
        import asyncio, resource, sys
        sys.path.insert(0, sys.argv[2])
        from spans_support import batch
        from lightning_ray.errors import InfrastructureError
        from lightning_ray.spans import SpansConfig
        from lightning_ray.spans.store import SpanStore

        async def run():
            store = SpanStore(sys.argv[1], SpansConfig())
            await store.append(batch("a"))
            limit = (await store.stats()).bytes + 500
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                await store.append(batch("b"))
            except InfrastructureError as error:
                print(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            await store.append(batch("b"))
            await store.append(batch("c"))

        asyncio.run(run())
    """
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == [
        f"spans could not be written to {tmp_path}/shard-0: File too large"
    ]
    assert stored_ids(tmp_path) == ["a", "b", "c"]


def test_a_store_that_is_killed_under_load_has_every_acknowledged_span_once(
    tmp_path: Path,
) -> None:
    script = """
        import asyncio, sys
        sys.path.insert(0, sys.argv[2])
        from spans_support import batch
        from lightning_ray.spans import SpansConfig
        from lightning_ray.spans.store import SpanStore

        async def write(store, writer):
            for number in range(10**9):
                span_id = f"{writer}-{number}"
                await store.append(batch(span_id, attempt_id=f"r/{writer}"))
                sys.stdout.write(span_id + "\\n")
                sys.stdout.flush()

        async def run():
            store = SpanStore(sys.argv[1], SpansConfig(segment_bytes=20_000))
            await asyncio.gather(*(write(store, writer) for writer in range(4)))

        asyncio.run(run())
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(
        [*arguments, str(tmp_path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().strip() for _ in range(100)]
        process.send_signal(signal.SIGKILL)
        told += [line.strip() for line in process.stdout.read().splitlines(True) if "\n" in line]
        process.wait(timeout=30)
    stored = stored_ids(tmp_path)
    assert len(set(stored)) == len(stored)
    assert set(told) <= set(stored)
    # Whoever got no answer sends again, to a store that reopened; nothing is stored twice.
    store = SpanStore(str(tmp_path), SpansConfig())
    again = [span_id for span_id in stored if span_id.startswith("0-")]
    again += [f"0-{len(again)}"]
    assert asyncio.run(store.append(batch(*again, attempt_id="r/0"))) == 1
    assert ids_and_numbers(store, "r/0") == list(zip(again, range(1, len(again) + 1), strict=True))


def test_a_closed_store_refuses_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        store = SpanStore(str(tmp_path), SpansConfig())
        await store.append(batch("a"))
        await store.close()
        with pytest.raises(InfrastructureError, match="closed"):
            await store.append(batch("b"))

    asyncio.run(asyncio.wait_for(run(), 10))
    assert stored_ids(tmp_path) == ["a"]


def test_a_batch_with_other_columns_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        store = SpanStore(str(tmp_path), SpansConfig())
        with pytest.raises(ValueError, match="SPAN_SCHEMA"):
            await store.append(batch("a").select(["span_id"]))

    asyncio.run(run())


@pytest.mark.parametrize(
    "breaking",
    [
        lambda config: setattr(config, "segment_bytes", 1),
        lambda c: setattr(c, "append_timeout_s", 0),
    ],
)
def test_settings_that_no_store_can_run_with_are_refused(
    breaking: Callable[[SpansConfig], None],
) -> None:
    config = SpansConfig()
    check_spans(config)
    breaking(config)
    with pytest.raises(UserError, match=r"spans\."):
        check_spans(config)
