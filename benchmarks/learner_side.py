"""Our learner in a process of its own, told line by line what to do.

    python -m benchmarks.learner_side MODEL_DIR DTYPE THREADS

Answers {"do": "step", "sequences": [...], "repeat": N} with the seconds of N steps together, the
norm of the first one's gradient, and the most memory that the process ever had; {"do": "matmul"}
with how many floating-point operations a second a matrix product reaches here.
"""

import json
import os
import resource
import sys
import time
from typing import Any

THREADS = sys.argv[3] if len(sys.argv) > 3 else "2"
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = THREADS

import pyarrow as pa  # noqa: E402

from lightning_ray.algorithms import LossConfig  # noqa: E402
from lightning_ray.cluster import quiet_environment  # noqa: E402
from lightning_ray.learner import LearnerConfig  # noqa: E402
from lightning_ray.learner.worker import LearnerWorker  # noqa: E402
from lightning_ray.trajectories import SEQUENCE_SCHEMA  # noqa: E402

LOSS = LossConfig(old="current")
"""The peer's ratio is 1 as well when it learns from a batch once."""


def table_of(sequences: list[dict[str, Any]]) -> pa.Table:
    """Sequences as the learner takes them."""
    rows = []
    for number, one in enumerate(sequences):
        trainable = one["trainable"]
        rows.append(
            {
                "group_id": "g",
                "rollout_id": f"r{number}",
                "attempt_id": f"r{number}/1",
                "policy": "policy",
                "token_ids": one["tokens"],
                "trainable": trainable,
                "logprobs": [0.0] * len(trainable),
                "versions": [0 if learnt else -1 for learnt in trainable],
                "calls": [0 if learnt else -1 for learnt in trainable],
                "advantages": [one["credit"] if learnt else 0.0 for learnt in trainable],
            }
        )
    return pa.Table.from_pylist(rows, schema=SEQUENCE_SCHEMA)


def step(worker: LearnerWorker, request: dict[str, Any]) -> dict[str, Any]:
    """Some steps on one batch."""
    table = table_of(request["sequences"])
    reports = []
    begin = time.perf_counter()
    for _ in range(request["repeat"]):
        reports.append(worker.step(table, LOSS))
    seconds = time.perf_counter() - begin
    if any(report.skipped for report in reports):
        raise RuntimeError(f"a step was skipped: {reports}")
    return {
        "seconds": seconds,
        "grad_norm": reports[0].grad_norm,
        "computed": reports[0].computed_tokens,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def matmul(dtype: str, size: int = 1536, seconds: float = 2.0) -> dict[str, Any]:
    """Floating-point operations a second of a product of square matrices, by torch."""
    import torch

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    one, other = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
    out = one @ other
    done, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        torch.mm(one, other, out=out)
        done += 1
    return {"flops": done * 2 * size**3 / passed}


def main() -> None:
    """Answers requests until standard input ends."""
    quiet_environment()
    answers, sys.stdout = sys.stdout, sys.stderr
    folder, dtype, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    config = LearnerConfig(dtype=dtype, learning_rate=1e-7, num_threads=threads)
    worker = LearnerWorker(config, folder, rank=0)
    worker.setup(*worker.address())
    print(json.dumps({"ready": ""}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = matmul(dtype) if request["do"] == "matmul" else step(worker, request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
