"""Live traffic on released versions: keys, conversations, canary, promotion, rollback, feedback.

`lightning-ray serve` runs as a user starts it; pointers are moved by `lightning-ray release`.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from lightning_ray.jobs import release
from lightning_ray.policies import PolicyRegistry, PolicyVersion
from lightning_ray.spans import read_folder
from lightning_ray.tracking.store import default_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PAUSE_S = 1.0
"""How long somebody reads an answer."""
KEY = "a-key-of-the-web-front"
OTHER = "a-key-of-somebody-else"
SERVING = re.compile(r"serving at (\S+)")


def perturbed(base: Path, target: Path) -> Path:
    """A version that differs from the base: the same model with slightly larger last weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, target)
    weights = load_file(target / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.05
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@dataclass
class Service:
    """A service under test."""

    url: str
    root: Path
    lines: list[str]
    process: subprocess.Popen[str]

    def release(self, *words: str) -> None:
        release.main([*words, f"output_dir={self.root}"])

    def client(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def spans(self) -> list[dict]:
        (folder,) = self.root.glob("serve-*/spans")
        return read_folder(folder).to_pylist()

    def wait_for(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not any(text in line for line in self.lines):
            waiting = time.monotonic() < deadline and self.process.poll() is None
            assert waiting, f"no {text!r} in {self.lines}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def service(real_model, cli, tmp_path_factory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("serving")
    registry = PolicyRegistry(default_uri(root), "helper", "run-a")
    registry.register(PolicyVersion("helper", 0, real_model, "run-a", None, 0))
    second = perturbed(real_model, root / "versions" / "1")
    registry.register(PolicyVersion("helper", 1, second, "run-a", 0, 1))
    release.main(["promote", "helper", "1", f"output_dir={root}"])
    arguments = [
        *("serve", "policy.name=helper", "gateway.models=[gpt-4o-mini]", f"output_dir={root}"),
        "+serving.keys.web=WEB_KEY",
        "+serving.keys.other=OTHER_KEY",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEB_KEY", KEY)
        patch.setenv("OTHER_KEY", OTHER)
        process = cli.start(*arguments)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    made = Service("", root, lines, process)
    made.wait_for("serving at", 180)
    made.url = next(found[1] for line in lines if (found := SERVING.search(line)))
    yield made
    process.send_signal(2)
    assert process.wait(30) == 0, lines


def ask(client: OpenAI, turns: list[dict], **more: object) -> tuple[str, str, str]:
    """One reply: its text, version and rollout."""
    raw = client.chat.completions.with_raw_response.create(
        model="gpt-4o-mini", messages=turns, max_tokens=4, temperature=0, **more
    )
    text = raw.parse().choices[0].message.content or ""
    return text, raw.headers["x-lightning-ray-version"], raw.headers["x-lightning-ray-rollout"]


def test_a_key_that_is_not_known_is_refused(service):
    for headers in ({}, {"authorization": "Bearer guess"}, {"x-api-key": "guess"}):
        reply = httpx.post(f"{service.url}/chat/completions", headers=headers, json={})
        assert reply.status_code == 401
        assert "this API key is not known here" in reply.json()["error"]["message"]


def test_feedback_lands_beside_the_call_that_it_is_about(service):
    client = service.client()
    raw = client.chat.completions.with_raw_response.create(
        model="gpt-4o-mini", messages=[{"role": "user", "content": "Say hi"}], max_tokens=4
    )
    reply, rollout = raw.parse(), raw.headers["x-lightning-ray-rollout"]
    headers = {"authorization": f"Bearer {KEY}"}
    body = {"reply_id": reply.id, "verdict": "override", "by": "ann", "reward": 0.0}
    said = httpx.post(f"{service.url}/feedback", headers=headers, json=body)
    assert (said.status_code, said.json()["rollout"]) == (200, rollout)
    mine = [span for span in service.spans() if span["rollout_id"] == rollout]
    assert [(span["kind"], span["name"]) for span in mine] == [
        ("model_call", "/v1/chat/completions"),
        ("feedback", "override"),
        ("reward", "reward"),
    ]
    # With its tokens, so that it can be trained on.
    assert mine[0]["version"] == 1 and len(mine[0]["logprobs"]) > 0
    assert json.loads(mine[1]["attributes"])["by"] == "ann"
    everything = json.dumps(service.spans(), default=str)
    assert KEY not in everything and OTHER not in everything
    # Somebody else's key says nothing of this conversation.
    other = {"authorization": f"Bearer {OTHER}"}
    assert httpx.post(f"{service.url}/feedback", headers=other, json=body).status_code == 404


def test_an_anthropic_client_is_served_too(service):
    body = {
        "model": "gpt-4o-mini",
        "max_tokens": 4,
        "messages": [{"role": "user", "content": "Say hi"}],
    }
    reply = httpx.post(f"{service.url}/messages", headers={"x-api-key": KEY}, json=body, timeout=60)
    assert reply.status_code == 200 and reply.json()["type"] == "message"


@dataclass
class Talk:
    """What came of one conversation."""

    versions: set[str] = field(default_factory=set)
    rollouts: set[str] = field(default_factory=set)
    answers: int = 0


def test_conversations_stay_on_their_version_through_promotion_and_rollback(service):
    """Twenty go on all the while; none fails, each keeps its version; new ones follow at once."""
    stop = threading.Event()
    client = service.client()

    def talk(number: int) -> Talk:
        mine = Talk()
        turns = [{"role": "user", "content": f"Conversation {number}: count to three."}]
        while not stop.is_set() or mine.answers < 3:
            text, version, rollout = ask(
                client,
                turns[-6:] if len(turns) > 7 else turns,
                extra_headers={"x-conversation-id": str(number)},
            )
            mine.versions.add(version)
            mine.rollouts.add(rollout)
            mine.answers += 1
            turns += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": "Go on."},
            ]
            stop.wait(PAUSE_S)
        return mine

    def new_conversation(begun: float, number: int) -> tuple[float, str]:
        turn = [{"role": "user", "content": f"New {begun} {number}"}]
        asked = time.monotonic() - begun
        return asked, ask(client, turn)[1]

    def seconds_until(pool: ThreadPoolExecutor, expected: str) -> float:
        """From now, a release's command having returned, until `expected` has every new one."""
        begun = time.monotonic()
        asked = []
        for number in range(24):
            asked.append(pool.submit(new_conversation, begun, number))
            time.sleep(0.06)
        answers = [future.result(120) for future in asked]
        assert max(answers)[1] == expected, answers
        return max((at for at, version in answers if version != expected), default=0.0)

    with ThreadPoolExecutor(96) as pool:
        talks = [pool.submit(talk, number) for number in range(20)]
        try:
            time.sleep(2)
            service.release("canary", "helper", "2", "share=0.5")
            service.wait_for("version 2 is loaded", 150)
            late = [
                pool.submit(ask, client, [{"role": "user", "content": f"C{i}"}]) for i in range(24)
            ]
            split = [future.result(120)[1] for future in late]
            moves = []
            for words, expected in (
                (("promote", "helper"), "helper@2"),
                (("rollback", "helper"), "helper@1"),
                (("promote", "helper", "2"), "helper@2"),
                (("rollback", "helper"), "helper@1"),
            ):
                service.release(*words)
                moves.append(seconds_until(pool, expected))
        finally:
            stop.set()
        # A call that failed would raise here: the client does not retry.
        done = [future.result(120) for future in talks]
    print("seconds until a move counted:", ", ".join(f"{seconds:.2f}" for seconds in moves))
    assert set(split) == {"helper@1", "helper@2"}
    assert all(mine.versions == {"helper@1"} for mine in done)
    assert all(len(mine.rollouts) == 1 and mine.answers >= 3 for mine in done)
    # Of four moves, so that one moment in which the machine does something else is no failure.
    assert statistics.median(moves) < 1.0
    # What the engines recorded says the same as the headers did.
    by_rollout = defaultdict(set)
    for span in service.spans():
        if span["kind"] == "model_call":
            by_rollout[span["rollout_id"]].add(span["version"])
    assert all(len(versions) == 1 for versions in by_rollout.values())
    assert {v for versions in by_rollout.values() for v in versions} == {1, 2}


def test_a_service_without_a_release_or_a_key_does_not_start(service, cli, monkeypatch):
    monkeypatch.setenv("WEB_KEY", KEY)
    monkeypatch.setenv("SHORT_KEY", "short")
    keys = "+serving.keys.web=WEB_KEY"
    for arguments, message in (
        (("policy.name=nobody", keys), "there is no policy 'nobody'; there are: helper"),
        (("policy.name=helper",), "serving.keys is empty"),
        (
            ("policy.name=helper", "+serving.keys.web=SHORT_KEY"),
            "SHORT_KEY is to hold a key of at least 16 characters; it holds 5",
        ),
    ):
        ended = cli.run("serve", *arguments, f"output_dir={service.root}", timeout=60)
        assert ended.returncode == 2 and message in ended.stderr


SERVED_BY_RAY = """
import socket, sys
import httpx, ray
from ray import serve
from lightning_ray.jobs.service import build
root = sys.argv[1]
ray.init(num_cpus=4, address="local", include_dashboard=False, log_to_driver=False)
settings = ["policy.name=helper", "gateway.models=[gpt-4o-mini]", f"output_dir={root}",
            "+serving.keys.web=WEB_KEY"]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(build({"settings": settings}), name="lightning-ray", route_prefix="/")
body = {"model": "gpt-4o-mini", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
for key in ("a-key-of-the-web-front", "guess"):
    reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60,
                       headers={"authorization": f"Bearer {key}"})
    print("status", reply.status_code, reply.headers.get("x-lightning-ray-version"), flush=True)
serve.shutdown()
ray.shutdown()
"""


def test_ray_serve_runs_the_application_that_a_ray_service_names(service, monkeypatch):
    monkeypatch.setenv("WEB_KEY", KEY)
    done = subprocess.run(
        [sys.executable, "-c", SERVED_BY_RAY, str(service.root)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert "status 200 helper@1" in done.stdout, done.stdout + done.stderr
    assert "status 401 None" in done.stdout
