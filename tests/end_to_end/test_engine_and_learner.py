"""One engine and one learner on the real model: what is recorded, and that they agree.

The learner computes the very tokens that the engine sampled, so its logprobs under the same version
must agree with those that the engine recorded, to the rounding of bfloat16.
"""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from end_to_end.shared_engine import CHAT, SharedEngine, Stack, question
from lightning_ray.algorithms import LossConfig
from lightning_ray.cluster.processor import multiplies_bfloat16
from lightning_ray.errors import InfrastructureError
from lightning_ray.jobs.compose import compose_config
from lightning_ray.learner import LearnerGroup
from lightning_ray.policies.handover import Checksum, Way
from lightning_ray.training import TrainConfig
from lightning_ray.trajectories import trainable_counts, with_advantages

pytestmark = pytest.mark.timeout(1500)

TOLERANCE = 0.02
"""Mean absolute difference of logprobs between two computations in bfloat16."""
AGREED = TOLERANCE if multiplies_bfloat16() else 0.0005
"""The same between engine and learner, which compute in float32 where the processor has no more."""


@pytest.fixture(scope="module")
def stack(shared_engine: SharedEngine) -> Iterator[Stack]:
    """The shared engine, and a learner whose rate shows after one step."""
    config: TrainConfig = compose_config("train", TrainConfig, ["experiment=calculator"])
    config.learner.learning_rate = 2e-5
    learner = LearnerGroup(config.learner, shared_engine.base, "test")
    yield Stack(shared_engine, learner)
    learner.stop()


def test_an_engine_answers_nobody_without_its_key(stack):
    reply = httpx.post(stack.engines.urls[0] + CHAT, json=question(1), timeout=30)
    assert reply.status_code == 401


def test_recorded_tokens_are_those_of_the_reply(stack):
    reply = stack.post("ids", **question(7), return_token_ids=True, logprobs=True).json()
    (call,) = stack.spans("ids")
    sampled = reply["choices"][0]["token_ids"]
    assert call["token_ids"] == reply["prompt_token_ids"] + sampled
    told = [item["logprob"] for item in reply["choices"][0]["logprobs"]["content"]]
    assert np.allclose(call["logprobs"], told, atol=1e-6)
    assert call["version"] == stack.shared.version and call["finish_reason"] in ("stop", "length")


def test_a_reply_is_the_same_whether_streamed_or_not_and_recorded_alike(stack):
    greedy = {**question(9), "temperature": 0}
    whole = stack.post("whole", **greedy).json()["choices"][0]["message"]["content"]
    url = stack.engines.urls[0] + CHAT
    pieces = []
    with httpx.stream(
        "POST", url, headers=stack.headers("streamed"), json={**greedy, "stream": True}, timeout=60
    ) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                pieces.append(choice["delta"].get("content") or "")
    assert "".join(pieces) == whole
    (one,) = stack.spans("whole")
    (other,) = stack.spans("streamed")
    assert one["token_ids"] == other["token_ids"]
    assert np.allclose(one["logprobs"], other["logprobs"], atol=0.05)


def test_other_protocols_are_recorded_too(stack):
    greedy = {"model": "gpt-4o-mini", "temperature": 0}
    stack.post("text", "/v1/completions", prompt="1 2 3", max_tokens=5, **greedy)
    stack.post("responses", "/v1/responses", input="Say hi", max_output_tokens=16, **greedy)
    message = [{"role": "user", "content": "Say hi"}]
    stack.post("anthropic", "/v1/messages", messages=message, max_tokens=5, **greedy)
    for rollout in ("text", "responses", "anthropic"):
        (call,) = stack.spans(rollout)
        assert 0 < len(call["logprobs"]) < len(call["token_ids"])


def test_an_abandoned_stream_is_recorded_as_far_as_it_went(stack):
    body = {**question(3), "stream": True, "max_tokens": 400, "ignore_eos": True}
    url = stack.engines.urls[0] + CHAT
    with httpx.stream("POST", url, headers=stack.headers("left"), json=body, timeout=60) as reply:
        for _, line in zip(range(12), reply.iter_lines(), strict=False):
            assert line is not None
    deadline = time.monotonic() + 20
    while not (calls := stack.spans("left")) and time.monotonic() < deadline:
        time.sleep(0.1)
    (call,) = calls
    assert call["status"] == "aborted"
    assert 0 < len(call["logprobs"]) < 400
    # And nobody goes on generating for a client that went away.
    assert stack.engines.states()[0].calls_inside == 0


