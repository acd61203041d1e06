"""An algorithm of the user's own in a Ray task and in a learner's actor, its file out of reach."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from learner_support import tiny_model
from own_algorithm_support import examples
from test_step_batches import calls, ends, record

from lightning_ray.algorithms import AlgorithmConfig, make_algorithm, own_loss
from lightning_ray.errors import UserError
from lightning_ray.learner import LearnerConfig, LearnerGroup
from lightning_ray.spans import to_batch
from lightning_ray.training.batch_maker import start_batch_maker
from lightning_ray.training.shipping import ship_by_value

NAME = "far_algorithm:LeaveOneOut"
SETTINGS = AlgorithmConfig(name=NAME, options={"most": 1.5})


@pytest.fixture
def algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page's first example. When it is used its file is gone, as on another node."""
    file = tmp_path / "far_algorithm.py"
    # A reward of 7 is one that it cannot score.
    file.write_text(
        examples()["LeaveOneOut"].replace(
            "        count = len", "        assert 7.0 not in group.rewards\n        count = len"
        )
    )
    path = list(sys.path)
    monkeypatch.chdir(tmp_path)
    made = make_algorithm(SETTINGS)
    ship_by_value(made)
    file.unlink()
    yield made
    sys.path[:] = path
    del sys.modules["far_algorithm"]


def test_it_scores_where_batches_are_made_and_its_loss_is_learnt_in_an_actor(
    ray_cluster: None, algorithm, tmp_path: Path
) -> None:
    maker = start_batch_maker()
    records = [record("a", "g", 1.0), record("b", "g", 0.0), record("c", "g", 0.0)]
    rows = calls("a/1", [1, 2]) + calls("b/1", [3]) + calls("c/1", [4])
    spans = pa.Table.from_batches([to_batch(rows + ends(records))])
    # A process that dies is started anew: it holds nothing.
    ray.get(maker.__ray_ready__.remote(), timeout=60)
    ray.kill(maker, no_restart=False)
    arguments = (records, ray.put(spans), algorithm, "policy", None, None, SETTINGS)
    sequences, batch = maker.make.options(num_returns=2).remote(*arguments)
    credit = {"a/1": 1.0, "b/1": -0.5, "c/1": -0.5}
    assert ray.get(batch, timeout=60).advantages == credit
    config = LearnerConfig(dtype="fp32", num_threads=1)
    learner = LearnerGroup(config, tiny_model(tmp_path / "model"), "own")
    try:
        logprobs = learner.logprobs(sequences, 60)
        report = learner.step(sequences, algorithm.loss, 60, own_loss(algorithm))
    finally:
        learner.stop()
    # Recorded were -0.1; the random model's are far below, so that ratios are small and uncut.
    terms = [
        -np.exp(new + 0.1) * credit[attempt] * new
        for attempt, row in zip(credit, logprobs, strict=True)
        for new in row
    ]
    assert report.loss == pytest.approx(np.mean(terms), rel=1e-4, abs=1e-7)
    assert report.skipped is None

    worse = [record("a", "g", 7.0), record("b", "g", 0.0)]
    rows = calls("a/1", [1]) + calls("b/1", [3]) + ends(worse)
    spans = pa.Table.from_batches([to_batch(rows)])
    arguments = (worse, ray.put(spans), algorithm, "policy", None, None, SETTINGS)
    _, batch = maker.make.options(num_returns=2).remote(*arguments)
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(batch, timeout=60)
    assert isinstance(raised.value.cause, UserError)
    assert "score_group raised AssertionError" in str(raised.value.cause)
    ray.kill(maker)
