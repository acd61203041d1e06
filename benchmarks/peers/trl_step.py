"""TRL's GRPO step in TRL's own environment, told line by line what to do.

    .bench/trl/bin/python benchmarks/peers/trl_step.py MODEL_DIR DTYPE THREADS

A step is what its trainer does with a batch once it is generated: the loss of each micro-batch by
`GRPOTrainer`, backward, clipping, its optimiser's step. Answers {"rows": [...], "rows_at_a_time":
N, "repeat": N} with the seconds of the steps together, the norm of the first gradient, and the most
memory that the process ever had.
"""

import json
import os
import resource
import sys
import tempfile
import time
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = sys.argv[3]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}

import torch  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

PAD = 0


def make_trainer(folder: str, dtype: str) -> GRPOTrainer:
    """A trainer of the model in a folder; nothing is generated, so its rewards are never asked."""
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        fp16=False,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=64,
        beta=0.0,
        loss_type="dapo",
        learning_rate=1e-7,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        model_init_kwargs={"dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype]},
    )
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=lambda **_: [0.0],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 8),
    )
    trainer.model.train()
    trainer.create_optimizer()
    return trainer


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows as its trainer has them after generation: prompts padded left, answers right."""
    widest = max(len(row["prompt"]) for row in rows)
    longest = max(len(row["answer"]) for row in rows)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    }
    for row in rows:
        prompt, answer = row["prompt"], row["answer"]
        left, right = widest - len(prompt), longest - len(answer)
        columns["prompt_ids"].append([PAD] * left + prompt)
        columns["prompt_mask"].append([0] * left + [1] * len(prompt))
        columns["completion_ids"].append(answer + [PAD] * right)
        columns["completion_mask"].append([1] * len(answer) + [0] * right)
    found = {name: torch.tensor(values) for name, values in columns.items()}
    return found | {"advantages": torch.tensor([row["credit"] for row in rows])}


def step(trainer: GRPOTrainer, request: dict[str, Any]) -> dict[str, Any]:
    """Some steps on one batch."""
    at_a_time = request["rows_at_a_time"]
    norms = []
    begin = time.perf_counter()
    for _ in range(request["repeat"]):
        whole = padded(request["rows"])
        parts = len(request["rows"]) // at_a_time
        trainer.current_gradient_accumulation_steps = parts
        trainer.args.steps_per_generation = parts
        for number in range(parts):
            place = slice(number * at_a_time, (number + 1) * at_a_time)
            part: dict[str, Any] = {name: value[place] for name, value in whole.items()}
            part["num_items_in_batch"] = whole["completion_mask"].sum()
            trainer._compute_loss(trainer.model, part).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        norms.append(float(norm))
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"seconds": seconds, "grad_norm": norms[0], "peak_mb": peak}


def main() -> None:
    """Answers requests until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(int(sys.argv[3]))
    trainer = make_trainer(sys.argv[1], sys.argv[2])
    print(json.dumps({"ready": trl.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(step(trainer, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
