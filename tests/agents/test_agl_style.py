"""The example of an agent that was written for another trainer, run as it is."""

from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from agents_support import warmed, with_launcher

from lightning_ray.agents import (
    AgentConfig,
    AgentEnd,
    Task,
    attempt_environment,
    check_agent,
    grade,
    load_grader,
)
from lightning_ray.gateway.given_rewards import parse_rewards
from lightning_ray.spans import to_batch

ROOT = Path(__file__).parents[2]
TASK = Task("1", {"question": "What is 345 plus 27?", "answer": 372})


@pytest.fixture
def config() -> AgentConfig:
    """The committed configuration of the example."""
    settings = yaml.safe_load((ROOT / "lightning_ray/configs/agent/agl_style.yaml").read_text())
    return AgentConfig(**settings, cwd=str(ROOT))


@pytest.mark.parametrize("called", [False, True], ids=["as a command", "as a class"])
def test_it_runs_on_its_own_variables_and_its_reward_counts(config, model, called):
    if called:
        config.callable, config.command = f"{config.command[1]}:Agent", []
    check_agent(config, [TASK])
    env = attempt_environment(f"http://127.0.0.1:{model.server_address[1]}/capability", "secret")
    replies = {"calc(345 + 27)": 1.0, "calc(345 - 27)": 0.1, "It is 372.": 0.0}

    async def use(launcher):
        model.says = "calc(1 + 1)"
        results = [await warmed(launcher, TASK, env)]
        for model.says in replies:
            results.append(await launcher.run(TASK, env, 60))
        return results

    cold, *results = with_launcher(config, use, 120)
    assert all(r.end is AgentEnd.EXITED and r.exit_code == 0 for r in [cold, *results]), results
    assert [r.warm for r in results] == [True] * 3
    assert {authorization for _, _, authorization in model.asked} == {"Bearer secret"}
    asked = [body for path, body, _ in model.asked if path == "/capability/v1/chat/completions"]
    posted = [body for path, body, _ in model.asked if path == "/capability/v1/rewards"]
    assert len(asked) == len(posted) == 4
    assert asked[1]["messages"][-1] == {"role": "user", "content": TASK.data["question"]}
    for body, result, reward in zip(posted[1:], results, replies.values(), strict=True):
        rows = [one.span("run", "a", "a/1") for one in parse_rewards(body)]
        table = pa.Table.from_batches([to_batch(rows)])
        assert grade(load_grader(config.grader), TASK, result, table) == {"reward": reward}


def test_it_knows_nothing_of_us(config):
    source = (ROOT / config.command[1]).read_text()
    assert "lightning_ray" not in source and "LIGHTNING_RAY" not in source