def test_vllms_core_waits_asleep_while_its_worker_computes(stack):
    """It would spin, and take a core that the agents or the forward pass itself need."""
    ours = psutil.Process().children(recursive=True)
    (core,) = [process for process in ours if process.name().startswith("VLLM::EngineCor")]
    before, begun = sum(core.cpu_times()[:2]), time.monotonic()
    stack.post("long", **{**question(4), "max_tokens": 80, "ignore_eos": True})
    share = (sum(core.cpu_times()[:2]) - before) / (time.monotonic() - begun)
    print(f"vLLM's core used {share:.2f} of a processor")
    assert share < 0.5


def test_a_second_turn_stores_only_what_it_adds(stack):
    first = {**question(5), "temperature": 0}
    answer = stack.post("turns", **first).json()["choices"][0]["message"]["content"]
    more = [
        *first["messages"],
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And 2 plus 3?"},
    ]
    stack.post("turns", **{**first, "messages": more})
    one, two = stack.spans("turns")
    assert two["continues"] == one["span_id"]
    assert two["prefix_tokens"] == len(one["token_ids"])
    assert len(two["token_ids"]) < len(one["token_ids"])


def test_engine_and_learner_agree_and_after_an_update_on_the_new_weights_only(stack, tmp_path):
    before = stack.sample("before", 16)
    agreed = stack.difference(before)
    print(f"mean absolute difference: {agreed:.4f} at version 0")
    assert agreed <= AGREED

    # Short answers are the good ones here, as in the example: more of those, less noise.
    lengths = trainable_counts(before)
    batch = ray.put(with_advantages(before, {a: float(n < 14) for a, n in lengths.items()}))
    for _ in range(3):
        report = stack.learner.step(batch, LossConfig(epsilon_low=1.0, epsilon_high=9.0), 300)
        assert report.skipped is None
    # The learner has moved on: it no longer agrees with what the old version sampled.
    moved = stack.difference(before)
    print(f"{moved:.4f} after three steps of the learner")
    assert moved > 2 * TOLERANCE

    folder = stack.learner.publish(tmp_path / "version-1", 120)
    stack.shared.take_on(folder)
    after = stack.sample("after", 16)
    assert {v for row in after["versions"].to_pylist() for v in row} == {-1, stack.shared.version}
    renewed = stack.difference(after)
    print(f"{renewed:.4f} at version 1")
    assert renewed <= AGREED


def test_the_prefix_cache_never_crosses_versions(stack, tmp_path):
    """The same long prompts under two versions: cached keys of the old must not answer."""

    def ask(name: str, **more: object) -> list[dict[str, float]]:
        """The likeliest first tokens of six answers, with their logprobs."""
        found = []
        for number in range(6):
            asked = question(11 + number)
            system, *turns = asked["messages"]
            body = asked | {"messages": [system, *turns[:2] * 12, *turns], "max_tokens": 1}
            body |= {"temperature": 0, "logprobs": True, "top_logprobs": 5}
            reply = stack.post(f"{name}{number}", **body, **more).json()
            (token,) = reply["choices"][0]["logprobs"]["content"]
            found.append({top["token"]: top["logprob"] for top in token["top_logprobs"]})
        return found

    def apart(ones: list[dict[str, float]], others: list[dict[str, float]]) -> float:
        pairs = zip(ones, others, strict=True)
        return float(np.mean([abs(a[t] - b[t]) for a, b in pairs for t in a.keys() & b.keys()]))

    ask("warm")
    stack.shared.take_on(stack.shared.base)
    old = ask("crossed")
    stack.shared.take_on(stack.learner.publish(tmp_path / "version-3", 120))
    new = ask("back")
    # A salt that nobody used before finds nothing in the cache.
    uncached = ask("uncached", cache_salt="never used before")
    print(f"new {apart(new, uncached):.4f}, old {apart(old, uncached):.4f} from the uncached")
    assert apart(old, uncached) > 5 * apart(new, uncached)
    assert apart(new, uncached) <= 2 * TOLERANCE


