"""Weights in a GPU's memory: another process reads there what this one wrote."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from learner_support import HAS_GPU
from safetensors.torch import load_file
from test_learner_worker import LOSS, on_policy, samples, start

from lightning_ray.errors import InfrastructureError
from lightning_ray.learner.config import LoraConfig
from lightning_ray.policies.gpu_memory import GpuMemory, opened, place
from lightning_ray.policies.handover import Checksum, Way

on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")

READER = """
import json, sys
import torch
from lightning_ray.policies.gpu_memory import GpuWeights, opened
from lightning_ray.policies.handover import Checksum

for line in sys.stdin:
    about = json.loads(line)
    about["handle"] = bytes.fromhex(about["handle"])
    checksum, sums = Checksum(), {}
    with opened(GpuWeights(**about)) as weights:
        for name, tensor in weights:
            checksum.add(name, tensor)
            sums[name] = float(tensor.float().sum())
    print(json.dumps([checksum.hexdigest(), sums]), flush=True)
"""


@pytest.fixture
def read():
    """What another process finds in memory that is shared with it: a digest, and sums."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(weights):
        about = asdict(weights) | {"handle": weights.handle.hex()}
        process.stdin.write(json.dumps(about) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait(30)


def checksum_of(tensors):
    checksum = Checksum()
    for name, tensor in tensors.items():
        checksum.add(name, tensor)
    return checksum.hexdigest()


@on_gpu
def test_another_process_reads_what_was_written_last(read):
    memory = GpuMemory()
    first = {
        "a": torch.arange(7, dtype=torch.float32),
        "b": torch.full((3, 5), 2.0, dtype=torch.bfloat16, device="cuda"),
        "c": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.ones(0, 4),
    }
    digest, there = memory.write(first)
    assert digest == checksum_of(first)
    assert read(there) == [digest, {"a": 21.0, "b": 30.0, "c": 3.0, "none": 0.0}]
    # Of the same size in the same memory; then more.
    second = {name: tensor + 1 for name, tensor in first.items()}
    digest, again = memory.write(second)
    assert again.handle == there.handle
    assert read(again) == [digest, {"a": 28.0, "b": 45.0, "c": 6.0, "none": 0.0}]
    digest, larger = memory.write({"large": torch.ones(1000, 1000, device="cuda")})
    assert read(larger) == [digest, {"large": 1e6}]
    memory.free()


@on_gpu
def test_a_gpu_that_is_not_seen_is_named():
    memory = GpuMemory()
    _, there = memory.write({"a": torch.ones(3)})
    with pytest.raises(InfrastructureError, match="GPU elsewhere, which this process does not"):
        with opened(replace(there, gpu="elsewhere")):
            pass
    memory.free()


@on_gpu
@pytest.mark.parametrize(("rank", "zero_stage"), [(0, 1), (4, 1), (0, 3)])
def test_a_learner_hands_over_in_the_gpus_memory_and_writes_the_folder(
    model_dir, tmp_path, read, rank, zero_stage
):
    lora = LoraConfig(rank=rank, alpha=8.0)
    worker = start(model_dir, dtype="bf16", lora=lora, zero_stage=zero_stage)
    for number in (1, 2):
        assert worker.step(on_policy(worker, samples()), LOSS).skipped is None
        target = tmp_path / f"v{number}"
        handed = worker.hand_over(str(target), Way.gpu_memory)
        assert handed.gpu is not None and not handed.memory
        digest, sums = read(handed.gpu)
        assert digest == handed.digest
        worker.settle(60)
        written = load_file(target / "model.safetensors")
        if rank:
            assert all(".lora_" in name for name in sums) and handed.base == str(model_dir)
        else:
            assert checksum_of(written) == digest
        worker.publish(str(tmp_path / f"published-{number}"))
        published = load_file(tmp_path / f"published-{number}/model.safetensors")
        assert written.keys() == published.keys()
        for name, tensor in published.items():
            torch.testing.assert_close(written[name], tensor, rtol=1e-2, atol=1e-3)


def test_a_process_without_a_gpu_is_at_no_place(ray_cluster):
    assert place() == ""
