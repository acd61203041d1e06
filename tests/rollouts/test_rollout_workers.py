import asyncio
import json
import random
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc
import pytest
import ray
from agent_support import SLEEPS, agent_in

from lightning_ray.agents import AgentConfig
from lightning_ray.rollouts import (
    AttemptStatus,
    QueueClient,
    RolloutRecord,
    RolloutsConfig,
    RolloutSpec,
    RolloutStatus,
    WorkerGroup,
    start_queue,
)
from lightning_ray.spans import SpanClient, SpansConfig, read_folder, start_store

AGENT = """
    import os, signal, sys, time
    what = sys.argv[1]
    if what == "answer":
        print(os.environ["OPENAI_BASE_URL"])
    elif what.startswith("garbage"):
        sys.stdout.buffer.write(bytes(range(256)))
    elif what == "gives up":
        sys.exit(7)
    elif what == "crash":
        sys.exit("the agent is broken")
    elif what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang":
        time.sleep(600)
"""

GRADER = """
    def grade(task, result, spans):
        if task["do"] == "ungradable":
            raise LookupError("no such answer")
        return {"reward": float(result.stdout.startswith("http")), "spans": spans.num_rows}
"""


@pytest.fixture(scope="module")
def parts(
    ray_cluster: None, door_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[QueueClient, SpanClient]]:
    """A queue and a store, and a worker that takes from the one and tells the other."""
    folder = tmp_path_factory.mktemp("rollouts")
    (folder / "agent.py").write_text(textwrap.dedent(AGENT))
    (folder / "grader.py").write_text(textwrap.dedent(GRADER))
    agent = AgentConfig(
        name="test",
        command=["python", "agent.py", "{do}"],
        cwd=str(folder),
        grader=f"{folder}/grader.py:grade",
        warm_start=False,
        graded_exit_codes=[0, 7],
    )
    config = RolloutsConfig(slots_per_worker=4)
    queue = start_queue("run", config)
    store = start_store(str(folder / "spans"), SpansConfig())
    workers = WorkerGroup(config, agent, queue, store, door_url)
    yield queue, store
    workers.stop()
    store.close()
    ray.kill(queue.actor)


@pytest.mark.timeout(120)
def test_a_worker_that_is_killed_is_replaced_and_what_it_ran_is_tried_again(
    ray_cluster: None, door_url: str, tmp_path: Path
) -> None:
    """Three times, at random moments; the agent is charged for none of it."""
    agent = agent_in(tmp_path, SLEEPS, "{seconds}")
    config = RolloutsConfig(num_workers=2, slots_per_worker=4, worker_lost_s=600, max_faults=9)
    queue = start_queue("run", config)
    store = start_store(str(tmp_path / "spans"), SpansConfig())
    workers = WorkerGroup(config, agent, queue, store, door_url)
    chance = random.Random(3)
    names = [f"r{n}" for n in range(24)]
    queue.enqueue([RolloutSpec(n, n, {"seconds": 1}, 60.0, max_attempts=1) for n in names])
    died, kills, records = 0, 0, []
    deadline = time.monotonic() + 90
    while len(records) < len(names) and time.monotonic() < deadline:
        records = queue.wait(names, chance.uniform(0.5, 1.5))
        if kills < 3:
            ray.kill(chance.choice(workers._workers).actor)
            kills += 1
        died += workers.mend()
    workers.stop()
    store.close()
    assert (died, kills) == (3, 3)
    assert {record.status for record in records} == {RolloutStatus.SUCCEEDED}
    assert [record.spec.rollout_id for record in records] == names
    tried = [len(record.attempts) for record in records]
    assert max(tried) > 1, "no kill met an attempt"
    latest = sorted(record.attempt_id for record in records)
    assert [one for one in store_rewards(tmp_path / "spans") if one in latest] == latest
    ray.kill(queue.actor)


def store_rewards(folder: Path) -> list[str]:
    """The attempts that have rewards, once for each reward."""
    spans = read_folder(folder)
    return sorted(spans.filter(pc.equal(spans["kind"], "reward"))["attempt_id"].to_pylist())


def finished(queue: QueueClient, *what: str, timeout_s: float = 20.0) -> dict[str, RolloutRecord]:
    """The records of one rollout for each thing that the agent is to do."""
    queue.enqueue([RolloutSpec(do, do, {"do": do}, timeout_s, max_attempts=2) for do in what])
    return {record.spec.rollout_id: record for record in queue.wait(what, 60)}


def test_whatever_an_agent_does_its_rollout_comes_to_an_outcome(
    parts: tuple[QueueClient, SpanClient],
) -> None:
    queue, store = parts
    records = finished(queue, "answer", "garbage", "gives up", "crash", "die", "ungradable")
    records |= finished(queue, "hang", timeout_s=0.5)
    for name in ("answer", "garbage", "gives up"):
        assert records[name].status is RolloutStatus.SUCCEEDED and len(records[name].attempts) == 1
    assert records["answer"].outcome.rewards == {"reward": 1.0, "spans": 0.0}
    assert records["answer"].outcome.result.startswith("http://127.0.0.1:")
    # Garbage is an answer of the agent, and worth what the grader says.
    assert records["garbage"].outcome.rewards["reward"] == 0.0
    for name, status, reason in [
        ("crash", AttemptStatus.FAILED, "exit code 1\nthe agent is broken"),
        ("die", AttemptStatus.FAILED, "killed by signal 9"),
        ("ungradable", AttemptStatus.FAILED, "no such answer"),
        ("hang", AttemptStatus.TIMED_OUT, "stopped after"),
    ]:
        record = records[name]
        assert record.status is RolloutStatus.FAILED, name
        assert [found for _, found in record.attempts] == [status, status], name
        assert reason in record.outcome.error, name
        # A fault is no reward of zero.
        assert record.outcome.rewards == {}, name
    told = store.get(["answer/1", "crash/2"])
    assert told["kind"].to_pylist() == ["resource", "reward", "reward", "resource"]
    assert told["value"].to_pylist() == [None, 1.0, 0.0, None]
    why = json.loads(told["attributes"][3].as_py())
    assert (why["status"], why["exit_code"]) == ("failed", 1)
    assert "the agent is broken" in why["stderr"]


def test_a_cancelled_rollout_stops_its_agent_and_frees_the_slot(
    parts: tuple[QueueClient, SpanClient],
) -> None:
    queue, _ = parts
    hanging = [f"hang{number}" for number in range(4)]
    queue.enqueue([RolloutSpec(name, name, {"do": "hang"}, 300.0) for name in hanging])

    async def all_running() -> None:
        while queue.counts().running < 4:
            await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(all_running(), 30))
    queue.cancel(hanging)
    assert finished(queue, "garbage again")["garbage again"].status is RolloutStatus.SUCCEEDED
    assert queue.counts().cancelled == 4
