"""Workers bring nodes to a cluster that Ray's own autoscaler sizes, and give them back.

The nodes are processes of this machine, as Ray's provider for tests makes them.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

START_S, STOP_S, RUN_S = 60, 20, 280
HERE = Path(__file__).parent
WHO = ("", "head_", "worker_")
NODE_TYPES = {
    "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
    "rollouts": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 4},
}


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of one node with one processor, which grows."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    host = ray.util.get_node_ip_address()
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "disable_node_updaters": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": f"{host}:{port}",
    }
    settings = {
        "cluster_name": "test",
        "max_workers": 4,
        "idle_timeout_minutes": 0.1,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": NODE_TYPES,
        **{name: [] for name in ("cluster_synced_files", *(f"{who}setup_commands" for who in WHO))},
    }
    (tmp_path / "cluster.json").write_text(json.dumps(settings))
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    # A path of Ray's sockets may not be long.
    with tempfile.TemporaryDirectory(prefix="lr-", ignore_cleanup_errors=True) as temporary:
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
            *(f"--port={port}", "--num-cpus=1", "--include-dashboard=false"),
            *(f"--temp-dir={temporary}", f"--autoscaling-config={tmp_path}/cluster.json"),
        ]
        with (tmp_path / "ray.log").open("w") as log:
            head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in (tmp_path / "ray.log").read_text():
            assert time.monotonic() < deadline and head.poll() is None, "the head did not start"
            time.sleep(0.2)
        yield f"{host}:{port}"
        family = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(STOP_S)
        head.kill()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(STOP_S)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_workers_bring_nodes_and_give_them_back_and_no_rollout_is_tried_again(
    address: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "on_autoscaler.py", address, tmp_path],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr + (tmp_path / "ray.log").read_text()
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["workers"], found["nodes"]) == (3, 3)
    assert (found["workers_left"], found["nodes_left"]) == (1, 1)
    assert found["statuses"] == ["succeeded"] and found["attempts"] == [1] * 24
