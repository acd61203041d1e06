"""How old the tokens of a group are: of whole calls, of rollouts that can be learnt from."""

import pyarrow as pa
from test_step_batches import calls, record

from lightning_ray.spans import SpanStatus, to_batch
from lightning_ray.training.batches import oldest_versions


def test_only_what_can_be_learnt_from_makes_a_group_old() -> None:
    records = [
        record("a", "first", 1.0),
        record("b", "first", 0.0),
        record("c", "second", 1.0),
        record("d", "second", None),
        record("e", "none", 1.0),
    ]
    rows = [
        *calls("a/1", [1], version=7),
        *calls("b/1", [1], version=5, versions=[5]),
        *calls("b/1", [2], version=2, status=SpanStatus.ABORTED),
        *calls("b/1", [2], version=1, policy="another"),
        *calls("c/1", [1], version=6),
        *calls("d/1", [1], version=3),
        *calls("stranger/1", [1], version=0),
    ]
    spans = pa.Table.from_batches([to_batch(rows)])
    assert oldest_versions(records, spans, ["policy"]) == {
        "first": {"policy": 5},
        "second": {"policy": 6},
    }
    both = oldest_versions(records, spans, ["policy", "another"])
    assert both["first"] == {"policy": 5, "another": 1}
    assert oldest_versions([], spans.slice(0, 0), ["policy"]) == {}
