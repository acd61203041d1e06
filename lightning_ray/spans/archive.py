"""Sealed segments: closed segments as Parquet under any `pyarrow.fs` URI.

Invariant: the Parquet files of a segment hold exactly its rows, each file every column of
SPAN_SCHEMA. A process that dies while it seals leaves files that the next seal of the segment
overwrites: their names depend on the segment alone. What counts is the manifest (`manifests`).
"""

import hashlib
import os
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.spans.durable import sync_folder
from lightning_ray.spans.manifests import Sealed, SealedFile
from lightning_ray.spans.memory import give_back
from lightning_ray.spans.schema import SCHEMA_VERSION, SPAN_SCHEMA

NONE = "__none__"
"""Stands for a null policy or version in a path."""

_ROW_GROUP_BYTES = 1024 * 1024
_DICTIONARY = [
    *("kind", "name", "run_id", "rollout_id", "attempt_id", "status", "agent", "role", "policy"),
    *("version", "finish_reason", "step", "source", "model", "tool", "parent_span_id", "trace_id"),
]
_PARTITION = ("run_id", "policy", "version")
_ORDER = ("rollout_id", "attempt_id", "sequence")
_NUMBER = "number"
KEYS = (*_PARTITION, *_ORDER, "start_ns")
"""The columns that say where a row goes."""
_FIRST_GROUP = 256
"""Rows of a file's first row group, which tells how large rows are."""
_NAME_LENGTH = 180
_S3_CONNECT_S = 5.0
_S3_REQUEST_S = 30.0
"""An S3 store that is silent for so long does not answer; it is asked three times."""


Numbers = npt.NDArray[np.int64]
RowsOf = Callable[[Numbers], list[pa.RecordBatch]]


