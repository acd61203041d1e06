"""Sealed segments: what goes into Parquet comes out of it, and few files are read."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spans_support import row, seal

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.spans import SCHEMA_VERSION, SPAN_SCHEMA, to_batch
from lightning_ray.spans.archive import Archive, check_archive
from lightning_ray.spans.manifests import Sealed, read_manifests
from lightning_ray.spans.schema import VERSION_KEY


def table(rows) -> pa.Table:
    return pa.Table.from_batches([to_batch(rows)])


def numbered(row, sequence):
    return row | {"sequence": sequence}


class Opens(pa.fs.FileSystemHandler):
    """The local file system, counting what is opened for reading."""

    def __init__(self):
        self.local = pa.fs.LocalFileSystem()
        self.opened = set()

    def open_input_file(self, path):
        self.opened.add(path)
        return self.local.open_input_file(path)

    def open_input_stream(self, path):
        self.opened.add(path)
        return self.local.open_input_stream(path)

    def get_file_info(self, paths):
        return self.local.get_file_info(paths)

    def get_type_name(self):
        return "counting"

    def _no(self, *arguments, **options):
        raise NotImplementedError

    get_file_info_selector = create_dir = delete_dir = delete_dir_contents = _no
    delete_root_dir_contents = delete_file = move = copy_file = _no
    open_output_stream = open_append_stream = _no

    def normalize_path(self, path):
        return path


_TEXT = st.text(max_size=8)
_ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a", "..", "x/y=%", "__none__", "é\n", "~" * 200]),
        st.none() | st.sampled_from(["", "p", "__none__", "ö/"]),
        st.none() | st.integers(-1, 3),
        st.none() | st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
        st.none() | st.lists(st.floats(width=32), max_size=4),
        st.none() | st.floats(),
        st.none() | _TEXT,
    ),
    max_size=12,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_ROWS)
def test_parquet_equals_the_rows(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("archive")
    made = [
        numbered(row(f"s{n}", f"r{n % 3}/1"), n)
        | dict(
            zip(
                ("run_id", "policy", "version", "token_ids", "logprobs", "value", "name"),
                (*values[:6], values[6] or ""),
                strict=True,
            )
        )
        for n, values in enumerate(rows)
    ]
    source = table(made)
    archive = Archive("", folder)
    sealed = seal(archive, source, 0, 1)
    assert Sealed.from_json(sealed.to_json()) == sealed
    assert sum(file.rows for file in sealed.files) == sealed.rows == len(rows)
    by = [("attempt_id", "ascending"), ("sequence", "ascending")]
    # NaN differs from itself: the bytes of the streams are compared.
    want = source.sort_by(by).combine_chunks()
    for found in (
        archive.dataset(sealed.files).to_table(),
        archive.read(sealed.files, rollout_ids=["r0", "r1", "r2"]),
        archive.read(sealed.files, attempt_ids=["r0/1", "r1/1", "r2/1"]),
    ):
        assert found.schema.equals(SPAN_SCHEMA)
        assert repr(found.sort_by(by).to_pylist()) == repr(want.to_pylist())


def test_a_file_is_whole_alone(tmp_path):
    (file,) = seal(Archive("", tmp_path), table([row("s", policy="p", version=2)]), 3, 7).files
    assert file.path == "run_id=run/policy=p/version=2/shard3-00000007.parquet"
    alone = pq.read_table(tmp_path / "sealed" / file.path, partitioning=None)
    assert alone.schema.equals(SPAN_SCHEMA)
    assert alone.schema.metadata[VERSION_KEY] == str(SCHEMA_VERSION).encode()
    hive = ds.dataset(tmp_path / "sealed", partitioning="hive").to_table(columns=["policy"])
    assert hive.to_pylist() == [{"policy": "p"}]


def test_a_filter_opens_only_its_files(tmp_path):
    rows = [
        row(f"{run}{version}", f"{run}/1", policy="p", version=version) | {"run_id": run}
        for run in ("one", "two")
        for version in range(4)
    ]
    sealed = seal(Archive("", tmp_path), table(rows), 0, 1)
    counting = Opens()
    archive = Archive("", tmp_path, pa.fs.PyFileSystem(counting))
    dataset = archive.dataset(sealed.files)
    assert dataset.to_table(filter=ds.field("run_id") == "one").num_rows == 4
    assert len(counting.opened) == 4
    counting.opened.clear()
    assert dataset.to_table(filter=ds.field("version") == 3).num_rows == 2
    assert len(counting.opened) == 2
    counting.opened.clear()
    found = archive.read(sealed.files, rollout_ids=["two"], columns=["span_id"])
    assert found.column_names == ["span_id"] and found.num_rows == 4
    assert len(counting.opened) == 4


def test_reading_one_rollout_reads_few_row_groups(tmp_path):
    rows = [row(f"s{n}", f"r{n // 10:04d}/1", token_ids=list(range(500))) for n in range(4000)]
    archive = Archive("", tmp_path)
    (file,) = seal(archive, table(rows), 0, 1).files
    metadata = pq.read_metadata(tmp_path / "sealed" / file.path)
    assert metadata.num_row_groups > 4
    found = archive.read([file], rollout_ids=["r0123"])
    assert sorted(found["span_id"].to_pylist()) == [f"s{n}" for n in range(1230, 1240)]


def test_a_manifest_commits_the_seal(tmp_path):
    archive = Archive("", tmp_path)
    orphan = seal(archive, table([row("a")]), 1, 2)
    assert read_manifests(tmp_path) == []
    again = seal(archive, table([row("a")]), 1, 2)
    assert [file.path for file in again.files] == [file.path for file in orphan.files]
    again.write_manifest(tmp_path)
    assert read_manifests(tmp_path) == [again]
    (tmp_path / again.manifest).write_text("{}")
    with pytest.raises(InfrastructureError, match="no manifest"):
        read_manifests(tmp_path)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("/dev/null/x", "cannot be written"),
        ("gopher://x/y", "gopher"),
        ("s3://key:word@bucket/x", "environment"),
    ],
)
def test_a_bad_archive_is_refused_at_the_start(tmp_path, uri, says):
    with pytest.raises(UserError, match=says) as raised:
        check_archive(uri, tmp_path)
    assert "word" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_uri(tmp_path):
    uri = (tmp_path / "far away").as_uri()
    check_archive(uri, tmp_path)
    archive = Archive(uri, tmp_path)
    sealed = seal(archive, table([row("a")]), 0, 1)
    assert archive.read(sealed.files, rollout_ids=["r"]).num_rows == 1


@pytest.fixture
def s3_keys(monkeypatch):
    """The environment of somebody who has an S3 store."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")


