"""`make bench-algorithms`: what every algorithm makes of the default experiment in a short run.

    make bench-algorithms
    make bench-algorithms ARGS="--only grpo rloo --seeds 1"

Six steps of half the tasks each, with the loss and the credit that the algorithm is published
with; held-out score before and after, three seeds. It takes hours, and goes on where it was
stopped. No score makes it fail.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from lightning_ray.cluster import quiet_environment

quiet_environment()

from benchmarks import report  # noqa: E402
from benchmarks.grid import Grid, Ran  # noqa: E402
from benchmarks.report import Claim, Result  # noqa: E402

STEPS = int(os.environ.get("BENCH_STEPS", "6"))
NAMES = (
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "rloo",
    "ppo",
    "reinforce_pp",
    "reinforce_pp_baseline",
)
CLAIMS = {
    name: Claim(f"improved_{name}", "held-out score; ratio: after over before", 1.0)
    for name in NAMES
}


def results(done: Mapping[str, Sequence[Ran]]) -> list[Result]:
    """The medians of the seeds, after over before."""
    return [
        report.compared(
            CLAIMS[name],
            [ran["heldout"] for ran in runs],
            [ran["heldout_before"] for ran in runs],
        )
        for name, runs in done.items()
    ]


ALGORITHMS = Grid(
    name="algorithms",
    about=__doc__.splitlines()[0],
    common=[
        f"training.steps={STEPS}",
        f"training.checkpoint_every={STEPS}",
        "training.tasks_per_step=4",
        "learner.learning_rate=2e-5",
    ],
    cells={name: [f"algorithm={name}"] for name in NAMES},
    claims=list(CLAIMS.values()),
    results=results,
)

if __name__ == "__main__":
    sys.exit(ALGORITHMS.main())