def test_an_update_reaches_an_output_head_that_shares_the_embedding(stack, tmp_path):
    """No checkpoint names such a head; a CPU multiplies by a packed copy of it."""
    asked = question(23) | {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    model = AutoModelForCausalLM.from_pretrained(stack.shared.base, dtype=torch.float32)
    model.eval()
    folder = shutil.copytree(stack.shared.base, tmp_path / "flatter")
    with torch.no_grad():
        # The blocks normalise what they read, so that this does little but halve the logits.
        model.get_output_embeddings().weight.mul_(0.5)
    model.save_pretrained(folder)
    stack.shared.take_on(folder)
    reply = stack.post("flatter", **asked, return_token_ids=True).json()
    with torch.no_grad():
        logits = model(torch.tensor([reply["prompt_token_ids"]])).logits[0, -1]
    (token,) = reply["choices"][0]["logprobs"]["content"]
    told = torch.tensor([top["logprob"] for top in token["top_logprobs"]])
    true = torch.log_softmax(logits, -1).topk(5).values
    print(f"told {told.tolist()}, true {true.tolist()}")
    assert torch.allclose(told, true, atol=0.1)


def test_a_call_stands_still_while_the_weights_change_and_each_token_has_its_version(
    stack, tmp_path
):
    """Its first tokens are the old weights', the rest the new ones', keys and values included."""
    stack.shared.take_on(stack.shared.base)
    folder = shutil.copytree(stack.shared.base, tmp_path / "flatter")
    flatter = AutoModelForCausalLM.from_pretrained(stack.shared.base, dtype=torch.bfloat16)
    with torch.no_grad():
        # Other keys and values, and other logits.
        flatter.get_output_embeddings().weight.mul_(0.5)
        flatter.model.layers[0].mlp.down_proj.weight.mul_(0.8)
    flatter.save_pretrained(folder)
    models, rounding = (
        [
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            for path in (stack.shared.base, folder)
        ]
        for dtype in (torch.float32, torch.bfloat16)
    )
    before = stack.shared.version
    body = {**question(3), "max_tokens": 120, "ignore_eos": True, "n": 2}
    abandoned = {**body, "max_tokens": 400, "stream": True, "n": 1}

    async def both() -> tuple[int, float]:
        async with httpx.AsyncClient(timeout=120) as client:
            url = stack.engines.urls[0] + CHAT
            call = asyncio.create_task(client.post(url, headers=stack.headers("amid"), json=body))
            async with client.stream(
                "POST", url, headers=stack.headers("amid-left"), json=abandoned
            ) as reply:
                lines = reply.aiter_lines()
                # The mean difference of a few tokens would say little.
                for _ in range(40):
                    await anext(lines)
                begun = time.monotonic()
                await asyncio.to_thread(stack.shared.take_on, folder)
                seconds = time.monotonic() - begun
                for _ in range(20):
                    await anext(lines)
            return (await call).status_code, seconds

    status, seconds = asyncio.run(both())
    print(f"the weights changed in {seconds:.2f} s")
    assert status == 200
    calls = stack.spans("amid")
    deadline = time.monotonic() + 20
    while not (left := stack.spans("amid-left")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left[0]["status"] == "aborted"
    for row in [*calls, *left]:
        versions = np.array(row["versions"])
        assert set(versions.tolist()) == {before, before + 1} and row["version"] == before
        assert (np.diff(versions) >= 0).all() and len(versions) == len(row["logprobs"])
        true = [_logprobs(model, row) for model in models]
        told = np.array(row["logprobs"])
        apart = [np.abs(told - one) for one in true]
        for mine, other, chosen in ((0, 1, versions == before), (1, 0, versions == before + 1)):
            # What bfloat16 makes of so flat a distribution, on any processor.
            rounded = np.abs(_logprobs(rounding[mine], row) - true[mine])
            own, others = apart[mine][chosen].mean(), apart[other][chosen].mean()
            print(
                f"{chosen.sum()} tokens: {own:.4f} from their own weights, {others:.4f} else; "
                f"{rounded[chosen].mean():.4f} in bfloat16"
            )
            assert own < max(TOLERANCE, 2 * rounded[chosen].mean()) < others / 10
    stack.shared.take_on(stack.shared.base)


def _logprobs(model: Any, row: dict[str, Any]) -> npt.NDArray[np.float32]:
    """What `model` gives the sampled tokens of a recorded call."""
    tokens = torch.tensor([row["token_ids"]])
    sampled = len(row["logprobs"])
    with torch.no_grad():
        logits = model(tokens).logits[0, -sampled - 1 : -1].float()
        chosen = torch.log_softmax(logits, -1).gather(-1, tokens[0, -sampled:, None])
    return chosen.squeeze(-1).numpy()


@pytest.mark.parametrize(
    "way",
    [
        Way.shared_memory,
        *(pytest.param(way, marks=pytest.mark.slow) for way in (Way.object_store, Way.disk)),
    ],
)
def test_weights_arrive_by_every_way_as_they_were_sent(stack, tmp_path, way):
    """The engine's logprobs are then the learner's; the folder comes, with the same weights."""
    batch = stack.sample(f"sent-{way}", 8)
    attempts = batch["attempt_id"].to_pylist()
    batch = ray.put(with_advantages(batch, {a: float(n % 2) for n, a in enumerate(attempts)}))
    assert stack.learner.step(batch, LossConfig(), 300).skipped is None
    folder, version = tmp_path / "versions" / "1", stack.shared.version + 1
    handed = stack.learner.hand_over(folder, way, 120)
    assert bool(handed.memory) is (way is not Way.disk)
    assert bool(handed.data) is (way is Way.object_store)
    stack.engines.update_weights(
        str(folder), version, handed=handed, by_store=way is Way.object_store
    )
    stack.shared.version = version
    agreed = stack.difference(stack.sample(f"arrived-{way}", 12))
    print(f"{way}: {agreed:.4f}")
    assert agreed <= AGREED
    stack.learner.settle(120)
    written, checksum = load_file(folder / "model.safetensors"), Checksum()
    for name, tensor in written.items():
        checksum.add(name, tensor)
    assert checksum.hexdigest() == handed.digest
    AutoModelForCausalLM.from_pretrained(folder)
    # Read from the folder they are the same to the engine.
    before = stack.engines.weight_digests()
    stack.shared.take_on(folder)
    assert stack.engines.weight_digests() == before


@pytest.mark.slow
@pytest.mark.parametrize("publish", ["merged", "adapter"])
def test_of_additions_only_the_factors_arrive(stack, tmp_path, publish):
    """The engine adds them to the base; its logprobs are then the learner's."""
    config: TrainConfig = compose_config("train", TrainConfig, ["experiment=calculator"])
    config.learner.learning_rate = 2e-3
    config.learner.lora.rank = 8
    config.learner.lora.publish = publish
    learner = LearnerGroup(config.learner, stack.shared.base, "additions")
    try:
        for way in (Way.shared_memory, Way.object_store, Way.disk):
            if way is Way.disk and publish == "merged":
                continue
            batch = stack.sample(f"added-{publish}-{way}", 8)
            worth = {a: float(n % 2) for n, a in enumerate(batch["attempt_id"].to_pylist())}
            batch = ray.put(with_advantages(batch, worth))
            assert learner.step(batch, LossConfig(), 300).skipped is None
            folder, version = tmp_path / way, stack.shared.version + 1
            handed = learner.hand_over(folder, way, 120)
            assert handed.base == ("" if way is Way.disk else str(stack.shared.base))
            stack.engines.update_weights(
                str(folder), version, handed=handed, by_store=way is Way.object_store
            )
            stack.shared.version = version
            sample = stack.sample(f"with-{publish}-{way}", 12)
            agreed, apart = stack.difference(sample, learner), stack.difference(sample)
            print(f"{way}: {agreed:.4f} from the learner, {apart:.4f} from another")
            assert agreed <= AGREED < apart
            learner.settle(120)
            whole = (stack.shared.base / "model.safetensors").stat().st_size
            assert handed.nbytes < whole / 10
            on_disk = sum(path.stat().st_size for path in folder.iterdir())
            assert on_disk < whole / 10 if publish == "adapter" else on_disk > whole
        # Read from the folder they are the same.
        stack.shared.take_on(folder)
        assert stack.difference(stack.sample(f"from-{publish}", 12), learner) <= AGREED
    finally:
        learner.stop()
        stack.shared.take_on(stack.shared.base)


@pytest.mark.slow
def test_weights_that_arrive_damaged_answer_nobody(stack, tmp_path):
    folder = tmp_path / "versions" / "1"
    handed = stack.learner.hand_over(folder, Way.shared_memory, 120)
    wrong = replace(handed, digest="0" * 64)
    with pytest.raises(InfrastructureError, match="did not arrive as they were sent"):
        stack.engines.update_weights(str(folder), stack.shared.version + 1, handed=wrong)
    assert stack.post("damaged", **question(5)).status_code >= 500
    stack.engines.update_weights(str(folder), stack.shared.version + 1, handed=handed)
    stack.shared.version += 1
    assert stack.post("mended", **question(5)).status_code == 200
    stack.learner.settle(120)
    stack.shared.take_on(stack.shared.base)


def test_calls_go_on_through_an_update(stack, tmp_path):
    """Calls that run or arrive while the weights change end well."""
    folder = stack.learner.publish(tmp_path / "version-5", 120)
    before = stack.shared.version

    async def both() -> list[int]:
        async with httpx.AsyncClient(timeout=120) as client:
            url = stack.engines.urls[0] + CHAT
            calls = [
                client.post(url, headers=stack.headers(f"through{i}"), json=question(i))
                for i in range(24)
            ]
            update = asyncio.to_thread(stack.shared.take_on, folder)
            replies = await asyncio.gather(*calls, update)
        return [reply.status_code for reply in replies[:-1]]

    assert asyncio.run(both()) == [200] * 24
    versions = {row["version"] for row in stack.spans(*[f"through{i}" for i in range(24)])}
    assert versions <= {before, before + 1}
