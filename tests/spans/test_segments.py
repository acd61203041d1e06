import os
from pathlib import Path

import pyarrow as pa
import pytest
from spans_support import batch

from lightning_ray.errors import InfrastructureError
from lightning_ray.spans.segment import BatchPlace, SegmentWriter, read_batch, read_segment


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
    assert all(read_batch(place).equals(one) for place, one in zip(places, batches, strict=True))


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


def test_a_damaged_byte_costs_nothing_that_lies_before_it(tmp_path: Path) -> None:
    path = tmp_path / "1.arrows"
    writer = SegmentWriter(path)
    first = batch("a")
    writer.append(first)
    damaged = writer.append(batch("b", "c"))
    writer.append(batch("d"))
    content = bytearray(path.read_bytes())
    for offset in range(damaged.offset, damaged.offset + damaged.length):
        content[offset] ^= 0x81
        path.write_bytes(content)
        content[offset] ^= 0x81
        scan = read_segment(path)
        assert scan.batches[0][1].equals(first)
        for _, found in scan.batches[1:]:
            # What is handed on can be read without leaving its buffers.
            found.validate(full=True)
            found.to_pylist()


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
