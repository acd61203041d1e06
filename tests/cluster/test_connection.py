"""A local cluster goes away with its driver, however the driver ends."""

import subprocess
import sys
import time

import psutil
import pytest

from lightning_ray.cluster import ClusterConfig, Connection, check_cluster
from lightning_ray.cluster.guardian import LOOK_EVERY_S
from lightning_ray.errors import UserError

DRIVER = """
import os, sys, time
import ray
from lightning_ray.cluster import ClusterConfig, Connection
with Connection(ClusterConfig(num_cpus=2, object_store_mib=100)):
    actor = ray.remote(type("Named", (), {"pid": lambda self: os.getpid()})).remote()
    print(ray.get(actor.pid.remote()), flush=True)
    if sys.argv[1] == "hang":
        time.sleep(600)
"""


def _driver(how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def _first_number(driver: subprocess.Popen[str]) -> int:
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.strip().isdigit():
            return int(line)
    raise AssertionError("the driver ended before it named its actor")


def _alive(processes: list[psutil.Process]) -> list[str]:
    return [p.name() for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def _wait_until_gone(processes: list[psutil.Process], seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while (left := _alive(processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_a_killed_driver_leaves_no_process_behind() -> None:
    driver = _driver("hang")
    actor = _first_number(driver)
    # The guardian looks round every few seconds; a cluster lives longer than that.
    time.sleep(LOOK_EVERY_S + 1)
    family = psutil.Process(driver.pid).children(recursive=True)
    assert actor in [process.pid for process in family]
    driver.kill()
    driver.wait(10)
    assert _wait_until_gone(family, 15) == []


def test_a_driver_that_ends_leaves_no_process_behind() -> None:
    driver = _driver("end")
    _first_number(driver)
    family = psutil.Process(driver.pid).children(recursive=True)
    assert driver.wait(60) == 0
    assert _wait_until_gone(family, 1) == []


TOLD_TO_END = """
import os, signal, time
from lightning_ray.cluster import ClusterConfig, Connection

def interrupt(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupt)
with Connection(ClusterConfig(num_cpus=1, object_store_mib=100)):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt:
        print("asked", flush=True)
    time.sleep(4)
    print("in order", flush=True)
"""


def test_a_driver_that_is_told_to_end_has_the_time_that_it_needs() -> None:
    """Ray's own handlers of SIGTERM would end it at once, or abort it three seconds later."""
    driver = subprocess.run(
        [sys.executable, "-c", TOLD_TO_END],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert driver.stdout.split("\n") == ["asked", "in order", ""], driver.stderr
    assert driver.returncode == 0 and "SIGTERM" not in driver.stderr


def test_no_cluster_at_the_address_is_one_line() -> None:
    connection = Connection(ClusterConfig(address="127.0.0.1:1"))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1.*cluster\.address=local"):
        connection.__enter__()


@pytest.mark.parametrize("config", [ClusterConfig(num_cpus=1), ClusterConfig(object_store_mib=1)])
def test_a_cluster_too_small_to_start_is_refused(config: ClusterConfig) -> None:
    with pytest.raises(UserError, match="at least"):
        check_cluster(config)


def test_a_cluster_that_is_too_small_for_the_job_is_said_so() -> None:
    program = (
        "from lightning_ray.cluster import ClusterConfig, Connection, Needs\n"
        "Connection(ClusterConfig(num_cpus=2, object_store_mib=100), Needs(cpus=3)).__enter__()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert "the job's parts ask for 3 CPUs and the cluster has 2" in ended.stderr
