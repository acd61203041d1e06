import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spans_support import batch

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans import SCHEMA_VERSION, SPAN_SCHEMA
from lightning_ray.spans.schema import VERSION_KEY
from lightning_ray.spans.segment import (
    BatchPlace,
    SegmentWriter,
    mend_segment,
    read_batches,
    read_segment,
)


def written(path: Path, count: int) -> tuple[list[pa.RecordBatch], list[BatchPlace]]:
    """A segment of `count` batches of one span each."""
    batches = [batch(f"{number:016x}") for number in range(count)]
    writer = SegmentWriter(path)
    places = [writer.append(one) for one in batches]
    writer.close()
    return batches, places


def test_a_segment_gives_back_its_batches_and_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "1.arrows"
    batches, places = written(path, 3)
    scan = read_segment(path)
    assert scan.lost_bytes == 0
    assert [place for place, _ in scan.batches] == places
    assert all(found.equals(one) for (_, found), one in zip(scan.batches, batches, strict=True))
    again = read_batches(path, [place.offset for place in places])
    assert all(found.equals(one) for found, one in zip(again, batches, strict=True))


def test_a_segment_is_an_arrow_stream_that_any_reader_opens(tmp_path: Path) -> None:
    batches, _ = written(tmp_path / "1.arrows", 3)
    with pa.memory_map(str(tmp_path / "1.arrows")) as source:
        assert pa.ipc.open_stream(source).read_all().equals(pa.Table.from_batches(batches))


def test_whatever_is_torn_off_the_last_batch_the_earlier_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "1.arrows"
    batches, places = written(path, 3)
    last = places[-1]
    for kept in range(last.length - 1, -1, -1):
        os.truncate(path, last.offset + kept)
        scan = read_segment(path)
        assert [found["span_id"][0].as_py() for _, found in scan.batches] == [
            one["span_id"][0].as_py() for one in batches[:2]
        ]
        assert scan.lost_bytes == kept
    assert scan.batches[1][1].equals(batches[1])


def test_a_segment_torn_while_it_was_created_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "1.arrows"
    written(path, 0)
    header = path.read_bytes()
    for size in range(len(header)):
        path.write_bytes(header[:size])
        scan = read_segment(path)
        assert (scan.batches, scan.lost_bytes) == ([], size)
        # A file system may give a file its length before its content.
        path.write_bytes(header[:size].ljust(len(header), b"\0"))
        assert read_segment(path).batches == []


def test_zeros_behind_the_last_batch_are_no_batch(tmp_path: Path) -> None:
    path = tmp_path / "1.arrows"
    batches, _ = written(path, 2)
    os.truncate(path, path.stat().st_size + 4096)
    scan = read_segment(path)
    assert len(scan.batches) == 2 and scan.batches[1][1].equals(batches[1])
    assert scan.lost_bytes == 4096


def test_any_changed_byte_is_put_right(tmp_path: Path) -> None:
    path = tmp_path / "1.arrows"
    batches, _ = written(path, 3)
    content = path.read_bytes()
    # A prime, so that no field of the format is left out each time.
    stride = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 5
    for place in range(0, len(content), stride):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x81]) + content[place + 1 :])
        scan = read_segment(path)
        assert [found for _, found in scan.batches] == batches
        assert (scan.damaged, scan.lost_bytes) == ([], 0)
        if scan.mended:
            # Nothing is to mend where only the check digits were hit.
            assert scan.mended == [(place, content[place])]
            mend_segment(path, scan.mended)
            assert path.read_bytes() == content


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_greater_damage_costs_its_own_batch_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("segment") / "1.arrows"
    batches, places = written(path, 4)
    hit = data.draw(st.integers(0, 3), "batch")
    place = places[hit]
    at = st.integers(place.offset, place.offset + place.length - 1)
    content = bytearray(path.read_bytes())
    for offset in data.draw(st.lists(at, min_size=2, max_size=8, unique=True), "bytes"):
        content[offset] ^= data.draw(st.integers(1, 255), "change")
    path.write_bytes(content)
    scan = read_segment(path)
    found = [batch for _, batch in scan.batches]
    whole = batches[:hit] + batches[hit + 1 :]
    if found == batches:
        return  # Only one of the two sums of its check digits was hit.
    assert found == whole
    lost = scan.lost_bytes if hit == 3 else sum(length for _, length in scan.damaged)
    assert lost == place.length and not scan.mended


ADDED = {
    2: {"step", "source", "model", "tool", "input_tokens", "output_tokens", "cost_usd"},
    3: {"versions"},
}
"""Columns by the schema version that they came with."""


@pytest.mark.parametrize("version", [1, 2])
def test_a_segment_of_an_earlier_schema_version_is_read(tmp_path: Path, version: int) -> None:
    path = tmp_path / "1.arrows"
    added = {name for later, names in ADDED.items() if later > version for name in names}
    fields = [field for field in SPAN_SCHEMA if field.name not in added]
    schema = pa.schema(fields, metadata={VERSION_KEY: str(version)})
    old = batch("a", "b").select(schema.names).replace_schema_metadata(schema.metadata)
    # As version 1 wrote it: without check digits.
    path.write_bytes(b"".join((schema.serialize().to_pybytes(), old.serialize().to_pybytes())))
    ((place, found),) = read_segment(path).batches
    assert found == batch_with_times_of(found, "a", "b") and found.schema == SPAN_SCHEMA
    assert read_batches(path, [place.offset]) == [found]
    assert max(ADDED) == SCHEMA_VERSION


def batch_with_times_of(found: pa.RecordBatch, *span_ids: str) -> pa.RecordBatch:
    """A batch with these ids, made as long ago as `found`."""
    made = batch(*span_ids)
    for name in ("start_ns", "end_ns"):
        place = SPAN_SCHEMA.get_field_index(name)
        made = made.set_column(place, SPAN_SCHEMA.field(name), found.column(name))
    return made


def test_a_segment_of_a_later_schema_is_refused_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "1.arrows"
    later = SPAN_SCHEMA.append(pa.field("mood", pa.string()))
    later_version = str(SCHEMA_VERSION + 1)
    path.write_bytes(later.with_metadata({VERSION_KEY: later_version}).serialize().to_pybytes())
    with pytest.raises(InfrastructureError, match=r"span schema \d+.*use a newer lightning-ray"):
        read_segment(path)


def test_a_file_that_is_no_segment_of_spans_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "1.arrows"
    path.write_bytes(b"not arrow " * 1000)
    with pytest.raises(InfrastructureError, match=f"{path} does not begin with .* span schema"):
        read_segment(path)
    table = pa.table({"other": list(range(1000))})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InfrastructureError, match=f"{path} does not begin with .* span schema"):
        read_segment(path)


def test_a_failed_append_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "1.arrows"
    writer = SegmentWriter(path)
    writer.append(batch("a"))
    size = writer.size

    def refuse(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="Input/output"):
            writer.append(batch("b"))
    assert writer.size == size == path.stat().st_size
    writer.append(batch("c"))
    scan = read_segment(path)
    assert [found["span_id"][0].as_py() for _, found in scan.batches] == ["a", "c"]
    assert scan.lost_bytes == 0


def test_a_segment_that_cannot_be_begun_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        SegmentWriter(tmp_path / "1.arrows")
    assert list(tmp_path.iterdir()) == []


def test_a_segment_is_never_begun_over_another(tmp_path: Path) -> None:
    path = tmp_path / "1.arrows"
    written(path, 1)
    with pytest.raises(FileExistsError):
        SegmentWriter(path)
    assert len(read_segment(path).batches) == 1
