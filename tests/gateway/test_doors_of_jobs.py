"""Doors of several jobs on one cluster, and of one whose driver was killed."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import ray
from doors import NOBODY, open_door
from ray import serve

from lightning_ray.gateway import Answerer, GatewayConfig

CLOSES_WITHIN_S = 60.0
ANOTHER_JOB = """
import sys, time
from pathlib import Path
import ray
from doors import NOBODY, open_door
from lightning_ray.gateway import Answerer, GatewayConfig

ray.init(address=sys.argv[1], log_to_driver=False, namespace="lightning-ray")
answerers = [Answerer("policy", (NOBODY,), "key")]
with open_door(Path(sys.argv[2]), GatewayConfig(), answerers, job="killed") as door:
    print(door.port, flush=True)
    time.sleep(600)
"""


def hears(url: str) -> bool:
    """Whether a door answers there."""
    return httpx.get(f"{url}/openapi.json", timeout=30).status_code == 200


def test_the_door_of_one_job_stays_open_when_another_closes(
    ray_cluster: None, tmp_path: Path
) -> None:
    answerers = [Answerer("policy", (NOBODY,), "key")]
    with open_door(tmp_path / "a", GatewayConfig(), answerers, job="a") as first:
        with open_door(tmp_path / "b", GatewayConfig(), answerers, job="b") as second:
            assert hears(first.url) and hears(second.url)
        assert hears(first.url)
        assert set(serve.status().applications) == {"lightning-ray-a"}


def test_a_door_closes_by_itself_when_its_driver_is_killed(
    ray_cluster: None, tmp_path: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    answerers = [Answerer("policy", (NOBODY,), "key")]
    with open_door(tmp_path / "ours", GatewayConfig(), answerers, job="ours") as ours:
        driver = subprocess.Popen(
            [sys.executable, "-c", ANOTHER_JOB, address, str(tmp_path / "theirs")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        try:
            assert driver.stdout is not None
            port = int(driver.stdout.readline())
            assert hears(f"http://127.0.0.1:{port}")
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait(30)
        deadline = time.monotonic() + CLOSES_WITHIN_S
        while "lightning-ray-killed" in serve.status().applications:
            assert time.monotonic() < deadline, serve.status().applications
            time.sleep(0.5)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
        assert hears(ours.url)
