"""`lightning-ray rollouts` on a run that goes on: a real queue, journal and store."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from lightning_ray.errors import UserError
from lightning_ray.jobs import rollouts as command
from lightning_ray.rollouts import (
    AttemptOutcome,
    AttemptStatus,
    QueueClient,
    RolloutsConfig,
    RolloutSpec,
    start_queue,
)
from lightning_ray.spans import SpanKind, SpansConfig, span, to_batch
from lightning_ray.spans.store import SpanStore

GOOD = AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": 0.5, "format": 1.0}, seconds=1.25)
BAD = AttemptOutcome(AttemptStatus.FAILED, error="exit code 3\nRuntimeError: no disk")


def spec(name: str, task: str = "t1") -> RolloutSpec:
    return RolloutSpec(name, task, {"question": "What is 12 plus 30?"}, 60.0, max_attempts=1)


@pytest.fixture
def queue(ray_cluster: None, tmp_path: Path) -> Iterator[QueueClient]:
    client = start_queue("run-1", RolloutsConfig(), tmp_path / "run-1" / "rollouts")
    yield client
    ray.kill(client.actor)


@pytest.fixture
def run(queue: QueueClient, tmp_path: Path) -> Path:
    """A run's folder: `good` succeeded, `bad` failed, `long` runs, `later` waits."""

    async def live() -> None:
        for name, outcome in (("good", GOOD), ("bad", BAD), ("long", None)):
            await queue.actor.enqueue.remote([spec(name, f"task-{name}")])
            lease = await queue.actor.dequeue.remote(10, "worker-1")
            if outcome is not None:
                assert await queue.actor.finish.remote(lease.attempt_id, outcome)
        await queue.actor.enqueue.remote([spec("later")])
        store = SpanStore(str(tmp_path / "run-1" / "spans"), SpansConfig())
        place = {"run_id": "run-1", "rollout_id": "good", "attempt_id": "good/1"}
        call = span(
            SpanKind.MODEL_CALL,
            "/v1/chat/completions",
            **place,
            policy="policy",
            version=3,
            token_ids=[1, 2, 3, 4],
            logprobs=[-0.5, -0.25],
        )
        reward = span(SpanKind.REWARD, "reward", **place, value=0.5, source="grader")
        await store.append(to_batch([call, reward]))
        await store.close()

    asyncio.run(live())
    return tmp_path / "run-1"


@pytest.fixture
def said(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def typed(name: str, *words: str) -> str:
        command.main([name, str(run), *words])
        return capsys.readouterr().out

    return typed


def test_a_run_that_goes_on_is_listed_filtered_and_shown(said: Callable[..., str]) -> None:
    listed = said("ls")
    for words in ("good  task-good  succeeded", "bad  task-bad  failed", "4 rollouts"):
        assert " ".join(words.split()) in " ".join(listed.split())
    assert "reward 0.5 format 1" in " ".join(listed.split()) and "RuntimeError: no disk" in listed
    assert "1 rollouts" in said("ls", "status=running") and "long" in said("ls", "status=running")
    assert "0 rollouts" in said("ls", "attempts=2")
    assert "the last 1 shown" in said("ls", "limit=1")
    shown = said("show", "good")
    assert "good: succeeded, task task-good" in shown and "What is 12 plus 30?" in shown
    assert "policy@3  4 tokens  2 of them sampled" in shown and "rewards: reward 0.5" in shown
    assert "0.5 by grader" in shown
    assert "RuntimeError: no disk" in said("show", "bad")


def test_rollouts_are_retried_and_cancelled_while_the_run_goes_on(
    said: Callable[..., str], queue: QueueClient
) -> None:
    assert "worker-1 busy 1" in " ".join(said("workers").split())
    assert "queued again: bad" in said("retry", "bad", "long")
    assert queue.counts().queued == 2
    assert "1 rollouts cancelled" in said("cancel", "later")
    assert "2 rollouts cancelled" in said("cancel", "all")
    counts = queue.counts()
    assert (counts.cancelled, counts.queued, counts.running, counts.succeeded) == (3, 0, 0, 1)
    assert "nothing to cancel" in said("cancel", "all")


def test_mistakes_are_one_clear_line(run: Path, queue: QueueClient, monkeypatch) -> None:
    for words, said in (
        (["ls", "nowhere"], "nowhere: no run with rollouts in outputs"),
        (["ls"], "name the run"),
        (["look", str(run)], "no subcommand 'look'"),
        (["ls", str(run), "status=gone"], "status=gone: use one of queued"),
        (["ls", str(run), "limit=few"], "limit=few: must be a whole number"),
        (["show", str(run), "nobody"], "no rollout nobody in"),
        (["cancel", str(run), "nobody"], "no rollout nobody in"),
        (["retry", str(run)], "name rollouts"),
    ):
        with pytest.raises(UserError) as raised:
            command.main(words)
        assert said in str(raised.value)
    ray.kill(queue.actor)
    monkeypatch.setattr(command, "ANSWER_TIMEOUT_S", 2.5)
    with pytest.raises(UserError, match="the run is over"):
        command.main(["cancel", str(run), "later"])
    assert list((run / "rollouts" / "requests").glob("*.json")) == []
    # What was recorded can still be looked at.
    command.main(["ls", str(run)])