class Archive:
    """The place of sealed segments. Keys of an S3 store come from the environment alone."""

    def __init__(self, uri: str, folder: Path, filesystem: pa.fs.FileSystem | None = None):
        """`uri` as `spans.archive` has it; `folder` is the folder of spans, for the default.

        `filesystem` is used in the place of the URI's own. Raises UserError for a bad URI.
        """
        self.uri = uri
        own, self._base = _resolve(uri, folder)
        self.filesystem = filesystem or own
        self._local = isinstance(own, pa.fs.LocalFileSystem)

    def seal(self, keys: pa.Table, rows: RowsOf, shard: int, segment: int) -> Sealed:
        """Writes a segment's rows, a row group at a time; they are durable when it returns.

        Args:
            keys: The columns `KEYS` of all rows.
            rows: Gives the rows with these numbers, in that order, as batches of SPAN_SCHEMA.

        Raises InfrastructureError when the archive refuses.
        """
        name = f"shard{shard}-{segment:08d}.parquet"
        count, times = keys.num_rows, pc.min_max(keys["start_ns"]).as_py()
        parts = _split(keys)
        del keys  # they may hold a segment's pages, and are copied with the first part
        try:
            files = tuple(self._write(part, rows, name) for part in parts)
        except (OSError, pa.ArrowException) as error:
            raise InfrastructureError(
                f"spans could not be sealed to {self.place}: {error}"
            ) from error
        return Sealed(
            shard,
            segment,
            self.uri,
            SCHEMA_VERSION,
            count,
            sum(file.bytes for file in files),
            times["min"] or 0,
            times["max"] or 0,
            files,
        )

    @property
    def place(self) -> str:
        """Where it is, for a person."""
        return self.uri or self._base

    def delete(self, path: str) -> None:
        """Removes a file, if it is there. Raises OSError."""
        full = self._full(path)
        if self.filesystem.get_file_info(full).type != pa.fs.FileType.NotFound:
            self.filesystem.delete_file(full)

    def dataset(self, files: Iterable[SealedFile]) -> ds.Dataset:
        """The files as a dataset of SPAN_SCHEMA.

        A filter on run_id, policy or version opens only the files that can have such rows.
        """
        return ds.FileSystemDataset(
            [self._fragment(file) for file in files],
            SPAN_SCHEMA,
            ds.ParquetFileFormat(),
            self.filesystem,
        )

    def read(
        self,
        files: Iterable[SealedFile],
        *,
        rollout_ids: Collection[str] | None = None,
        attempt_ids: Collection[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """The spans of these rollouts or attempts, ordered by attempt and sequence.

        Opens the files that can hold them and reads the row groups that do. Raises
        InfrastructureError when a file cannot be read.
        """
        if (rollout_ids is None) == (attempt_ids is None):
            raise ValueError("read takes rollout_ids or attempt_ids")
        column = "rollout_id" if attempt_ids is None else "attempt_id"
        wanted = sorted(set(rollout_ids or attempt_ids or ()))
        if column == "attempt_id":
            files = [one for one in files if _meets(wanted, one.first_attempt, one.last_attempt)]
        else:
            files = [one for one in files if _meets(wanted, one.first_rollout, one.last_rollout)]
        keep = ds.field(column).isin(pa.array(wanted, pa.string()))
        names = list(columns or SPAN_SCHEMA.names)
        keys = [name for name in ("attempt_id", "sequence") if name not in names]
        parts = [
            pa.table([pa.array([], SPAN_SCHEMA.field(n).type) for n in names + keys], names + keys)
        ]
        try:
            for file in files:
                fragment = self._fragment(file)
                groups = [
                    group.id
                    for group in fragment.row_groups
                    if _may_hold(group.statistics, column, wanted)
                ]
                if groups:
                    part = fragment.subset(row_group_ids=groups)
                    parts.append(
                        part.to_table(schema=SPAN_SCHEMA, columns=names + keys, filter=keep)
                    )
        except (OSError, pa.ArrowException) as error:
            raise InfrastructureError(f"sealed spans in {self.place}: {error}") from error
        table = pa.concat_tables([part.cast(_schema_of(names + keys)) for part in parts])
        return table.sort_by([("attempt_id", "ascending"), ("sequence", "ascending")]).select(names)

    def rollouts(self, paths: Sequence[str]) -> pa.Array:
        """The distinct rollout ids in these files. Raises OSError or pyarrow's ArrowException."""
        ids = [
            pq.read_table(
                self._full(path),
                columns=["rollout_id"],
                filesystem=self.filesystem,
                partitioning=None,
            )["rollout_id"]
            for path in paths
        ]
        return pc.unique(pa.chunked_array([c for one in ids for c in one.chunks], pa.string()))

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}"

    def _fragment(self, file: SealedFile) -> ds.ParquetFileFragment:
        holds = ds.field("run_id") == file.run_id
        policy, version = ds.field("policy"), ds.field("version")
        holds &= policy.is_null() if file.policy is None else policy == file.policy
        holds &= (
            version.is_null()
            if file.version is None
            else version == pa.scalar(file.version, pa.int32())
        )
        return ds.ParquetFileFormat().make_fragment(
            self._full(file.path), self.filesystem, partition_expression=holds
        )

    def _write(self, part: pa.Table, rows: RowsOf, name: str) -> SealedFile:
        """One file: the rows that `part` has the keys of, in its order."""
        run, policy, version = (part[column][0].as_py() for column in _PARTITION)
        path = (
            f"run_id={_quoted(run)}/policy={_quoted(policy)}/"
            f"version={NONE if version is None else version}/{name}"
        )
        full = self._full(path)
        self.filesystem.create_dir(full.rpartition("/")[0], recursive=True)
        target = f"{full}.tmp" if self._local else full
        numbers = part[_NUMBER].to_numpy()
        with (
            self.filesystem.open_output_stream(target) as sink,
            pq.ParquetWriter(
                sink,
                SPAN_SCHEMA,
                compression="zstd",
                use_dictionary=_DICTIONARY,
                write_page_index=True,
            ) as writer,
        ):
            start, size = 0, _FIRST_GROUP
            while start < len(numbers):
                group = pa.Table.from_batches(rows(numbers[start : start + size]), SPAN_SCHEMA)
                writer.write_table(group, size)
                start += size
                size = min(8192, max(64, _ROW_GROUP_BYTES * group.num_rows // group.nbytes))
                del group
                give_back()
        if self._local:
            _settle(Path(target), Path(full), Path(self._base))
        rollouts = pc.min_max(part["rollout_id"]).as_py()
        attempts = pc.min_max(part["attempt_id"]).as_py()
        return SealedFile(
            path,
            run,
            policy,
            version,
            part.num_rows,
            self.filesystem.get_file_info(full).size,
            pc.count_distinct(part["rollout_id"]).as_py(),
            pc.count_distinct(part["attempt_id"]).as_py(),
            rollouts["min"],
            rollouts["max"],
            attempts["min"],
            attempts["max"],
        )


def check_archive(uri: str, folder: Path) -> None:
    """Raises UserError unless a file can be written under `uri` and removed again."""
    archive = Archive(uri, folder)
    probe = f"{archive._base}/.writable-{os.getpid()}"
    try:
        archive.filesystem.create_dir(archive._base, recursive=True)
        with archive.filesystem.open_output_stream(probe) as sink:
            sink.write(b"spans")
        archive.filesystem.delete_file(probe)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"spans.archive={archive.place}: cannot be written: {reason}") from error


def _resolve(uri: str, folder: Path) -> tuple[pa.fs.FileSystem, str]:
    if not uri:
        return pa.fs.LocalFileSystem(), str(folder.absolute() / "sealed")
    if "://" not in uri:
        return pa.fs.LocalFileSystem(), str(Path(uri).absolute())
    if "@" in urlsplit(uri).netloc or "secret" in uri.lower():
        raise UserError(
            "spans.archive: the URI has keys in it; give them in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    try:
        filesystem, base = pa.fs.FileSystem.from_uri(uri)
        if isinstance(filesystem, pa.fs.S3FileSystem):
            filesystem = _patient_s3(filesystem, uri)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise UserError(f"spans.archive={uri}: {' '.join(str(error).split())}") from error
    return filesystem, base.rstrip("/")


def _patient_s3(found: pa.fs.S3FileSystem, uri: str) -> pa.fs.S3FileSystem:
    """The same store, with time limits: a URI cannot say them, and Arrow's own are the SDK's."""
    said = dict(parse_qsl(urlsplit(uri).query))
    options = {name: said[name] for name in ("scheme", "endpoint_override") if name in said}
    flags = ("allow_bucket_creation", "allow_bucket_deletion")
    return pa.fs.S3FileSystem(
        region=found.region,
        **options,
        **{name: said[name] == "true" for name in flags if name in said},
        connect_timeout=_S3_CONNECT_S,
        request_timeout=_S3_REQUEST_S,
        # A small file goes in one request, not in the three of an upload in parts.
        allow_delayed_open=True,
    )


def _split(keys: pa.Table) -> Iterator[pa.Table]:
    """The keys of each run, policy and version, with their rows' numbers, in a file's order."""
    keys = keys.append_column(_NUMBER, pa.array(range(keys.num_rows), pa.int64()))
    order = [(name, "ascending") for name in (*_PARTITION, *_ORDER)]
    keys = keys.combine_chunks().sort_by(order)
    changed = np.zeros(max(keys.num_rows - 1, 0), np.bool_)
    for name in _PARTITION:
        names = keys[name].combine_chunks().dictionary_encode(null_encoding="encode")
        changed |= np.diff(names.indices.to_numpy()) != 0
    starts = [0, *(np.flatnonzero(changed) + 1).tolist(), keys.num_rows]
    for start, end in pairwise(starts):
        if end > start:
            yield keys.slice(start, end - start)


def _quoted(text: str | None) -> str:
    if text is None:
        return NONE
    # A tilde marks a shortened name and NONE a null, so that neither is any other text's.
    name = quote(text, safe="").replace("~", "%7E")
    if name == NONE:
        return name.replace("_", "%5F")
    if len(name) > _NAME_LENGTH:
        return f"{name[:100]}~{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    return name


def _settle(target: Path, path: Path, base: Path) -> None:
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(target, path)
    for folder in (path.parent, *path.parents[1:]):
        sync_folder(folder)
        if folder == base.parent:
            return


def _meets(wanted: Sequence[str], first: str, last: str) -> bool:
    place = bisect_left(wanted, first)
    return place < len(wanted) and wanted[place] <= last


def _may_hold(statistics: dict[str, Any] | None, column: str, wanted: Sequence[str]) -> bool:
    bounds = (statistics or {}).get(column)
    return not bounds or _meets(wanted, bounds["min"], bounds["max"])


def _schema_of(names: Sequence[str]) -> pa.Schema:
    return pa.schema([SPAN_SCHEMA.field(name) for name in names], SPAN_SCHEMA.metadata)
