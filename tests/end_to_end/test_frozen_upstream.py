"""The planner learns while the solver is somebody's API: its calls cost, and teach nothing.

The API is a fake of somebody else's server; everything of ours is real.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_api import FakeApi, fake_api

from lightning_ray.spans import read_folder
from lightning_ray.tracking import read_summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECRET = "sk-of-the-solver"
STEPS, TASKS, GROUP = 2, 4, 8


def solve(body: dict[str, Any]) -> str:
    """What the API's model says: the calculator's number."""
    found = re.search(r"The calculator says (-?\d+)\.", body["messages"][-1]["content"])
    return found[1] if found else "I cannot say."


@pytest.fixture(scope="module")
def trained(cli, tmp_path_factory) -> tuple[Path, FakeApi, str]:
    output = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch, fake_api() as api:
        api.answer = solve
        patch.setenv("SOLVER_KEY", SECRET)
        done = cli.run(
            "train",
            "experiment=planner",
            f"output_dir={output}",
            f"policies.solver.upstream.base_url={api.url}",
            "policies.solver.upstream.model=big",
            "policies.solver.upstream.api_key_env=SOLVER_KEY",
            "policies.solver.upstream.input_per_million=1",
            "policies.solver.upstream.output_per_million=2",
            f"training.steps={STEPS}",
            f"training.tasks_per_step={TASKS}",
            f"algorithm.group_size={GROUP}",
            "evaluation.tasks=null",
            timeout=700,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (summary,) = output.glob("planner-*/summary.json")
    return summary.parent, api, done.stdout + done.stderr


def test_the_solver_is_asked_there_with_its_key_and_its_cost_is_kept(trained):
    folder, api, printed = trained
    assert api.requests
    assert {body["model"] for _, body in api.requests} == {"big"}
    assert {headers["authorization"] for headers, _ in api.requests} == {f"Bearer {SECRET}"}
    calls = [r for r in read_folder(folder / "spans").to_pylist() if r["kind"] == "model_call"]
    solver = [row for row in calls if row["policy"] == "solver"]
    assert len(solver) == len(api.requests)
    for row in solver:
        # 100 tokens in at 1 and 10 out at 2 dollars a million, as the API counts them.
        assert json.loads(row["attributes"])["cost_usd"] == pytest.approx(120e-6)
        assert not row["logprobs"]
    assert SECRET not in printed and SECRET not in json.dumps(calls, default=str)


def test_the_planner_alone_learns(trained):
    folder, _, _ = trained
    summary = read_summary(folder / "summary.json")
    calls = [r for r in read_folder(folder / "spans").to_pylist() if r["kind"] == "model_call"]
    steps = [row for row in calls if re.match(r"s0*[12]-", row["rollout_id"])]
    planner = [row for row in steps if row["policy"] == "planner"]
    assert len(planner) >= STEPS * TASKS * GROUP and all(len(r["logprobs"]) for r in planner)
    assert summary.steps == STEPS and summary.extra["version"] >= 1
    assert summary.extra["frozen_before"] == summary.extra["frozen_after"]
    # What can be learnt from is what the planner sampled, and nothing else.
    sampled = sum(len(row["logprobs"]) for row in planner)
    assert sum(row["sampled_tokens"] for row in summary.extra["history"]) == sampled > 0
