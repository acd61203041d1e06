"""A released version serves, people judge its answers, and the good ones are what it is tuned on.

`serve`, feedback over HTTP, `finetune from=SERVE_RUN`: the held-out score of the real model rises.
"""

import json
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from lightning_ray.jobs import release
from lightning_ray.policies import PolicyRegistry, PolicyVersion
from lightning_ray.spans import SpanKind, query, read_folder
from lightning_ray.tracking import read_summary
from lightning_ray.tracking.store import default_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TASKS = Path(__file__).parents[2] / "examples/calculator/train.jsonl"
KEY = "a-key-of-the-web-front"
ASKED = 128
# What the calculator's agent says before the question.
BEGINNING = [
    {"role": "system", "content": "Turn each question into a calculator expression."},
    {"role": "user", "content": "What is 12 plus 30?"},
    {"role": "assistant", "content": "calc(12 + 30)"},
]
CALL = re.compile(r"calc\(\s*(-?\d+)\s*([+*-])\s*(-?\d+)\s*\)")


@dataclass(frozen=True)
class Served:
    """A service that has ended."""

    folder: Path
    right: set[str]
    """The conversations whose answer a person accepted."""


def judge(url: str, number: int, task: dict) -> tuple[str, bool]:
    """One conversation and what a person says of it; its rollout, and whether it was accepted."""
    with httpx.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=120) as client:
        turns = [*BEGINNING, {"role": "user", "content": task["question"]}]
        reply = client.post(
            f"{url}/chat/completions",
            json={"model": "gpt-4o-mini", "messages": turns, "max_tokens": 20},
            headers={"x-conversation-id": str(number)},
        ).raise_for_status()
        rollout = reply.headers["x-lightning-ray-rollout"]
        call = CALL.fullmatch(reply.json()["choices"][0]["message"]["content"].strip())
        right = call is not None and eval("".join(call.groups())) == task["answer"]
        said = {"verdict": "accept", "reward": 1} if right else {"verdict": "override", "reward": 0}
        body = {"reply_id": reply.json()["id"], "by": "ann", **said}
        client.post(f"{url}/feedback", json=body).raise_for_status()
        return rollout, right


@pytest.fixture(scope="module")
def served(cli, real_model, tmp_path_factory) -> Served:
    root = tmp_path_factory.mktemp("outputs")
    registry = PolicyRegistry(default_uri(root), "policy", "somewhere")
    registry.register(PolicyVersion("policy", 0, real_model, "somewhere", None, 0))
    release.main(["promote", "policy", "latest", f"output_dir={root}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEB_KEY", KEY)
        process = cli.start(
            "serve", "experiment=calculator", "+serving.keys.web=WEB_KEY", f"output_dir={root}"
        )
    lines: list[str] = []
    known = threading.Event()

    def listen() -> None:
        for line in process.stdout:
            lines.append(line)
            if "serving at" in line:
                known.set()
        known.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        assert known.wait(240) and process.poll() is None, lines
        url = next(found[1] for line in lines if (found := re.search(r"serving at (\S+)", line)))
        tasks = [json.loads(line) for line in TASKS.read_text().splitlines()[:ASKED]]
        with ThreadPoolExecutor(16) as pool:
            judged = list(pool.map(lambda item: judge(url, *item), enumerate(tasks)))
    finally:
        process.send_signal(2)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    assert process.returncode == 0, lines
    (folder,) = root.glob("serve-*")
    return Served(folder, {rollout for rollout, right in judged if right})


def test_a_version_is_tuned_on_what_people_accepted(cli, served, few_heldout):
    rows = query(
        read_folder(served.folder / "spans"),
        "SELECT rollout_id FROM spans WHERE kind = ? AND name = 'accept'",
        [SpanKind.FEEDBACK.value],
    )
    assert set(rows["rollout_id"].to_pylist()) == served.right
    done = cli.run(
        "finetune",
        f"from={served.folder.name}",
        "min_reward=1",
        "experiment=calculator",
        f"output_dir={served.folder.parent}",
        "finetuning.epochs=4",
        "finetuning.batch_size=8",
        f"evaluation.tasks={few_heldout}",
        "evaluation.samples_per_task=4",
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = served.folder.parent.glob("calculator-finetune-*/summary.json")
    summary = read_summary(path)
    print(f"held-out {summary.heldout_before:.3f} before, {summary.heldout_after:.3f} after")
    assert summary.extra["samples"]["chosen"] == len(served.right)
    assert summary.extra["samples"]["attempts"] == ASKED
    # 64 answers: two standard errors are 0.12.
    assert summary.heldout_after > summary.heldout_before + 0.15
