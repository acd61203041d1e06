"""Retention: what goes is recorded first, and whoever asks for it is told."""

import importlib

import pyarrow as pa
import pytest
from spans_support import row, seal

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans import SpansRemoved, query, read_folder, to_batch
from lightning_ray.spans.archive import Archive
from lightning_ray.spans.manifests import read_manifests
from lightning_ray.spans.query import open_dataset
from lightning_ray.spans.retention import (
    check_not_removed,
    finish_removals,
    gone_files,
    plan_removals,
    read_removed,
    remove,
)
from lightning_ray.spans.segment import SegmentWriter

DAY = 24 * 3600 * 10**9


@pytest.fixture
def sealed(tmp_path):
    """Three sealed segments, a day apart, each of runs `one` and `two`."""
    for day in range(3):
        rows = [
            row(f"{run}{day}", f"{run}-{day}/1", start_ns=day * DAY) | {"run_id": run}
            for run in ("one", "two")
        ]
        table = pa.Table.from_batches([to_batch(rows)])
        seal(Archive("", tmp_path), table, 0, day + 1).write_manifest(tmp_path)
    return read_manifests(tmp_path)


def test_by_age_by_bytes_and_by_run(sealed):
    assert plan_removals(sealed, (), now_ns=3 * DAY) == []
    old = plan_removals(sealed, (), now_ns=3 * DAY, keep_days=1.5)
    assert sum(removal.rows for removal in old) == 4 and {r.run_id for r in old} == {"one", "two"}
    assert all("00000003" not in path for removal in old for path in removal.paths)
    size = sum(one.bytes for one in sealed)
    assert plan_removals(sealed, (), now_ns=0, keep_bytes=size) == []
    (first,) = plan_removals(sealed, (), now_ns=0, keep_bytes=size - 1)
    assert first.paths == (sealed[0].files[0].path,) and "keep_bytes" in first.reason
    (run,) = plan_removals(sealed, (), now_ns=0, run_id="two")
    assert (run.run_id, run.rows) == ("two", 3)
    gone = {("", path) for path in run.paths}
    assert plan_removals(sealed, gone, now_ns=0, run_id="two") == []


def test_reading_what_was_removed_says_so(tmp_path, sealed, caplog):
    (plan,) = plan_removals(sealed, (), now_ns=0, run_id="two")
    done = remove(tmp_path, plan, now_ns=DAY)
    assert done.done and read_removed(tmp_path) == [done] and done.rollouts == 3
    assert not list((tmp_path / "sealed" / "run_id=two").rglob("*.parquet"))
    with pytest.raises(SpansRemoved, match=r"two-1.*run two, removed 1970-01-02.*by hand"):
        check_not_removed(tmp_path, ["one-1", "two-1"])
    check_not_removed(tmp_path, ["one-1"])
    assert set(read_folder(tmp_path)["run_id"].to_pylist()) == {"one"}
    assert "3 spans of 3 rollouts of run two" in caplog.text
    (rest,) = plan_removals(sealed, gone_files([done]), now_ns=9 * DAY, keep_days=1)
    remove(tmp_path, rest, now_ns=DAY)
    with pytest.raises(SpansRemoved, match="keep_days=1"):
        read_folder(tmp_path)


def test_a_crash_after_the_record_is_finished_at_the_next_start(tmp_path, sealed):
    class Dies(Archive):
        def delete(self, path):
            raise OSError("the process died")

    (plan,) = plan_removals(sealed, (), now_ns=0, run_id="two")
    with pytest.raises(InfrastructureError):
        remove(tmp_path, plan, 0, Dies)
    assert list((tmp_path / "sealed" / "run_id=two").rglob("*.parquet"))
    # Recorded is removed, deleted or not.
    assert set(read_folder(tmp_path)["run_id"].to_pylist()) == {"one"}
    (done,) = finish_removals(tmp_path)
    assert done.done and finish_removals(tmp_path) == []
    assert not list((tmp_path / "sealed" / "run_id=two").rglob("*.parquet"))


def test_open_closed_and_sealed_segments_count_once(tmp_path, sealed):
    for path, name in (("shard-0/00000001", "one0"), ("shard-1/00000001", "x"), ("00000009", "y")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        writer = SegmentWriter(tmp_path / f"{path}.arrows")
        writer.append(to_batch([row(name, f"{name}/1", policy="p")]))
        writer.close()
    table = read_folder(tmp_path)
    assert sorted(table["span_id"].to_pylist()) == sorted(
        ["one0", "one1", "one2", "two0", "two1", "two2", "x", "y"]
    )
    dataset = open_dataset(tmp_path)
    answer = query(dataset, "SELECT run_id, count(*) n FROM spans WHERE policy IS NULL GROUP BY 1")
    assert sorted(map(tuple, (line.values() for line in answer.to_pylist()))) == [
        ("one", 3),
        ("two", 3),
    ]


def test_sql_opens_only_the_files_of_a_run(tmp_path, sealed):
    for file in [file for one in sealed for file in one.files if file.run_id == "two"]:
        (tmp_path / "sealed" / file.path).write_bytes(b"damaged")
    sql = "SELECT span_id FROM spans WHERE run_id = 'one' ORDER BY 1"
    answer = query(open_dataset(tmp_path), sql)
    assert answer["span_id"].to_pylist() == ["one0", "one1", "one2"]


def test_a_segment_that_vanishes_is_read_sealed(tmp_path, monkeypatch):
    module = importlib.import_module("lightning_ray.spans.query")

    (tmp_path / "shard-0").mkdir()
    path = tmp_path / "shard-0" / "00000001.arrows"
    writer = SegmentWriter(path)
    batch = to_batch([row("a")])
    writer.append(batch)
    writer.close()
    real = module.read_manifests

    def read_then_seal(folder):
        found = real(folder)
        if path.exists():
            sealed = seal(Archive("", folder), pa.Table.from_batches([batch]), 0, 1)
            sealed.write_manifest(folder)
            path.unlink()
        return found

    monkeypatch.setattr(module, "read_manifests", read_then_seal)
    assert read_folder(tmp_path)["span_id"].to_pylist() == ["a"]
