"""What the benchmark of spans compares, and what it says of it."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks import against_peer, alone, otlp, report, under_test, workload
from benchmarks.report import Claim, Result

FASTER = Claim("faster", "spans/s", 4)
SMALLER = Claim("smaller", "MB", 300, cost=True)


def test_a_call_is_the_same_wherever_it_is_made_and_no_two_are() -> None:
    assert workload.calls(5, 3) == [workload.call(number) for number in (5, 6, 7)]
    made = workload.calls(0, 64)
    assert len({one.span_id for one in made}) == 64
    assert len({one.trace_id for one in made}) == 64 // workload.SPANS_PER_ROLLOUT
    assert all(len(one.prompt_ids + one.sampled_ids) == 64 for one in made)


def test_every_form_of_a_call_says_the_same() -> None:
    calls = workload.calls(0, 16)
    batch = under_test.batch_of(under_test.rows(calls))
    assert batch["span_id"].to_pylist() == [one.span_id for one in calls]
    assert batch["token_ids"].to_pylist() == [one.prompt_ids + one.sampled_ids for one in calls]
    assert batch["logprobs"].to_pylist() == [one.logprobs for one in calls]

    place = under_test.place(0)
    sent = under_test.batch_of([under_test.telemetry_row(one, place) for one in calls])
    read = pa.ipc.open_stream(under_test.arrow_body(sent)).read_all()
    said = [json.loads(text) for text in read["attributes"].to_pylist()]
    assert said == [workload.attributes(one) for one in calls]

    (exported,) = otlp.export_request(calls, {"service.name": "agent"}).resource_spans
    spans = exported.scope_spans[0].spans
    assert [one.span_id.hex() for one in spans] == [one.span_id for one in calls]
    for span, one in zip(spans, calls, strict=True):
        found = {pair.key: pair.value for pair in span.attributes}
        ids = found["response_token_ids"].array_value.values
        assert [value.int_value for value in ids] == one.sampled_ids
        logprobs = json.loads(found["logprobs.content"].string_value)
        assert [token["logprob"] for token in logprobs] == one.logprobs


def test_a_stream_interleaves_rollouts_and_repeats_no_span() -> None:
    size, spans = 10, 160
    batches = list(alone.Stream(size).batches(spans))
    table = pa.Table.from_batches(batches)
    assert len(set(table["span_id"].to_pylist())) == table.num_rows == spans
    counts = table["rollout_id"].value_counts().to_pylist()
    assert [one["counts"] for one in counts] == [workload.SPANS_PER_ROLLOUT] * (spans // 8)
    assert all(len(set(batch["rollout_id"].to_pylist())) == size for batch in batches)
    table.validate(full=True)


def test_the_store_is_measured_by_what_it_kept(tmp_path: Path) -> None:
    size = {"first": 0, "spans": 64, "batch": 16, "clients": 2}
    assert against_peer.append_rows(tmp_path / "rows", **size) > 0
    assert against_peer.append_arrow(tmp_path / "arrow", **size) > 0
    assert alone.bytes_per_turn(tmp_path / "turns", turns=2, calls=256) > 0


def test_a_ratio_is_of_medians_and_a_cost_is_better_when_smaller() -> None:
    good = report.compared(FASTER, [100.0, 1.0, 80.0], [10.0, 20.0, 1000.0])
    assert good == Result("faster", 80.0, 20.0, 4.0, "spans/s")
    large = report.alone(SMALLER, 350.0)
    assert large == Result("smaller", 350.0, None, 350.0, "MB")
    lines = report.table([FASTER, SMALLER], [good, large]).splitlines()
    assert [line.split()[0] for line in lines] == ["claim", "faster", "smaller"]
    assert " met " in lines[1] and "not met" not in lines[1]
    assert "not met" in lines[2]


def test_results_are_written_as_the_claims_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    numbers, about = report.write("name", [report.alone(SMALLER, 1.0)], {"cores": 2})
    assert json.loads(numbers.read_text()) == [
        {"claim": "smaller", "ours": 1.0, "peer": None, "ratio": 1.0, "unit": "MB"}
    ]
    assert json.loads(about.read_text()) == {"cores": 2}


def test_a_store_that_was_filled_is_looked_up_when_it_is_opened_again(
    ray_cluster: None, tmp_path: Path
) -> None:
    grown = alone.grow(tmp_path, 2_000, lookups=5, clients=2)
    assert grown.memory["beyond_object_store"] > grown.memory["own"] > 0
    assert alone.lookup_ms(tmp_path, 2_000, lookups=5) > 0
