import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from killing import kill_and_wait
from spans_support import row, stored_ids

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans import SpanClient, SpansConfig, start_store


@pytest.fixture
def store(ray_cluster: None, tmp_path: Path) -> Iterator[SpanClient]:
    client = start_store(str(tmp_path / "spans"), SpansConfig())
    yield client
    for shard in client.shards:
        ray.kill(shard)


def test_a_store_whose_process_dies_comes_back_and_counts_on(
    store: SpanClient, tmp_path: Path
) -> None:
    asyncio.run(store.append([row("a"), row("b", token_ids=[5, 6])]))
    # SIGKILL is done when it returns; `ray.kill` may let the old process answer once more.
    os.kill(ray.get(store.shards[0].process_id.remote()), signal.SIGKILL)
    asyncio.run(store.append([row("b", token_ids=[5, 6]), row("c")]))
    table = store.get(["r/1"])
    assert table["span_id"].to_pylist() == ["a", "b", "c"]
    assert table["sequence"].to_pylist() == [1, 2, 3]
    assert table["token_ids"].to_pylist()[1] == [5, 6]
    assert asyncio.run(store.fetch(["r/1"])).equals(table)
    # Ray may have repeated an append that was under way; that is harmless too.
    assert store.stats().spans == 3 and store.stats().duplicates >= 1
    store.close()
    assert stored_ids(tmp_path / "spans") == ["a", "b", "c"]


def test_a_store_that_is_gone_is_a_fault_and_not_a_wait(store: SpanClient) -> None:
    asyncio.run(store.append([row("a")]))
    kill_and_wait(store.shards[0])
    for call in (
        lambda: asyncio.run(store.append([row("b")])),
        lambda: asyncio.run(store.fetch(["r/1"])),
        lambda: store.get(["r/1"]),
    ):
        with pytest.raises(InfrastructureError, match="the span store died"):
            call()
