"""The gateway of agentlightning 1.0 in front of an upstream; run by its own interpreter.

    python agentlightning_gateway.py UPSTREAM

Starts the package's own command `agl-server`, its gateway and its store in one process, and tells
it over its API of a model at that base URL and of rollouts. Then says {"ready": ...}, and answers
{"rollouts": N} with the addresses that N agents would be given. Ends with its standard input.
"""

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
from agentlightning.client import AgentLightningSyncClient

MODEL = "stub"
STARTS_WITHIN_S = 90.0
CHAT = "chat/completions"


@contextlib.contextmanager
def server(folder: str) -> Iterator[str]:
    """Starts the server; yields its base URL once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("agl-server")),
        "host=127.0.0.1",
        f"port={port}",
        f"default_proxy.model_name={MODEL}",
        f"hydra.run.dir={folder}",
    ]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno())
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            try:
                httpx.get(f"{url}/healthz", timeout=1).raise_for_status()
                break
            except httpx.TransportError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no server in {STARTS_WITHIN_S:g} s") from error
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def addresses(client: AgentLightningSyncClient, url: str, rollouts: int) -> list[str]:
    """Where each of so many rollouts that run sends its calls, in a training run."""
    made = client.post("/api/rollouts", json=[{"input": {"task": n}} for n in range(rollouts)])
    made.raise_for_status()
    found = []
    for one in made.json():
        name = one["rollout_id"]
        running = client.patch(f"/api/rollouts/{name}", json={"status": {"state": "running"}})
        running.raise_for_status()
        found.append(f"{url}/proxy/rollout/{name}/attempt/0/mode/train/openai/v1/{CHAT}")
    return found


def main() -> None:
    """Answers requests until standard input ends."""
    answers = sys.stdout
    model = {"model": MODEL, "endpoint": f"{sys.argv[1]}/v1"}
    with tempfile.TemporaryDirectory() as folder, server(folder) as url:
        with AgentLightningSyncClient(base_url=url, timeout=30) as client:
            client.post("/api/models", json=[model]).raise_for_status()
            print(json.dumps({"ready": version("agentlightning")}), file=answers, flush=True)
            for line in sys.stdin:
                found = addresses(client, url, json.loads(line)["rollouts"])
                print(json.dumps({"urls": found}), file=answers, flush=True)


if __name__ == "__main__":
    main()
