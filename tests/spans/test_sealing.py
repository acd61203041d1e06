"""Segments that are sealed as Parquet, and read from the archive when their files are gone."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
import pytest
from spans_support import batch, stored_ids

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans import SpansConfig, SpansRemoved
from lightning_ray.spans.manifests import MANIFEST_SUFFIX, read_manifests
from lightning_ray.spans.query import open_dataset, query, read_folder
from lightning_ray.spans.retention import read_removed
from lightning_ray.spans.store import SpanStore

GIVEN_UP = SpansConfig(keep_local_bytes=0)


def sealed_store(folder: Path) -> SpanStore:
    """Two segments of a rollout, both in the archive alone, and a third that is being written."""

    async def run() -> SpanStore:
        store = SpanStore(str(folder), GIVEN_UP)
        await store.append(batch("a", "b"))
        assert await store.seal() == 1
        await store.append(batch("c"))
        await store.append(batch("x", attempt_id="other/1"))
        assert await store.seal() == 1
        await store.append(batch("d"))
        return store

    store = asyncio.run(run())
    assert [path.name for path in folder.rglob("*.arrows")] == ["00000003.arrows"]
    return store


@pytest.mark.parametrize("again", [False, True], ids=["", "restarted"])
def test_nothing_changes_for_readers_and_writers_when_segments_are_given_up(
    tmp_path: Path, again: bool
) -> None:
    store = sealed_store(tmp_path)
    if again:
        store = SpanStore(str(tmp_path), GIVEN_UP)

    async def run() -> None:
        found = await store.rollouts(["other", "r"])
        assert found["span_id"].to_pylist() == ["x", "a", "b", "c", "d"]
        assert found["sequence"].to_pylist() == [1, 1, 2, 3, 4]
        assert (await store.read(["r/1"]))["span_id"].to_pylist() == ["a", "b", "c", "d"]
        assert await store.append(batch("a", "c", "e", "d")) == 1
        assert (await store.read(["r/1"]))["sequence"].to_pylist() == [1, 2, 3, 4, 5]
        late = await store.append(batch("late", attempt_id="other/1"))
        assert late == 1 and (await store.read(["other/1"]))["sequence"].to_pylist() == [1, 2]
        scanned = [
            name
            for part in await store.parts()
            for name in (await store.scan(part, ["span_id"], pc.field("sequence") > 2))[
                "span_id"
            ].to_pylist()
        ]
        assert sorted(scanned) == ["c", "d", "e"]
        after, tailed = 0, []
        while (part := await store.tail(after, 100, 0.1))[1].num_rows:
            after = part[0]
            tailed += part[1]["span_id"].to_pylist()
        assert sorted(tailed) == ["a", "b", "c", "d", "e", "late", "x"]
        stats = await store.stats()
        assert (stats.spans, stats.sealed) == (7, 2) and stats.sealed_bytes > 0

    asyncio.run(run())


def test_a_folder_is_read_with_what_is_in_its_archive(tmp_path: Path) -> None:
    async def run() -> None:
        for number in range(2):
            store = SpanStore(str(tmp_path), GIVEN_UP, number)
            await store.append(batch(f"{number}-a", attempt_id=f"r{number}/1"))
            await store.seal()
            await store.append(batch(f"{number}-b", attempt_id=f"r{number}/1"))
            await store.close()

    asyncio.run(run())
    assert stored_ids(tmp_path) == ["0-b", "1-b"]
    assert read_folder(tmp_path)["span_id"].to_pylist() == ["0-a", "0-b", "1-a", "1-b"]
    counted = query(
        open_dataset(tmp_path),
        "SELECT rollout_id, count(*) AS n, sum(len(token_ids)) AS t "
        "FROM spans GROUP BY 1 ORDER BY 1",
    )
    assert counted.to_pylist() == [
        {"rollout_id": "r0", "n": 2, "t": 6},
        {"rollout_id": "r1", "n": 2, "t": 6},
    ]


def test_an_old_segment_is_closed_and_sealed_by_itself(tmp_path: Path) -> None:
    async def run() -> None:
        store = SpanStore(str(tmp_path), SpansConfig(seal_after_s=0.1))
        await store.append(batch("a"))
        async with asyncio.timeout(20):
            while not list(tmp_path.rglob("*" + MANIFEST_SUFFIX)):
                await asyncio.sleep(0.05)
        # Its file stays: there is room.
        assert (tmp_path / "shard-0/00000001.arrows").exists()
        await store.append(batch("b"))
        assert (await store.rollouts(["r"]))["span_id"].to_pylist() == ["a", "b"]
        await store.close()

    asyncio.run(run())


def test_nothing_is_written_after_closing(tmp_path: Path) -> None:
    """The segment that is being sealed is waited for, and no other is begun."""
    sealing, done = 0, 0

    async def run() -> None:
        store = SpanStore(str(tmp_path), SpansConfig(segment_bytes=1, seal_after_s=1000.0))
        for number in range(4):
            await store.append(batch(f"{number}"))
        await store.close()
        store = SpanStore(str(tmp_path), SpansConfig(seal_after_s=0.05))
        seal = store._sealed.seal

        def slowly(number: int) -> None:
            nonlocal sealing, done
            sealing += 1
            time.sleep(0.5)
            seal(number)
            done += 1

        store._sealed.seal = slowly  # type: ignore[method-assign]
        await store.append(batch("last"))
        async with asyncio.timeout(20):
            while not sealing:
                await asyncio.sleep(0.01)
        await store.close()
        assert (sealing, done) == (1, 1)

    asyncio.run(run())
    assert len(read_manifests(tmp_path)) == 1
    assert stored_ids(tmp_path) == ["0", "1", "2", "3", "last"]


def test_a_segment_that_takes_too_long_to_seal_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning_ray.spans.store.CLOSE_S", 0.2)
    silent, begun = threading.Event(), threading.Event()

    async def run() -> None:
        store = SpanStore(str(tmp_path), SpansConfig(seal_after_s=0.05))

        def never(number: int) -> None:
            begun.set()
            silent.wait(20)

        store._sealed.seal = never  # type: ignore[method-assign]
        await store.append(batch("a"))
        assert await asyncio.to_thread(begun.wait, 20)
        async with asyncio.timeout(5):
            await store.close()
        silent.set()

    asyncio.run(run())
    assert "closes while a segment is still being sealed" in caplog.text
    # Whoever opens it next seals it.
    assert asyncio.run(SpanStore(str(tmp_path), SpansConfig()).seal()) == 1


def test_an_archive_that_refuses_loses_nothing(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_text("a file in the way")
    folder = tmp_path / "shard"

    async def run() -> None:
        store = SpanStore(str(folder), replace(GIVEN_UP, archive=str(archive)))
        await store.append(batch("a"))
        with pytest.raises(InfrastructureError, match="could not be sealed"):
            await store.seal()
        await store.append(batch("b"))
        assert (await store.rollouts(["r"]))["span_id"].to_pylist() == ["a", "b"]
        archive.unlink()
        assert await store.seal() == 2
        assert (await store.rollouts(["r"]))["span_id"].to_pylist() == ["a", "b"]

    asyncio.run(run())
    assert list(folder.rglob("*.arrows")) == []


def test_a_store_killed_while_it_seals_has_every_acknowledged_span_once(tmp_path: Path) -> None:
    script = """
        import asyncio, sys
        sys.path.insert(0, sys.argv[2])
        from spans_support import batch
        from lightning_ray.spans import SpansConfig
        from lightning_ray.spans.store import SpanStore

        async def seal(store):
            while True:
                await store.seal()

        async def run():
            store = SpanStore(sys.argv[1], SpansConfig(keep_local_bytes=20_000))
            sealing = asyncio.create_task(seal(store))
            for number in range(10**9):
                name = f"{sys.argv[3]}-{number}"
                await store.append(batch(name, attempt_id=f"r{number % 3}/1"))
                print(name, flush=True)

        asyncio.run(run())
    """
    told: list[str] = []
    for life in range(6):
        arguments = [str(tmp_path), str(Path(__file__).parent), str(life)]
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *arguments],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            told += [process.stdout.readline().strip() for _ in range(20 + 9 * life)]
            process.send_signal(signal.SIGKILL)
            told += [line.strip() for line in process.stdout.read().splitlines(True) if line]
            process.wait(timeout=30)
    store = SpanStore(str(tmp_path), SpansConfig(keep_local_bytes=20_000))
    found = asyncio.run(store.rollouts(["r0", "r1", "r2"]))["span_id"].to_pylist()
    assert len(set(found)) == len(found) and set(told) <= set(found)
    assert len(found) <= len(told) + 6
    assert len(read_manifests(tmp_path)) > 6


@pytest.mark.parametrize("again", [False, True], ids=["", "restarted"])
def test_reading_what_was_removed_says_so(tmp_path: Path, again: bool) -> None:
    sealed_store(tmp_path)

    async def run() -> None:
        store = SpanStore(str(tmp_path), GIVEN_UP)
        assert await store.remove_run("run") == 5
        if again:
            await store.close()
            store = SpanStore(str(tmp_path), GIVEN_UP)
        for reading in (store.rollouts(["r"]), store.read(["other/1"])):
            with pytest.raises(SpansRemoved, match="5 spans of 2 rollouts of run run, removed"):
                await reading
        assert (await store.rollouts(["never"])).num_rows == 0
        assert (await store.stats()).removed == 5
        # The store goes on, and what arrives later is there.
        assert await store.append(batch("new", attempt_id="later/1")) == 1
        assert (await store.rollouts(["later"]))["span_id"].to_pylist() == ["new"]

    asyncio.run(run())
    assert list(tmp_path.rglob("*.parquet")) == []
    assert [record.removal.rows for record in read_removed(tmp_path)] == [5]


def test_the_oldest_spans_go_when_there_are_more_than_are_kept(tmp_path: Path) -> None:
    async def run() -> None:
        store = SpanStore(str(tmp_path), replace(GIVEN_UP, keep_bytes=30_000))
        for number in range(8):
            await store.append(batch(f"{number}", attempt_id=f"r{number}/1"))
            assert await store.seal() == 1
        stats = await store.stats()
        kept = 8 - stats.removed
        assert 0 < kept < 8
        last = [f"r{number}" for number in range(stats.removed, 8)]
        assert (await store.rollouts(last)).num_rows == kept
        with pytest.raises(SpansRemoved, match="keep_bytes=30000"):
            await store.rollouts(["r0"])

    asyncio.run(run())


def test_a_manifest_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    sealed_store(tmp_path)
    path = next(tmp_path.rglob("*" + MANIFEST_SUFFIX))
    os.truncate(path, 10)
    with pytest.raises(InfrastructureError, match=str(path)):
        SpanStore(str(tmp_path), GIVEN_UP)
