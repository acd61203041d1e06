"""`make bench-off-policy`: training on older samples, with and without correction for it.

    make bench-off-policy
    make bench-off-policy ARGS="--only 0_none 4_none 4_token_truncate"

The default experiment, half the tasks a step, with RLOO, whose loss has no ratio in it, so that
nothing else corrects: at `training.staleness` 0, 1, 2 and 4, plain and with token-level truncated
importance sampling. It goes on where it was stopped. No score makes it fail.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from lightning_ray.cluster import quiet_environment

quiet_environment()

from benchmarks import report  # noqa: E402
from benchmarks.grid import Grid, Ran  # noqa: E402
from benchmarks.report import Claim, Result  # noqa: E402

STEPS = int(os.environ.get("BENCH_STEPS", "12"))
STALENESS = (0, 1, 2, 4)
CORRECTIONS = ("none", "token_truncate")
CLAIMS = {
    staleness: Claim(
        f"corrected_{staleness}", "held-out score; ratio: with correction over without", None
    )
    for staleness in STALENESS
}


def results(done: Mapping[str, Sequence[Ran]]) -> list[Result]:
    """The medians of the seeds, with correction over without."""
    scores = {name: [ran["heldout"] for ran in runs] for name, runs in done.items()}
    return [
        report.compared(claim, scores[f"{staleness}_token_truncate"], scores[f"{staleness}_none"])
        for staleness, claim in CLAIMS.items()
    ]


OFF_POLICY = Grid(
    name="off-policy",
    about=__doc__.splitlines()[0],
    common=[
        "algorithm=rloo",
        f"training.steps={STEPS}",
        f"training.checkpoint_every={STEPS}",
        "training.tasks_per_step=4",
        "learner.learning_rate=2e-5",
    ],
    cells={
        f"{staleness}_{kind}": [
            f"training.staleness={staleness}",
            f"algorithm.loss.correction.kind={kind}",
        ]
        for staleness in STALENESS
        for kind in CORRECTIONS
    },
    claims=list(CLAIMS.values()),
    results=results,
)

if __name__ == "__main__":
    sys.exit(OFF_POLICY.main())
