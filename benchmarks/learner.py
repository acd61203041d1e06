"""`make bench-learner`: a step of our learner against TRL's GRPO step, on the same batch.

    make bench-learner
    make bench-learner ARGS="--only shared_prompt --rounds 5"

Same model, batch and type, alternating in one run; both give the same gradient, which is checked.
What each claim measures is in docs/benchmarks.md. Timings never make it fail.
"""

import statistics
import sys
from functools import partial
from typing import Any

from lightning_ray.cluster import quiet_environment

quiet_environment()

from benchmarks import learner_batches, report  # noqa: E402
from benchmarks.bench import Bench, Benchmark  # noqa: E402
from benchmarks.peer import Helper, Peer, our_helper  # noqa: E402
from benchmarks.peer_environment import peer_python  # noqa: E402
from benchmarks.report import Claim  # noqa: E402
from lightning_ray.learner import LearnerConfig  # noqa: E402
from lightning_ray.learner.deepspeed_settings import resolved_dtype  # noqa: E402
from lightning_ray.policies.models import resolve_model  # noqa: E402

THREADS = 2
STEPS = {"shared_prompt": 2, "multi_turn": 1, "nothing_shared": 2}
"""Steps of one measurement; the peer takes minutes for one of several turns."""
SAME_GRADIENT = 0.02
"""Relative difference of the two norms; the types compute with eight bits of mantissa or more."""

CLAIMS = {
    "shared_prompt": Claim("shared_prompt", "tokens/s", 4),
    "multi_turn": Claim("multi_turn", "tokens/s", 8),
    "nothing_shared": Claim("nothing_shared", "tokens/s", 1),
}
MEMORY = Claim("memory", "peak MB; ratio: ours over the peer's", 1, cost=True)
MATMUL_SHARE = Claim("matmul_share", "of the rate of a matrix product", 0.4)

Measured = dict[str, Any]


def sides(bench: Bench, name: str) -> tuple[Helper, Helper]:
    """Our learner and the peer's, each in processes of this part alone, for their memory."""
    folder = str(resolve_model("embedded"))
    arguments = (folder, resolved_dtype(LearnerConfig()), str(THREADS))
    ours = bench.helper(f"ours {name}", lambda: our_helper("learner_side", *arguments))

    def make() -> Helper:
        return Peer(peer_python("trl", bench.say), "trl_step.py", *arguments)

    peer = bench.helper(f"trl {name}", make)
    bench.packages["trl"] = peer.ready
    return ours, peer


def compare(bench: Bench, name: str) -> tuple[list[Measured], list[Measured]]:
    """The two on one batch, as often as there are rounds, after one step to warm up."""
    work = learner_batches.WORK[name]()
    ours, peer = sides(bench, name)
    about_ours = {"do": "step", "sequences": work.sequences}
    about_peer = {"rows": work.rows, "rows_at_a_time": work.rows_at_a_time}
    first, theirs = ours.ask(**about_ours, repeat=1), peer.ask(**about_peer, repeat=1)
    apart = abs(first["grad_norm"] / theirs["grad_norm"] - 1)
    if apart > SAME_GRADIENT:
        raise RuntimeError(
            f"{name}: the gradients differ, norms {first['grad_norm']} and {theirs['grad_norm']}"
        )

    def rate(measured: Measured) -> float:
        return work.tokens * STEPS[name] / float(measured["seconds"])

    measured = bench.alternate(
        name,
        "tokens/s",
        {
            "ours": partial(ours.ask, **about_ours, repeat=STEPS[name]),
            "peer": partial(peer.ask, **about_peer, repeat=STEPS[name]),
        },
        rate,
    )
    rates = {side: [rate(one) for one in many] for side, many in measured.items()}
    bench.results.append(report.compared(CLAIMS[name], rates["ours"], rates["peer"]))
    return measured["ours"], measured["peer"]


def bench_shared(bench: Bench) -> None:
    """8 samples that share their prompt."""
    compare(bench, "shared_prompt")
    bench.end_helpers()


def bench_turns(bench: Bench) -> None:
    """Rollouts of 8 turns; the peak memory of both is that of this part."""
    ours, peer = compare(bench, "multi_turn")
    mine, theirs = ours[-1]["peak_mb"], peer[-1]["peak_mb"]
    bench.results.append(report.Result("memory", mine, theirs, mine / theirs, MEMORY.unit))
    bench.end_helpers()


def bench_nothing_shared(bench: Bench) -> None:
    """8 samples that share nothing: full rows, and how much of the machine they use."""
    ours, _ = compare(bench, "nothing_shared")
    helper, _ = sides(bench, "nothing_shared")
    rates = [helper.ask(do="matmul")["flops"] for _ in range(3)]
    weights = matrix_parameters()
    # Forward and backward of every weight that multiplies: 2 and 4 operations a token.
    operations = 6 * weights * ours[0]["computed"] * STEPS["nothing_shared"]
    shares = [operations / one["seconds"] / statistics.median(rates) for one in ours]
    bench.facts["matmul_flops"] = rates
    bench.results.append(report.alone(MATMUL_SHARE, statistics.median(shares)))


def matrix_parameters() -> int:
    """Weights of the model's layers that are matrices; embedding and head are left out.

    So the share is rather too small: attention's own products, and the head on the positions that
    need it, are work as well.
    """
    from safetensors import safe_open

    total = 0
    with safe_open(resolve_model("embedded") / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()
            if len(shape) == 2 and ".layers." in name:
                total += shape[0] * shape[1]
    return total


LEARNER = Benchmark(
    name="learner",
    about=__doc__.splitlines()[0],
    claims=[*CLAIMS.values(), MEMORY, MATMUL_SHARE],
    parts={
        "shared_prompt": bench_shared,
        "multi_turn": bench_turns,
        "nothing_shared": bench_nothing_shared,
    },
    packages=["torch", "deepspeed", "transformers"],
    room=4 * 10**9,
    object_store_mib=128,
)

if __name__ == "__main__":
    sys.exit(LEARNER.main())
