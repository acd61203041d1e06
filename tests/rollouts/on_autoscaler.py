"""python on_autoscaler.py ADDRESS FOLDER: a group of workers on a cluster with Ray's autoscaler.

More rollouts than one worker can run are queued; when they have ended nothing is. Prints JSON: most
nodes and workers there were, the rollouts' attempts and statuses, and what was left in the end.
"""

import json
import sys
import time
from pathlib import Path

import ray
from agent_support import SLEEPS, agent_in

from lightning_ray.rollouts import RolloutsConfig, RolloutSpec, WorkerGroup, start_queue
from lightning_ray.spans import SpansConfig, start_store

ROLLOUTS, SECONDS, SLOTS, MOST, WITHIN_S = 24, 8, 2, 3, 180.0


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def main(address: str, folder: Path) -> None:
    """See above."""
    ray.init(address=address, log_to_driver=False)
    agent = agent_in(folder, SLEEPS, str(SECONDS))
    config = RolloutsConfig(
        num_workers=1, max_workers=MOST, slots_per_worker=SLOTS, idle_s=2, num_cpus=1
    )
    queue = start_queue("run", config)
    store = start_store(str(folder / "spans"), SpansConfig())
    workers = WorkerGroup(config, agent, queue, store, "http://127.0.0.1:9")
    names = [f"r{n}" for n in range(ROLLOUTS)]
    queue.enqueue([RolloutSpec(name, name, {}, 120.0, max_attempts=1) for name in names])
    records, nodes, most = [], alive(), 1
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        records = queue.wait(names, 0.5)
        workers.mend()
        workers.fit(queue.counts())
        nodes, most = max(nodes, alive()), max(most, workers.count)
        if len(records) == ROLLOUTS and workers.count == 1 and alive() == 1:
            break
    found = {
        "nodes": nodes,
        "workers": most,
        "statuses": sorted({record.status.value for record in records}),
        "attempts": [len(record.attempts) for record in records],
        "nodes_left": alive(),
        "workers_left": workers.count,
    }
    workers.stop()
    store.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
