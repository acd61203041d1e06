"""`make bench-learner-gpu`: the learner's step on a GPU, in tokens a second and of what it can do.

    make bench-learner-gpu
    make bench-learner-gpu ARGS="--only small --steps 5"

Models of the shapes of SmolLM2-135M and of Qwen2.5-1.5B with random weights: what a step costs does
not depend on them. There is no peer here; the same batch with attention over a mask of all pairs,
and without compiled layers (`dense`), says what these are worth. Then the weights are handed over
to another process by the GPU's memory and by the host's. What is counted is in docs/benchmarks.md.
Timings never make it fail.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "large": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}
VARIANTS = ("compiled", "dense")
ROW = {"small": 32768, "large": 8192}
"""Tokens in a row. A small model needs long ones to have a GPU do more than start kernels; with all
pairs in memory there is no room for those."""
STEP_LIMIT_S = 600.0


def sequences(kind: str) -> list[dict[str, Any]]:
    """Sequences of a batch: `tokens`, `trainable`, `credit`, as `learner_side.table_of` takes them.

    nothing_shared: 64 of 1024 tokens, half of them learnt. shared_prompt: 16 prompts of 1024 with
    8 answers of 256 each. multi_turn: 32 rollouts of 8 turns of 256 tokens, a quarter learnt.
    """
    random = np.random.default_rng(5)

    def tokens(count: int) -> list[int]:
        found: list[int] = random.integers(100, 40_000, count).tolist()
        return found

    found = []
    if kind == "multi_turn":
        for _ in range(32):
            trainable = ([False] * 192 + [True] * 64) * 8
            found.append({"tokens": tokens(2048), "trainable": trainable})
    else:
        prompts, samples, before, after = (
            (64, 1, 512, 512) if kind == "nothing_shared" else (16, 8, 1024, 256)
        )
        for _ in range(prompts):
            prompt = tokens(before)
            found += [
                {"tokens": prompt + tokens(after), "trainable": [False] * before + [True] * after}
                for _ in range(samples)
            ]
    return [one | {"credit": float(random.normal())} for one in found]


KINDS = ("nothing_shared", "shared_prompt", "multi_turn")


def measure(shape: str, variant: str, steps: int, folder: str) -> dict[str, Any]:
    """One model in this process: seconds of a step on each kind of batch, and what they mean.

    The model lies in `folder` meanwhile.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.learner_side import LOSS, table_of
    from lightning_ray.learner import LearnerConfig, loading
    from lightning_ray.learner.packing import pack
    from lightning_ray.learner.worker import LearnerWorker

    size = SHAPES[shape]
    config = LearnerConfig(
        num_gpus=1.0,
        dtype="bf16",
        zero_stage=1,
        tokens_per_row=ROW[shape] if variant != "dense" else 8192,
        logits_chunk=4096,
        compile=variant == "compiled",
    )
    if variant == "dense":
        loading.use_tree_attention = lambda _model: False  # type: ignore[attr-defined]
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        about = LlamaConfig(**size, tie_word_embeddings=True, max_position_embeddings=8192)
        LlamaForCausalLM(about).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
    (Path(folder) / "tokenizer_config.json").write_text("{}")
    torch.cuda.empty_cache()
    worker = LearnerWorker(config, folder, rank=0)
    worker.setup(*worker.address())
    matrices = sum(
        parameter.numel()
        for name, parameter in worker.engine.module.named_parameters()
        if ".layers." in name and parameter.dim() == 2
    )
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "matmul_flops": matmul()}
    for kind in KINDS:
        batch = table_of(sequences(kind))
        packed = pack(batch, config.tokens_per_row, LOSS)
        width = size["hidden_size"]
        pairs = sum(int((row.position_ids + 1).sum()) for row in packed.rows)
        predicting = sum(len(row.logit_predictor) for row in packed.rows)
        operations = (
            6 * matrices * packed.distinct_tokens
            + 6 * width * size["vocab_size"] * predicting
            + 12 * width * size["num_hidden_layers"] * pairs
        )
        begin = time.perf_counter()
        first = worker.step(batch, LOSS)
        first_s = time.perf_counter() - begin
        worker.step(batch, LOSS)
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(steps):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            report = worker.step(batch, LOSS)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            if report.skipped:
                raise RuntimeError(f"{shape} {variant} {kind}: {report.skipped}")
        median = statistics.median(seconds)
        found[kind] = {
            "seconds": seconds,
            "first_s": first_s,
            "tokens_s": packed.total_tokens / median,
            "computed_tokens_s": packed.distinct_tokens / median,
            "flops": operations / median,
            "share": operations / median / found["matmul_flops"],
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "grad_norm": first.grad_norm,
            "rows": first.rows,
        }
        print(f"{shape} {variant} {kind}: {found[kind]}", file=sys.stderr, flush=True)
    found["hand_over"] = hand_overs(worker, steps)
    return found


