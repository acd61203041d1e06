"""Promises about crashes: shards that are killed, disks that are full, files that are cut."""

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import pyarrow.compute as pc
import pytest
from small_disk import SmallDisk
from spans_support import batch, row, stored_ids

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans import SpansConfig, start_store
from lightning_ray.spans.segments import LEDGER
from lightning_ray.spans.store import SpanStore

WRITERS = 6


@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_no_acknowledged_span_is_lost_or_doubled_when_shards_are_killed_under_load(
    ray_cluster: None, tmp_path: Path, kills: int
) -> None:
    """SIGKILLs at random moments; writers repeat nothing themselves, their client does."""
    store = start_store(str(tmp_path), SpansConfig(shards=2, segment_bytes=1 << 20))
    chance = random.Random(7)
    acknowledged: list[str] = []
    sent: list[str] = []
    resumed: list[float] = []
    over = False

    async def write(writer: int) -> None:
        number = 0
        while not over:
            names = [f"{writer}-{number}-{part}" for part in range(chance.randrange(1, 20))]
            attempt = f"rollout-{writer}/{1 + number % 3}"
            sent.extend(names)
            await store.append([row(name, attempt, token_ids=[7] * 50) for name in names])
            acknowledged.extend(names)
            number += 1

    async def kill() -> None:
        nonlocal over
        processes = [await shard.process_id.remote() for shard in store.shards]
        try:
            for _ in range(kills):
                await asyncio.sleep(chance.random() * 0.2)
                number = chance.randrange(2)
                os.kill(processes[number], signal.SIGKILL)
                begun = time.monotonic()
                async with asyncio.timeout(30):
                    processes[number] = await store.shards[number].process_id.remote()
                resumed.append(time.monotonic() - begun)
        finally:
            over = True

    async def run() -> None:
        await store.append([row("first", "rollout-0/1")])
        await asyncio.gather(kill(), *(write(writer) for writer in range(WRITERS)))

    asyncio.run(run())
    found = store.rollouts([f"rollout-{writer}" for writer in range(WRITERS)])
    stored = found["span_id"].to_pylist()
    assert len(set(stored)) == len(stored)
    assert set(acknowledged) | {"first"} <= set(stored) <= set(sent) | {"first"}
    assert sorted(stored_ids(tmp_path)) == sorted(stored)
    for attempt in found["attempt_id"].unique().to_pylist():
        numbers = found.filter(pc.field("attempt_id") == attempt)["sequence"].to_pylist()
        assert numbers == list(range(1, len(numbers) + 1))
    # Batches that were torn by a kill are counted, and nothing else is wrong with the files.
    stats = store.stats()
    assert stats.spans == len(stored) and stats.damaged_bytes == 0
    assert max(resumed) < 10, f"a shard was away for {max(resumed):.1f} s"
    store.close()


def test_a_full_disk_refuses_what_it_has_no_room_for_and_keeps_the_rest(
    small_disk: SmallDisk,
) -> None:
    folder = small_disk.folder

    async def run() -> list[str]:
        store = SpanStore(str(folder / "spans"), SpansConfig(segment_bytes=100_000))
        acknowledged, refused = [], []
        for number in range(200):
            names = [f"{number}-{part}" for part in range(10)]
            try:
                await store.append(batch(*names))
                acknowledged += names
            except InfrastructureError as error:
                assert "No space left on device" in str(error) and str(folder) in str(error)
                refused.append(names)
        assert len(acknowledged) > 100 and len(refused) > 10
        assert (await store.rollouts(["r"]))["span_id"].to_pylist() == acknowledged
        # Room is made: what was refused can be sent again, and is stored once.
        small_disk.resize("4m")
        for names in refused:
            assert await store.append(batch(*names)) == len(names)
            acknowledged += names
        return acknowledged

    acknowledged = asyncio.run(run())
    assert stored_ids(folder) == acknowledged
    again = SpanStore(str(folder / "spans"), SpansConfig())
    assert asyncio.run(again.rollouts(["r"]))["sequence"].to_pylist() == list(
        range(1, len(acknowledged) + 1)
    )
    assert asyncio.run(again.stats()).damaged_bytes == 0


def test_a_shard_that_cannot_open_its_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "spans").write_text("a file in the way")
    with pytest.raises(InfrastructureError, match=str(tmp_path)):
        SpanStore(str(tmp_path / "spans"), SpansConfig())


def filled(folder: Path, segments: int = 3) -> list[Path]:
    """A store's segments, of ten spans each in five batches."""

    async def run() -> None:
        for number in range(segments):
            store = SpanStore(str(folder), SpansConfig())
            for part in range(5):
                await store.append(batch(f"{number}-{part}-a", f"{number}-{part}-b"))
            await store.close()

    asyncio.run(run())
    paths = sorted(folder.rglob("*.arrows"))
    assert len(paths) == segments
    return paths


def test_a_flipped_byte_is_put_right_on_the_disk_and_counted(tmp_path: Path) -> None:
    path = filled(tmp_path)[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:])
    store = SpanStore(str(tmp_path), SpansConfig())
    assert len(asyncio.run(store.rollouts(["r"]))) == 30
    stats = asyncio.run(store.stats())
    assert (stats.mended_bytes, stats.damaged_bytes) == (1, 0)
    assert path.read_bytes() == whole


def test_what_cannot_be_put_right_is_counted_and_the_rest_is_served(tmp_path: Path) -> None:
    path = filled(tmp_path)[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + b"garbage" + whole[5007:])
    store = SpanStore(str(tmp_path), SpansConfig())
    found = asyncio.run(store.rollouts(["r"]))
    assert len(found) == 28 and len(set(found["span_id"].to_pylist())) == 28
    assert asyncio.run(store.stats()).damaged_bytes > 0
    # Numbers of what is lost are not given again.
    assert asyncio.run(store.append(batch("later"))) == 1
    assert asyncio.run(store.rollouts(["r"]))["sequence"].to_pylist()[-1] == 31


def test_a_closed_segment_that_somebody_cut_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled(tmp_path)[0]
    cut = path.stat().st_size // 2
    os.truncate(path, cut)
    store = SpanStore(str(tmp_path), SpansConfig())
    assert 20 < len(asyncio.run(store.rollouts(["r"]))) < 30
    assert asyncio.run(store.stats()).damaged_bytes > 0
    assert f"segment {path}" in caplog.text and "something cut the file" in caplog.text
    # It stays noticed.
    again = SpanStore(str(tmp_path), SpansConfig())
    assert asyncio.run(again.stats()).damaged_bytes > 0


def test_a_ledger_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    path = filled(tmp_path)[0]
    path.with_name(path.stem + LEDGER).write_text("{")
    with pytest.raises(InfrastructureError, match=r"cannot be read.*delete it"):
        SpanStore(str(tmp_path), SpansConfig())
