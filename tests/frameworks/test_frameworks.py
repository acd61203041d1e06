"""Every example of `examples/frameworks`, as a rollout on the real model.

What must hold of each: it ends well in its own environment; what was recorded is, token for token,
what the engine's worker held; its role is the model name that it asked for; its tools were seen by
the model, and called where the framework can demand that; and the learner takes a step on it.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from frameworks_support import Example, Seen, Stack, make_environment, running_stack, tokens_of
from tokenizers import Tokenizer

from lightning_ray.algorithms import LossConfig
from lightning_ray.rollouts import RolloutStatus
from lightning_ray.trajectories import build_sequences, rebuild_trees, with_advantages

pytestmark = [pytest.mark.timeout(1500), pytest.mark.frameworks]

MESSAGES = ("/v1/messages",)
RESPONSES = ("/v1/responses",)
EXAMPLES = [
    Example("curl", "agent.sh"),
    Example("node", "agent.mjs", streamed=True),
    Example("openai"),
    Example("openai", "stream.py", streamed=True),
    Example("openai", "responses.py", paths=RESPONSES, streamed=True),
    Example("anthropic", paths=MESSAGES, roles=("claude-haiku-4-5",)),
    Example("anthropic", "stream.py", paths=MESSAGES, roles=("claude-haiku-4-5",), streamed=True),
    Example("langgraph"),
    Example("openai_agents", paths=RESPONSES),
    Example(
        "two_agents",
        paths=RESPONSES,
        roles=("gpt-4o-mini", "gpt-4o"),
        tools=("transfer_to_mathematician", "add"),
    ),
    Example("pydantic_ai", paths=RESPONSES),
    Example("mcp"),
    Example("litellm", streamed=True),
    Example("smolagents", tools=("add", "final_answer"), tool_role=False),
    Example("dspy", tools=("add", "submit"), tool_role=False),
    Example("autogen", streamed=True, must_call=False),
    Example("crewai", must_call=False),
]
"""What `make test-frameworks` runs."""

WANTED = os.environ.get("FRAMEWORKS", "").split()
"""Names of examples; all where there is none."""


@pytest.fixture(scope="session")
def importable_witness() -> Iterator[None]:
    """The witness can be imported in every process of Ray, which starts after this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def stack(
    importable_witness: None,
    ray_cluster: None,
    real_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    with running_stack(real_model, tmp_path_factory.mktemp("frameworks")) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(real_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(real_model / "tokenizer.json"))


@pytest.mark.parametrize(
    "example",
    [example for example in EXAMPLES if not WANTED or example.name in WANTED],
    ids=lambda example: example.id,
)
def test_a_framework_is_run_recorded_exactly_and_learnt_from(
    example: Example, stack: Stack, tokenizer: Tokenizer
) -> None:
    if reason := make_environment(example.name):
        pytest.skip(reason)
    seen = stack.run(example)
    for record in seen.records:
        outcome = record.outcome
        assert record.status is RolloutStatus.SUCCEEDED, f"{record.attempts}: {outcome}"
    continued = recorded_tokens_are_those_of_the_worker(seen)
    calls = seen.calls()
    assert {call["name"] for call in calls} == set(example.paths)
    assert {call["role"] for call in calls} == set(example.roles)
    assert {call["policy"] for call in calls} == {stack.config.policy.name}
    assert any(line["streamed"] for line in seen.witnessed) == example.streamed
    tools_reach_the_model(example, seen, tokenizer)
    the_learner_takes_a_step(stack, seen, example.must_call)
    sampled = sum(len(call["logprobs"]) for call in calls)
    numbers = f"{len(calls)} calls, {continued} continue another, {sampled} sampled tokens"
    called = Counter(c["name"] for _, reply in seen.exchanges() for c in reply["tool_calls"])
    seconds = max(record.outcome.seconds for record in seen.records if record.outcome)
    print(f"{example.id}: {numbers}, tools called {dict(called)}, {seconds:.1f} s")


def recorded_tokens_are_those_of_the_worker(seen: Seen) -> int:
    """Every call's tokens, put together again from what the store keeps of it.

    Returns how many calls exactly continue another one.
    """
    trees, inexact = rebuild_trees(seen.spans)
    assert inexact == {}
    assert {tree.attempt_id for tree in trees} >= set(seen.attempts)
    recorded: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for tree in trees:
        for call in tree.calls:
            tokens, prompt = call.tokens.tolist(), call.prompt_length
            recorded[tuple(tokens[:prompt]), tuple(tokens[prompt:])] += 1
            assert np.isfinite(call.logprobs).all() and len(call.logprobs)
    assert recorded == tokens_of(seen.witnessed)
    return sum(parent is not None for tree in trees for parent in tree.parents)


def tools_reach_the_model(example: Example, seen: Seen, tokenizer: Tokenizer) -> None:
    """The door saw them offered, the worker's prompts name them, and what was forced was called."""
    exchanges = seen.exchanges()
    assert len(exchanges) == len(seen.calls())
    offered = {_name(tool) for request, _ in exchanges for tool in request.get("tools", ())}
    assert offered >= set(example.tools), offered
    prompts = [tokenizer.decode(line["prompt"]) for line in seen.witnessed]
    for tool in example.tools or ("add",):
        assert any(tool in prompt for prompt in prompts), tool
    if example.must_call:
        called = [call["name"] for _, reply in exchanges for call in reply["tool_calls"]]
        assert len(called) >= len(seen.records) and set(called) <= offered, called
        if example.tool_role:
            assert any("tool_response" in prompt for prompt in prompts)


def the_learner_takes_a_step(stack: Stack, seen: Seen, forced: bool) -> None:
    """One run is credited against the other, whatever they were worth."""
    groups = dict.fromkeys(seen.attempts, "group")
    sequences, report = build_sequences(seen.spans, groups, stack.config.policy.name)
    assert report.inexact == {} and report.empty == ()
    credit = {attempt: 1.0 if place % 2 else -1.0 for place, attempt in enumerate(groups)}
    batch = ray.put(with_advantages(sequences, credit))
    step = stack.parts.learners[stack.config.policy.name].step(batch, LossConfig(), 300)
    assert step.skipped is None
    assert step.sampled_tokens == report.trainable_tokens > 0
    assert step.grad_norm > 0
    # The same model computed the same tokens. Where a call was forced, the engine sampled among
    # what the tool's grammar allowed, so what it recorded is the larger; wrong tokens would be
    # several nats off.
    assert step.logprob_difference < 0.05, step
    assert step.logprob_abs_difference < (1.5 if forced else 0.1), step


def _name(tool: dict) -> str:
    """A tool's name in any of the protocols."""
    return tool.get("name") or tool.get("function", {}).get("name", "")
