"""The learner as actors on Ray: two ranks equal one, and what goes wrong says so."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import ray
import torch
from killing import kill_and_wait
from learner_support import to_table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_ray.algorithms import LossConfig
from lightning_ray.errors import InfrastructureError, PartLostError, UserError
from lightning_ray.learner import LearnerConfig, LearnerGroup
from lightning_ray.learner.worker import LearnerWorker
from lightning_ray.policies.handover import Checksum, Way

CONFIG = LearnerConfig(
    dtype="fp32",
    learning_rate=0.5,
    adam_epsilon=1.0,
    num_threads=1,
    tokens_per_row=30,
    start_timeout_s=240,
    # NCCL wants a GPU of its own for each rank.
    num_gpus=1.0 if torch.cuda.device_count() > 1 else 0.0,
)
LOSS = LossConfig(epsilon_low=0.9, epsilon_high=5.0)
TIMEOUT_S = 120.0


def batch():
    random = np.random.default_rng(11)
    rows = []
    for length in (9, 14, 21, 5, 17):
        tokens = [1, 2, 3, *random.integers(0, 256, length).tolist()]
        trainable = [False] * 4 + [True] * (length - 1)
        credit = [
            float(x) if t else 0.0
            for x, t in zip(random.normal(size=len(tokens)), trainable, strict=True)
        ]
        rows.append({"token_ids": tokens, "trainable": trainable, "advantages": credit})
    return to_table(rows)


def parameters(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize(
    "zero_stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))]
)
def test_two_ranks_take_the_step_of_one_and_resume_in_new_processes(
    ray_cluster, model_dir, tmp_path, zero_stage
):
    config = dataclasses.replace(CONFIG, num_ranks=2, zero_stage=zero_stage)
    one = LearnerWorker(dataclasses.replace(config, num_ranks=1), str(model_dir), rank=0)
    one.setup(*one.address())
    reference = ray.put(batch())
    group = LearnerGroup(config, model_dir, f"two-{zero_stage}")
    try:
        reports = [group.step(reference, LOSS, TIMEOUT_S)]
        saved = group.save_checkpoint(tmp_path / "step-1", {"cursor": 1}, TIMEOUT_S)
        reports.append(group.step(reference, LOSS, TIMEOUT_S))
        logprobs = group.logprobs(reference, TIMEOUT_S)
        published = group.publish(tmp_path / "v1", TIMEOUT_S)
        with pytest.raises(FileExistsError, match="never overwritten"):
            group.publish(tmp_path / "v1", TIMEOUT_S)
    finally:
        group.stop()
    for report in reports:
        assert report.rows == 3  # so that the second rank also runs an empty row
        assert_reports_equal(one.step(batch(), LOSS), report)
        if report.step == 1:
            one.save_checkpoint(str(tmp_path / "alone-1"), {"cursor": 1})
    for mine, other in zip(logprobs, one.logprobs(batch()), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-3)
    one.publish(str(tmp_path / "v1-alone"))
    alone_weights = parameters(tmp_path / "v1-alone")
    for name, weight in parameters(published).items():
        assert (weight - alone_weights[name]).abs().max().item() < 1e-4, name

    resumed = LearnerGroup(config, model_dir, f"resumed-{zero_stage}")
    try:
        # What one rank saved, two go on from, and the other way round.
        assert resumed.load_checkpoint(tmp_path / "alone-1", TIMEOUT_S) == {"cursor": 1}
        assert same_step(resumed.step(reference, LOSS, TIMEOUT_S), reports[1])
        assert resumed.load_checkpoint(saved, TIMEOUT_S) == {"cursor": 1}
        assert resumed.step(reference, LOSS, TIMEOUT_S).step == 2
        resumed.publish(tmp_path / "v1-resumed", TIMEOUT_S)
    finally:
        resumed.stop()
    resumed_weights = parameters(tmp_path / "v1-resumed")
    for name, weight in parameters(published).items():
        assert (weight - resumed_weights[name]).abs().max().item() == 0, name
    assert one.load_checkpoint(str(saved)) == {"cursor": 1}
    assert same_step(one.step(batch(), LOSS), reports[1])
    assert not list(tmp_path.glob(".*"))


def assert_reports_equal(one, other):
    alone, together = dataclasses.asdict(one), dataclasses.asdict(other)
    assert alone.pop("skipped") is together.pop("skipped") is None
    for name in alone.keys() - {"seconds"}:
        assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name


def same_step(one, other):
    return (one.step, one.loss, one.grad_norm) == (
        other.step,
        pytest.approx(other.loss, rel=1e-4),
        pytest.approx(other.grad_norm, rel=1e-4),
    )


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_ranks_with_adapter_critic_and_reference_take_the_steps_of_one(
    ray_cluster, model_dir, tmp_path, zero_stage
):
    loss = dataclasses.replace(
        LOSS,
        kl=dataclasses.replace(LOSS.kl, coefficient=0.1),
        critic=dataclasses.replace(LOSS.critic, coefficient=0.5),
        entropy_coefficient=0.01,
    )
    config = dataclasses.replace(
        CONFIG,
        num_ranks=2,
        zero_stage=zero_stage,
        critic_rate=2.0,
        lora=dataclasses.replace(CONFIG.lora, rank=4),
    )
    one = LearnerWorker(dataclasses.replace(config, num_ranks=1), str(model_dir), rank=0)
    one.setup(*one.address())
    reference = ray.put(batch())
    group = LearnerGroup(config, model_dir, f"all-{zero_stage}")
    try:
        reports = [group.step(reference, loss, TIMEOUT_S)]
        saved = group.save_checkpoint(tmp_path / "step-1", {}, TIMEOUT_S)
        reports += [group.step(reference, loss, TIMEOUT_S) for _ in range(2)]
    finally:
        group.stop()
    assert abs(reports[2].loss - reports[0].loss) > 1e-3
    for report in reports:
        assert_reports_equal(one.step(batch(), loss), report)
    one.load_checkpoint(str(saved))
    assert same_step(one.step(batch(), loss), reports[1])


def test_what_goes_wrong_in_an_actor_is_told_in_one_line(ray_cluster, model_dir, tmp_path):
    group = LearnerGroup(CONFIG, model_dir, "faults")
    try:
        with pytest.raises(UserError, match="no learner checkpoint"):
            group.load_checkpoint(tmp_path / "nowhere", TIMEOUT_S)
        group.save_checkpoint(tmp_path / "step-0", {}, TIMEOUT_S)
        state = json.loads((tmp_path / "step-0" / "state.json").read_text())
        state["learner"]["zero_stage"] = 2
        (tmp_path / "step-0" / "state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match=r"learner\.zero_stage"):
            group.load_checkpoint(tmp_path / "step-0", TIMEOUT_S)
        state["learner"] |= {"zero_stage": CONFIG.zero_stage, "num_ranks": 2}
        (tmp_path / "step-0" / "state.json").write_text(json.dumps(state))
        shutil.rmtree(tmp_path / "step-0" / "learner")
        with pytest.raises(UserError, match="another number of ranks"):
            group.load_checkpoint(tmp_path / "step-0", TIMEOUT_S)
        with pytest.raises(InfrastructureError, match="waited 0 s for the learner's step"):
            group.step(ray.put(batch()), LOSS, 0.0)
        kill_and_wait(group._workers[0])
        with pytest.raises(InfrastructureError, match="lost"):
            group.logprobs(ray.put(batch()), TIMEOUT_S)
    finally:
        group.stop()
    with pytest.raises(InfrastructureError, match="stopped"):
        group.logprobs(ray.put(batch()), TIMEOUT_S)


def test_an_actor_whose_memory_was_needed_is_a_lost_one(monkeypatch):
    def get(*_, **__):
        raise ray.exceptions.OutOfMemoryError("1 worker was killed: the node is low on memory")

    group = LearnerGroup.__new__(LearnerGroup)
    group.lost = False
    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(PartLostError, match="lost during its step: 1 worker was killed"):
        group._get([], 1.0, "its step")
    assert group.lost


def test_a_model_folder_that_cannot_work_starts_no_actor(ray_cluster, tmp_path):
    before = len(ray.util.list_named_actors())
    with pytest.raises(UserError, match="does not exist"):
        LearnerGroup(CONFIG, tmp_path / "nowhere", "no-model")
    with pytest.raises(UserError, match="fp16"):
        LearnerGroup(dataclasses.replace(CONFIG, dtype="fp16"), tmp_path, "no-dtype")
    assert len(ray.util.list_named_actors()) == before


def test_a_cluster_without_room_is_named_after_the_timeout(ray_cluster, model_dir):
    greedy = dataclasses.replace(CONFIG, num_cpus=64.0, start_timeout_s=2.0)
    with pytest.raises(InfrastructureError, match=r"64\.0 CPUs"):
        LearnerGroup(greedy, model_dir, "greedy")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_group_on_a_share_of_a_gpu_learns_and_hands_over(ray_cluster, model_dir, tmp_path):
    config = LearnerConfig(
        dtype="auto", learning_rate=1e-2, num_gpus=0.5, compile=True, tokens_per_row=256
    )
    reference = ray.put(batch())
    group = LearnerGroup(config, model_dir, "gpu")
    try:
        before = group.logprobs(reference, TIMEOUT_S)
        reports = [group.step(reference, LOSS, TIMEOUT_S) for _ in range(2)]
        handed = group.hand_over(tmp_path / "v1", Way.shared_memory, TIMEOUT_S)
        group.settle(TIMEOUT_S)
        after = group.logprobs(reference, TIMEOUT_S)
    finally:
        group.stop()
    assert [report.skipped for report in reports] == [None, None]
    assert np.abs(np.concatenate(after) - np.concatenate(before)).max() > 1e-3
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "v1")
    assert published.dtype == torch.bfloat16
    checksum = Checksum()
    for name, tensor in load_file(tmp_path / "v1/model.safetensors").items():
        checksum.add(name, tensor)
    assert checksum.hexdigest() == handed.digest
