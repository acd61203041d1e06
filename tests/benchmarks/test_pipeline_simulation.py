"""The simulated clock, whatever the times are."""

from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.pipeline_simulation import Timings, simulate

seconds = st.floats(0.01, 60.0)


@given(learn=seconds, staleness=st.integers(0, 3), seed=st.integers(0, 100))
@example(learn=60.0, staleness=2, seed=0)
def test_every_step_comes_to_its_end(learn, staleness, seed):
    """Also where all that runs ends while the learner learns."""
    timings = Timings(engine_s=0.2, learn_s=learn, overhead_s=1.0, median_s=6.0, sigma=1.0)
    for shared in (False, True):
        found = simulate(
            timings,
            workers=24,
            batch=2,
            samples=4,
            staleness=staleness,
            steps=5,
            shared=shared,
            seed=seed,
        )
        assert found.step_s >= learn


def test_a_step_that_waits_for_nothing_takes_what_its_rollouts_and_the_learner_take():
    timings = Timings(engine_s=1.0, learn_s=10.0, overhead_s=0.0, median_s=1e-9, sigma=1e-9)
    found = simulate(timings, workers=8, batch=2, samples=4, staleness=0, steps=4, shared=False)
    assert abs(found.step_s - 18.0) < 0.1
