"""`lightning-ray evaluate spans=...` at the terminal: spans in, a report and a verdict out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lightning_ray.errors import UserError
from lightning_ray.jobs import evaluate
from lightning_ray.spans import SpanKind, SpanStatus, span, to_batch
from lightning_ray.spans.segment import SegmentWriter

# What the console script does, and then what it took.
SCRIPT = """
import sys
from lightning_ray.cli import main
try:
    main()
finally:
    ray = sys.modules.get("ray")
    heavy = sorted({"torch", "vllm", "deepspeed"} & set(sys.modules))
    print(f"Ray started: {ray is not None and ray.is_initialized()}, loaded: {heavy}")
"""


def typed(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def rollout(run: str, number: int, reward: float, version: int) -> list[dict[str, Any]]:
    """What a rollout with a tool call and a person's verdict leaves."""
    place: dict[str, Any] = {"run_id": run, "rollout_id": f"{run}-{number}-{version}"}
    place["attempt_id"] = f"{place['rollout_id']}/1"
    said = {"task_id": f"t{number}", "task": {"id": number}, "status": "succeeded", "stdout": "42"}
    usage = {"prompt_tokens": 1000, "choice": 0}
    return [
        span(SpanKind.MODEL_CALL, "chat", **place, policy="p", version=version, attributes=usage),
        span(
            SpanKind.TOOL_CALL,
            "undo_booking" if number == 0 else "book",
            **place,
            status=SpanStatus.ERROR if number == 1 else SpanStatus.OK,
        ),
        span(SpanKind.RESOURCE, "attempt", **place, attributes=said),
        span(SpanKind.REWARD, "reward", **place, value=reward),
        span(SpanKind.FEEDBACK, "override" if reward < 1 else "accept", **place),
    ]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with one run: version 1 fails three tasks of four, version 2 one."""
    root = tmp_path_factory.mktemp("outputs")
    folder = root / "booking-1" / "spans"
    folder.mkdir(parents=True)
    writer = SegmentWriter(folder / "00000001.arrows")
    for version, rewards in ((1, (0.0, 0.0, 0.0, 1.0)), (2, (1.0, 0.0, 1.0, 1.0))):
        for number, reward in enumerate(rewards):
            rows = rollout("booking-1", number, reward, version)
            rows[0] |= {"logprobs": [-0.1] * 100, "token_ids": [1] * 100}
            writer.append(to_batch(rows))
    writer.close()
    return root


def test_measures_comparison_and_gates_of_recorded_spans(outputs: Path) -> None:
    done = typed(
        "evaluate",
        "spans=booking-1",
        "where=version = 2",
        "against_where=version = 1",
        f"output_dir={outputs}",
        "+evaluation.prices.p={input_per_million: 1, output_per_million: 10}",
        "gate.max_regression=0.02",
        "gate.max_override_rate=0.2",
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout.endswith("Ray started: False, loaded: []\n")
    assert done.stderr == "gate failed: max_override_rate=0.2: override rate 0.25 (n 4)\n"
    assert "  completion quality  0.75" in done.stdout
    assert "paired on 4 tasks: reward +0.5" in done.stdout
    (folder,) = outputs.glob("measures-*")
    found = json.loads((folder / "evaluation.json").read_text())
    values = {name: m["value"] for name, m in found["subject"]["measures"].items()}
    assert values == {
        "completion_quality": 0.75,
        "tool_discipline": 0.75,
        "rollback_frequency": 0.25,
        "override_rate": 0.25,
        # 4 calls of 1,000 tokens in and 100 out; 3 resolved.
        "cost_per_resolved": pytest.approx(4 * (1000 + 100 * 10) / 1e6 / 3),
    }
    assert found["against"]["measures"]["completion_quality"]["value"] == 0.25
    assert [found["comparison"][key] for key in ("wins", "ties", "losses")] == [2, 2, 0]
    assert [gate["passed"] for gate in found["gates"]] == [True, False]
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("lightning-ray")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == folder.name
    assert run.data.tags["lightning_ray.job"] == "evaluate"
    assert run.data.tags["lightning_ray.gates"] == "failed"
    assert run.data.metrics["completion_quality"] == 0.75
    assert run.data.metrics["difference"] == 0.5
    assert run.data.params["words.where"] == "version = 2"
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"evaluation.json", "evaluation.html", "config.yaml"} <= names


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["spans=booking"], "spans=booking: no such run in .*; the runs with spans: booking-1"),
        (["spans=booking-1", "where=vers = 2"], "where=vers = 2: the query cannot be run"),
        (["spans=booking-1", "where=version = 9"], "where=version = 9: no rollout has such a span"),
        (["spans=booking-1", "against=booking-1"], "the same spans"),
        (["spans=booking-1", "evaluation.reward=x"], "evaluation.reward=x: .* there are reward"),
        (["spans=booking-1", "gate.max_regression=0"], "add against="),
        (["spans=booking-1", "run=booking-1"], "leave out one"),
        (["spans=booking-1", "where="], "where=: a value is needed"),
        (["spans=booking-1", "evaluation.rewards=x"], "evaluation.rewards"),
        (["where=true", "run=booking-1"], "where=.*add spans=RUN"),
        ([], "evaluate what"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    outputs: Path, words: list[str], reason: str
) -> None:
    before = sorted(outputs.iterdir())
    with pytest.raises(UserError, match=reason) as raised:
        evaluate.main([*words, f"output_dir={outputs}"])
    assert "\n" not in str(raised.value)
    assert sorted(outputs.iterdir()) == before
