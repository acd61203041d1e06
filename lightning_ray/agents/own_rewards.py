"""A grader for agents that judge themselves: what an agent posted as its rewards is what counts.

    agent.grader=lightning_ray.agents.own_rewards:grade

Whoever chooses it trusts the agent with its own reward; with any other grader an agent's rewards
are kept and shown, and overrule nobody.
"""

from typing import Any

import pyarrow as pa

from lightning_ray.agents.result import AgentResult
from lightning_ray.spans.rewards import rewards, whole_attempt


def grade(task: dict[str, Any], result: AgentResult, spans: pa.Table) -> dict[str, float]:
    """The rewards that the attempt gave itself as a whole, the last of each name.

    Without one called "reward" the attempt has no outcome, which is the grader's failure.
    """
    held = whole_attempt(rewards(spans))
    return dict(zip(held["name"].to_pylist(), held["value"].to_pylist(), strict=True))