def s3_uri(port: int) -> str:
    return f"s3://spans/here?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


@pytest.mark.usefixtures("s3_keys")
def test_an_s3_store_that_is_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_ray.spans.archive._S3_REQUEST_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with pytest.raises(UserError, match="cannot be written"):
            check_archive(s3_uri(silent.getsockname()[1]), tmp_path)
    assert time.monotonic() - begin < 30


@pytest.mark.usefixtures("s3_keys")
def test_an_s3_store(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    uri = s3_uri(port)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "the S3 server did not start in 60 s"
                time.sleep(0.2)
        with pytest.raises(UserError, match="cannot be written"):
            check_archive(uri, tmp_path)
        pa.fs.FileSystem.from_uri(uri + "&allow_bucket_creation=true")[0].create_dir("spans")
        check_archive(uri, tmp_path)
        archive = Archive(uri, tmp_path)
        source = table([row(f"s{n}", f"r{n}/1", policy="ä/b", version=n) for n in range(3)])
        sealed = seal(archive, source, 0, 1)
        sealed.write_manifest(tmp_path)
        (back,) = read_manifests(tmp_path)
        assert archive.read(back.files, rollout_ids=["r1"])["span_id"].to_pylist() == ["s1"]
        assert archive.dataset(back.files).to_table().num_rows == 3
        text = (tmp_path / back.manifest).read_text()
        assert "a-secret-key" not in text and json.loads(text)["archive"] == uri
        archive.delete(back.files[0].path)
        archive.delete(back.files[0].path)
    finally:
        server.terminate()
        server.wait(10)


_SEALS = """
import sys, pyarrow as pa
from pathlib import Path
from spans_support import row, seal
from lightning_ray.spans import Archive, to_batch
folder = Path(sys.argv[1])
for n in range(1, 100000):
    rows = [row(f"{n}-{k}", policy="p", version=k) for k in range(3)]
    seal(Archive("", folder), pa.Table.from_batches([to_batch(rows)]), 0, n).write_manifest(folder)
    print(n, flush=True)
"""


def test_a_seal_that_is_killed_is_whole_or_not_there(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        sealer = subprocess.Popen(
            [sys.executable, "-c", _SEALS, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        said = [int(sealer.stdout.readline()) for _ in range(3)]
        time.sleep(0.013 * attempt)
        sealer.kill()
        said += [int(line) for line in sealer.stdout.read().split()]
        sealer.wait(10)
        sealer.stdout.close()
        found = read_manifests(folder)
        assert {one.segment for one in found} >= set(said)
        for one in found:
            ids = Archive("", folder).dataset(one.files).to_table()["span_id"].to_pylist()
            assert sorted(ids) == [f"{one.segment}-{k}" for k in range(3)]
