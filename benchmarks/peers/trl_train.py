"""TRL's GRPOTrainer on the default experiment, in TRL's own environment, told what to do.

    .bench/trl/bin/python benchmarks/peers/trl_train.py MODEL_DIR DTYPE THREADS ROWS_AT_A_TIME

Answers {"tasks": [...], "heldout": [...], "steps": N, "tasks_per_step": N, "group_size": N,
"learning_rate": X, "epsilon": X, "seed": N} with the seconds of each step (generating, scoring,
learning, all that its trainer does between two of its steps), the mean reward of each, and the
score of the trained model on the held-out tasks. Messages, tool and grader are the example's own.
"""

import json
import os
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = sys.argv[3]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}

import torch  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "calculator"
MAX_TOKENS = 20
"""What the agent asks for."""

# The agent's client is not installed here, and never used.
sys.modules["openai"] = types.ModuleType("openai")
sys.modules["openai"].OpenAI = None  # type: ignore[attr-defined]
sys.path.insert(0, str(EXAMPLE))
import agent  # noqa: E402
import grader  # noqa: E402


def reward(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
    """What the example's grader gives for what its agent would have printed."""
    found = []
    for completion, right in zip(completions, answer, strict=True):
        call = agent.CALL.fullmatch(completion[0]["content"].strip())
        line = "no tool call"
        if call is not None:
            left, sign, other = int(call[1]), call[2], int(call[3])
            line = f"calc({left} {sign} {other}) = {agent.calculate(left, sign, other)}"
        result = types.SimpleNamespace(stdout=line)
        found.append(float(grader.grade({"answer": right}, result, [])["reward"]))
    return found


def rows(tasks: list[dict[str, Any]]) -> Dataset:
    """Tasks as the trainer takes them."""
    return Dataset.from_list(
        [
            {
                "prompt": [*agent.MESSAGES, {"role": "user", "content": task["question"]}],
                "answer": task["answer"],
            }
            for task in tasks
        ]
    )


class Watch(TrainerCallback):  # type: ignore[misc]
    """When each step ended, and what it logged."""

    def __init__(self) -> None:
        self.ended = [0.0]
        self.rewards: list[float] = []
        self.lengths: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ended = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended.append(time.perf_counter())

    def on_log(self, *arguments: Any, logs: dict[str, float], **_: Any) -> None:
        if "reward" in logs:
            self.rewards.append(float(logs["reward"]))
            self.lengths.append(float(logs["completions/mean_length"]))


def train(request: dict[str, Any], at_a_time: int, folder: str) -> dict[str, Any]:
    """One run from the untrained model; `folder` is for what its trainer writes."""
    samples = request["tasks_per_step"] * request["group_size"]
    config = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        fp16=False,
        per_device_train_batch_size=at_a_time,
        gradient_accumulation_steps=samples // at_a_time,
        num_generations=request["group_size"],
        max_completion_length=MAX_TOKENS,
        temperature=1.0,
        max_steps=request["steps"],
        learning_rate=request["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta2=0.999,
        max_grad_norm=1.0,
        epsilon=request["epsilon"],
        beta=0.0,
        loss_type="dapo",
        scale_rewards="group",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=request["seed"],
        model_init_kwargs={"dtype": {"bf16": "bfloat16", "fp32": "float32"}[sys.argv[2]]},
    )
    watch = Watch()
    trainer = GRPOTrainer(
        model=sys.argv[1],
        reward_funcs=reward,
        args=config,
        train_dataset=rows(request["tasks"]),
        callbacks=[watch],
    )
    trainer.train()
    seconds = [end - begin for begin, end in zip(watch.ended, watch.ended[1:], strict=False)]
    return {
        "seconds": seconds,
        "rewards": watch.rewards[: request["steps"]],
        "answer_tokens": watch.lengths[: request["steps"]],
        "heldout": score(trainer, request["heldout"]),
    }


@torch.no_grad()
def score(trainer: GRPOTrainer, tasks: list[dict[str, Any]], at_a_time: int = 32) -> float:
    """Mean reward on the held-out tasks, one sample of each."""
    tokenizer, model = trainer.processing_class, trainer.model
    model.eval()
    total = 0.0
    for first in range(0, len(tasks), at_a_time):
        some = rows(tasks[first : first + at_a_time])
        given = tokenizer.apply_chat_template(
            list(some["prompt"]),
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_dict=True,
        )
        said = model.generate(
            **given, max_new_tokens=MAX_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
        texts = tokenizer.batch_decode(
            said[:, given["input_ids"].shape[1] :], skip_special_tokens=True
        )
        total += sum(reward([[{"content": text}] for text in texts], list(some["answer"])))
    return total / len(tasks)


def main() -> None:
    """Answers requests until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps({"ready": trl.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            found = train(json.loads(line), int(sys.argv[4]), folder)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
