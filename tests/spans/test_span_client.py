"""The store as its callers see it: two shards on a real Ray."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
from spans_support import row

from lightning_ray.spans import (
    SPAN_SCHEMA,
    SpanClient,
    SpansConfig,
    SpansRemoved,
    start_store,
    to_batch,
)
from lightning_ray.spans.layout import shard_of

ROLLOUTS = [f"rollout-{number}" for number in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "spans"


@pytest.fixture(scope="module")
def store(ray_cluster: None, folder: Path) -> Iterator[SpanClient]:
    """Two shards with three spans in each of eight rollouts, two of them in a first attempt."""
    client = start_store(str(folder), SpansConfig(shards=2))
    rows = [
        row(f"{rollout}-{number}", f"{rollout}/{1 + number // 2}", token_ids=[number] * 64)
        for number in range(3)
        for rollout in ROLLOUTS
    ]
    assert asyncio.run(client.append(rows)) == len(rows)
    assert asyncio.run(client.append(to_batch(rows[:5]))) == 0
    yield client
    client.close()


def test_a_rollout_is_in_one_shard_whole(store: SpanClient) -> None:
    for number, shard in enumerate(store.shards):
        held = ray.get(shard.rollouts.remote(ROLLOUTS), timeout=30)
        mine = [rollout for rollout in ROLLOUTS if shard_of(rollout, 2) == number]
        assert 0 < len(mine) < len(ROLLOUTS)
        assert held["rollout_id"].unique().to_pylist() == mine
        assert held.num_rows == 3 * len(mine)


def test_what_is_asked_for_comes_in_the_order_asked_over_all_shards(store: SpanClient) -> None:
    asked = [ROLLOUTS[number] for number in (5, 0, 7, 2)]
    table = store.rollouts(asked)
    assert table["span_id"].to_pylist() == [f"{r}-{n}" for r in asked for n in range(3)]
    assert table["sequence"].to_pylist() == [1, 2, 1] * 4
    attempts = [f"{rollout}/2" for rollout in asked] + ["nobody/1"]
    assert store.get(attempts)["span_id"].to_pylist() == [f"{rollout}-2" for rollout in asked]
    assert asyncio.run(store.fetch(attempts)).equals(store.get(attempts))
    assert store.rollout("nobody").equals(SPAN_SCHEMA.empty_table())
    assert store.get([]).num_rows == 0


def test_reading_allocates_nothing_in_the_reader(store: SpanClient) -> None:
    before = pa.total_allocated_bytes()
    table = ray.get(store.read_rollouts(ROLLOUTS), timeout=30)
    assert table.num_rows == 24 and table.nbytes > 24 * 64 * 4
    assert pa.total_allocated_bytes() == before


def test_a_scan_gives_references_to_the_rows_and_columns_asked_for(store: SpanClient) -> None:
    references = list(store.scan(pc.field("attempt_id") == "rollout-3/1", ["span_id", "sequence"]))
    tables = ray.get(references, timeout=30)
    found = pa.concat_tables(tables).to_pylist()
    assert found == [{"span_id": f"rollout-3-{n}", "sequence": n + 1} for n in range(2)]
    assert sum(table.num_rows for table in ray.get(list(store.scan()), timeout=30)) == 24


def test_a_tail_gives_what_was_there_and_what_arrives_also_from_a_shard_that_died(
    ray_cluster: None, tmp_path: Path
) -> None:
    store = start_store(str(tmp_path), SpansConfig(shards=2))

    async def run() -> list[str]:
        await store.append([row("old", "a/1"), row("strange", "b/1") | {"run_id": "another"}])
        seen: list[str] = []
        sent = ["old"]

        async def follow() -> None:
            async for table in store.tail("run", wait_s=30):
                seen.extend(table["span_id"].to_pylist())

        following = asyncio.create_task(follow())
        for number in range(6):
            if number in (2, 4):
                shard = store.shards[number // 2 % 2]
                os.kill(await shard.process_id.remote(), signal.SIGKILL)
            for rollout in ROLLOUTS:
                sent.append(f"{rollout}-{number}")
                await store.append([row(sent[-1], f"{rollout}/1")])
        async with asyncio.timeout(30):
            while len(seen) < len(sent):
                await asyncio.sleep(0.05)
        following.cancel()
        assert sorted(seen) == sorted(sent)
        return [span_id for span_id in seen if span_id.startswith("rollout-1-")]

    assert asyncio.run(run()) == [f"rollout-1-{number}" for number in range(6)]
    store.close()


def test_activity_names_the_attempts_that_got_spans(store: SpanClient) -> None:
    async def run() -> None:
        place, heard = await store.activity(None, 5)
        assert heard
        # What the other shard had to say may come with the next answer.
        place, _ = await store.activity(place, 0.5)
        place, heard = await store.activity(place, 0.2)
        assert heard == []
        waiting = asyncio.create_task(store.activity(place, 30))
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        await store.append([row("news", "rollout-1/3")])
        place, heard = await waiting
        assert heard == ["rollout-1/3"] and time.monotonic() - begun < 20
        _, heard = await store.activity(place, 0.2)
        assert heard == []

    asyncio.run(run())


def test_what_was_removed_is_said_in_one_line_by_every_shard(
    ray_cluster: None, tmp_path: Path
) -> None:
    store = start_store(str(tmp_path), SpansConfig(shards=2))
    asyncio.run(store.append([row(rollout, f"{rollout}/1") for rollout in ROLLOUTS]))
    assert store.remove_run("run") == len(ROLLOUTS)
    for reading in (
        lambda: store.rollouts(ROLLOUTS),
        lambda: store.get([f"{ROLLOUTS[0]}/1"]),
        lambda: asyncio.run(store.fetch([f"{ROLLOUTS[1]}/1"])),
    ):
        with pytest.raises(SpansRemoved) as raised:
            reading()
        assert "of run run, removed" in str(raised.value) and "\n" not in str(raised.value)
    assert store.stats().removed == len(ROLLOUTS)
    store.close()