READER = """
import json, sys, time
import torch
from lightning_ray.policies.gpu_memory import GpuWeights, opened
from lightning_ray.policies.handover import Checksum
torch.cuda.synchronize()
own = {}
for line in sys.stdin:
    about = json.loads(line)
    about["handle"] = bytes.fromhex(about["handle"])
    begin = time.perf_counter()
    with opened(GpuWeights(**about)) as weights:
        for name, tensor in weights:
            own.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
    seconds = time.perf_counter() - begin
    checksum = Checksum()
    for name, tensor in own.items():
        checksum.add(name, tensor)
    print(json.dumps([seconds, checksum.hexdigest()]), flush=True)
"""
"""A process that takes weights on from the GPU's memory into its own, as an engine does."""


def hand_overs(worker: Any, steps: int) -> dict[str, Any]:
    """Seconds in which the weights are handed over by each way, and read by another process."""
    import torch

    from lightning_ray.policies.handover import Way

    found: dict[str, Any] = {way.value: [] for way in (Way.gpu_memory, Way.shared_memory)}
    found |= {"read": [], "plain_copy": []}
    reader = subprocess.Popen(
        [sys.executable, "-c", READER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert reader.stdin is not None and reader.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        for number in range(steps):
            for way in (Way.gpu_memory, Way.shared_memory):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                handed = worker.hand_over(f"{folder}/{way}-{number}", way)
                found[way.value].append(time.perf_counter() - begin)
                if handed.gpu is not None:
                    about = asdict(handed.gpu) | {"handle": handed.gpu.handle.hex()}
                    reader.stdin.write(json.dumps(about) + "\n")
                    reader.stdin.flush()
                    seconds, digest = json.loads(reader.stdout.readline())
                    if digest != handed.digest:
                        raise RuntimeError("what was read is not what was handed over")
                    found["read"].append(seconds)
                worker.settle(300.0)
                shutil.rmtree(handed.folder)
        found["nbytes"] = handed.nbytes
        plain = torch.empty(handed.nbytes, dtype=torch.uint8, device="cuda")
        other = torch.ones_like(plain)
        for _ in range(steps):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            other.copy_(plain)
            torch.cuda.synchronize()
            found["plain_copy"].append(time.perf_counter() - begin)
    reader.stdin.close()
    reader.wait(30)
    return found


def matmul(size: int = 8192) -> float:
    """Operations a second of a product of bfloat16 matrices of normal random numbers."""
    import torch

    one, other = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    for _ in range(3):
        one @ other
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        one @ other
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - begin)


def main() -> int:
    """Each model and variant in a process of its own; a table, and results/learner_gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SHAPES, help="one shape of model alone")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each batch")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    chosen = parser.parse_args()
    if chosen.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(*chosen.one, chosen.steps, folder)))
        return 0
    facts: dict[str, Any] = {}
    results: list[dict[str, Any]] = []
    print(f"{'model':8}{'variant':10}{'batch':16}{'tokens/s':>12}{'computed':>12}", end="")
    print(f"{'TFLOP/s':>9}{'share':>7}{'GB':>6}{'first s':>9}")
    shapes = [chosen.only] if chosen.only else list(SHAPES)
    for variant, shape in itertools.product(VARIANTS, shapes):
        command = [sys.executable, "-m", "benchmarks.learner_gpu", "--one", shape, variant]
        done = subprocess.run(
            [*command, "--steps", str(chosen.steps)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=STEP_LIMIT_S,
            check=False,
        )
        if done.returncode:
            print(f"{shape} {variant} failed", file=sys.stderr)
            continue
        facts[f"{shape} {variant}"] = found = json.loads(done.stdout.splitlines()[-1])
        results += shown(shape, variant, found)
        # At once: a machine that is lent may be gone before the next one is measured.
        chosen.results.mkdir(parents=True, exist_ok=True)
        for name, content in (("learner_gpu", results), ("learner_gpu.facts", facts)):
            (chosen.results / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0 if facts else 1


def shown(shape: str, variant: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Prints the lines of one model; returns them as results."""
    results = []
    for kind in KINDS:
        one = found[kind]
        print(
            f"{shape:8}{variant:10}{kind:16}{one['tokens_s']:12,.0f}"
            f"{one['computed_tokens_s']:12,.0f}{one['flops'] / 1e12:9.1f}"
            f"{one['share']:7.3f}{one['peak_gb']:6.1f}{one['first_s']:9.1f}",
            flush=True,
        )
        results.append(
            {
                "claim": f"{kind}_{shape}_{variant}",
                "ours": one["tokens_s"],
                "peer": None,
                "ratio": one["share"],
                "unit": "tokens/s; ratio: of the rate of a matrix product",
            }
        )
    ways = {name: one for name, one in found["hand_over"].items() if name != "nbytes"}
    medians = {name: round(1e3 * statistics.median(one), 1) for name, one in ways.items()}
    print(f"        {found['hand_over']['nbytes'] / 1e6:,.0f} MB handed over, ms: {medians}")
    return results


if __name__ == "__main__":
    sys.exit(main())
