"""Segments that are sealed as Parquet, and read from the archive when their files are gone."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spans_support import batch, row, stored_ids

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.spans import SPAN_SCHEMA, SpansConfig, to_batch
from lightning_ray.spans.archive import KEYS, MANIFEST, Archive, Numbers, Sealed, read_manifests
from lightning_ray.spans.layout import prepare_folder
from lightning_ray.spans.query import open_folder, query, read_folder
from lightning_ray.spans.store import SpanStore

GIVEN_UP = SpansConfig(keep_local_bytes=0)

TEXTS = st.sampled_from(["a", "b/c", "ü=%2F", "", "__none__"])
ROWS = st.fixed_dictionaries(
    {
        "run_id": TEXTS.filter(bool),
        "policy": TEXTS | st.none(),
        "version": st.integers(0, 2) | st.none(),
        "token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=3) | st.none(),
        "logprobs": st.lists(st.floats(width=32, allow_nan=False), max_size=2) | st.none(),
        "value": st.floats() | st.none(),
    }
)


def ordered(table: pa.Table) -> pa.Table:
    return table.sort_by([("attempt_id", "ascending"), ("sequence", "ascending")])


def seal(archive: Archive, table: pa.Table, shard: int, segment: int) -> Sealed:
    def rows(numbers: Numbers) -> list[pa.RecordBatch]:
        return table.take(pa.array(numbers)).to_batches()

    return archive.seal(table.select(list(KEYS)), rows, shard, segment)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), ROWS), min_size=1, max_size=12))
def test_what_is_sealed_is_what_was_stored(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[int, dict[str, Any]]]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    table = pa.Table.from_batches(
        [
            to_batch(
                [
                    row(str(n), f"r/{attempt}") | columns | {"sequence": n}
                    for n, (attempt, columns) in enumerate(made)
                ]
            )
        ]
    )
    archive = Archive(str(folder))
    sealed = seal(archive, table, shard=3, segment=7)
    # NaN is a value like any other, which `equals` does not say.
    assert str(ordered(archive.read(sealed.files)).to_pylist()) == str(ordered(table).to_pylist())
    sealed.write_manifest(folder)
    assert read_manifests(folder) == [sealed] and sealed.rows == len(made)
    for file in sealed.files:
        part = archive.read(sealed.files, file.expression)
        assert part.num_rows == file.rows == pq.read_metadata(folder / file.path).num_rows
        # A file alone is whole: every column is in it, and the schema's version.
        alone = pq.read_table(folder / file.path, partitioning=None)
        assert alone.schema.equals(SPAN_SCHEMA) and alone.schema.metadata == SPAN_SCHEMA.metadata


def test_a_reader_of_one_version_or_run_opens_its_files_alone(tmp_path: Path) -> None:
    rows = [
        row(f"{run}-{version}-{n}", f"r{n}/1", policy="p", version=version) | {"run_id": run}
        for run in ("one", "two")
        for version in range(3)
        for n in range(4)
    ]
    archive = Archive(str(tmp_path))
    sealed = seal(archive, pa.Table.from_batches([to_batch(rows)]), 0, 1)
    assert len(sealed.files) == 6
    wanted = (pc.field("version") == 1) & (pc.field("run_id") == "two")
    for file in sealed.files:
        if (file.run_id, file.version) != ("two", 1):
            # Nothing else can be read any more, and nothing else is.
            (tmp_path / file.path).write_bytes(b"no parquet")
    assert archive.read(sealed.files, wanted).num_rows == 4
    with pytest.raises((InfrastructureError, pa.ArrowInvalid)):
        archive.read(sealed.files)


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
    assert [path.name for path in folder.glob("*.arrows")] == ["00000003.arrows"]
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
    layout = prepare_folder(tmp_path, 2, "")
    config = replace(GIVEN_UP, archive=layout.archive_uri)

    async def run() -> None:
        for number, place in enumerate(layout.folders):
            store = SpanStore(str(place), config, number)
            await store.append(batch(f"{number}-a", attempt_id=f"r{number}/1"))
            await store.seal()
            await store.append(batch(f"{number}-b", attempt_id=f"r{number}/1"))
            await store.close()

    asyncio.run(run())
    assert stored_ids(tmp_path) == ["0-b", "1-b"]
    assert read_folder(tmp_path)["span_id"].to_pylist() == ["0-a", "0-b", "1-a", "1-b"]
    counted = query(
        open_folder(tmp_path),
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
            while not list(tmp_path.glob("*" + MANIFEST)):
                await asyncio.sleep(0.05)
        # Its file stays: there is room.
        assert (tmp_path / "00000001.arrows").exists()
        await store.append(batch("b"))
        assert (await store.rollouts(["r"]))["span_id"].to_pylist() == ["a", "b"]
        await store.close()

    asyncio.run(run())


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
    assert list(folder.glob("*.arrows")) == []


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


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://key:secret@bucket/x", "put keys into the environment"),
        ("ftp://somewhere/x", "write a folder or a URI"),
    ],
)
def test_an_archive_that_cannot_be_is_said_at_once(uri: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        Archive(uri)
    assert "secret" not in str(raised.value)


def test_a_manifest_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    sealed_store(tmp_path)
    path = next(tmp_path.glob("*" + MANIFEST))
    os.truncate(path, 10)
    with pytest.raises(InfrastructureError, match=str(path)):
        SpanStore(str(tmp_path), GIVEN_UP)
