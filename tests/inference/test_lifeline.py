"""Messages between the processes of vLLM, as they pass here: waited for asleep, never missed."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from lightning_ray.inference.lifeline import look_often, wait_asleep


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in an engine's processes; undone afterwards."""
    defaults = SpinCondition.__init__.__defaults__
    kept = shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS
    monkeypatch.setattr(shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS", kept)
    wait_asleep(0.0005)
    look_often()
    yield
    SpinCondition.__init__.__defaults__ = defaults


def test_a_message_whose_notice_was_lost_is_read_all_the_same(asleep: None) -> None:
    writer = MessageQueue(1, 1, max_chunk_bytes=1 << 16)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(reader.wait_until_ready)
        writer.wait_until_ready()
        ready.result(10)
        writer._spin_condition.notify = lambda: None
        for number in range(20):
            waiting = pool.submit(reader.dequeue, 30.0)
            time.sleep(0.01)
            begun = time.monotonic()
            writer.enqueue(number)
            assert waiting.result(30) == number
            assert time.monotonic() - begun < 1
