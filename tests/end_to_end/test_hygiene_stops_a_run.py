"""A check whose policy is to stop ends the real job with one line, and leaves what it found."""

import json

import pytest
from mlflow import MlflowClient

AGENT = """
import runpy, sys
if sys.argv[1].startswith("What is 1 "):
    raise RuntimeError("injected fault")
runpy.run_path("examples/calculator/agent.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stop_names_the_check_the_count_and_the_first_offender(cli, tmp_path) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    tasks = [{"question": f"What is {n} plus 2?", "answer": n + 2} for n in range(1, 4)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    done = cli.run(
        "train",
        "experiment=calculator",
        f"output_dir={tmp_path}/outputs",
        f'agent.command=[python,{tmp_path}/agent.py,"{{question}}"]',
        f"training.tasks={tmp_path}/tasks.jsonl",
        "training.tasks_per_step=3",
        "algorithm.group_size=2",
        "evaluation.tasks=null",
        "rollouts.max_attempts=1",
        "hygiene.infrastructure_faults=stop",
        timeout=600,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    for part in (
        "hygiene.infrastructure_faults=stop: 2 attempts in step 1; the first, s00001-",
        "RuntimeError: injected fault",
        "leave them out with hygiene.infrastructure_faults=drop",
    ):
        assert part in line
    (folder,) = (tmp_path / "outputs").glob("calculator-*")
    assert list((folder / "versions").iterdir()) == [], "the step was trained all the same"
    kept = json.loads((folder / "hygiene.json").read_text())
    assert kept["totals"]["infrastructure_faults"] == 2
    run_id = json.loads((folder / "run.json").read_text())["mlflow_run_id"]
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.metrics["hygiene_infrastructure_faults"] == 2
    assert run.data.params["hygiene.inexact_tokens"] == "drop"
    assert "hygiene.json" in {item.path for item in client.list_artifacts(run_id)}
