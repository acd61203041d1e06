"""Sealed segments: Parquet files under any URI that Arrow's file systems know, and what is in them.

Invariant: a segment is sealed when its manifest is there, and then every file that the manifest
names is whole. Names follow from shard, segment and partition, so sealing again after a crash
writes the same files over, and nothing is sealed twice.

Files are partitioned by run, policy and version of policy (Hive's directory names), so that reading
one of these touches only its own files; each is sorted by rollout, and reading a few rollouts
touches only their row groups.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.spans.schema import SCHEMA_VERSION, SPAN_SCHEMA
from lightning_ray.spans.segment import sync_folder
from lightning_ray.spans.segments import write_durably

log = logging.getLogger(__name__)

MANIFEST = ".sealed.json"
NONE = "__none__"
ROW_GROUP = 8192
"""Rows of a row group: what reading one rollout decodes."""

_PARTITION = ("run_id", "policy", "version")
_ORDER = ("rollout_id", "attempt_id", "sequence")
KEYS = (*_PARTITION, *_ORDER, "start_ns")
"""The columns that say where a row goes."""

Numbers = npt.NDArray[np.int64]
RowsOf = Callable[[Numbers], list[pa.RecordBatch]]


@dataclass(frozen=True)
class SealedFile:
    """One Parquet file: the rows of a segment that one version of one policy made in one run."""

    path: str
    """Below the archive's root."""
    run_id: str
    policy: str | None
    version: int | None
    rows: int
    bytes: int

    @property
    def expression(self) -> pc.Expression:
        """What holds for each of its rows."""
        holds = pc.field("run_id") == self.run_id
        for name, value in (("policy", self.policy), ("version", self.version)):
            field = pc.field(name)
            holds &= field.is_null() if value is None else field == value
        return holds


@dataclass(frozen=True)
class Sealed:
    """A segment as it lies in an archive."""

    shard: int
    segment: int
    schema: int
    rows: int
    first_ns: int
    """The earliest start of a span in it, nanoseconds since the epoch."""
    last_ns: int
    files: tuple[SealedFile, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.bytes for file in self.files)

    def write_manifest(self, folder: Path) -> None:
        """Says that the segment is sealed. Raises OSError."""
        write_durably(folder / f"{self.segment:08d}{MANIFEST}", json.dumps(asdict(self)))


def read_manifests(folder: Path) -> list[Sealed]:
    """What is sealed of a shard's folder, by segment. Raises InfrastructureError."""
    found = []
    for path in sorted(folder.glob("*" + MANIFEST)):
        try:
            said = json.loads(path.read_text())
            files = tuple(SealedFile(**file) for file in said.pop("files"))
            found.append(Sealed(**said, files=files))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InfrastructureError(f"{path} cannot be read: {error}") from error
    return found


class Archive:
    """A place that sealed segments are in. Can be pickled."""

    def __init__(self, uri: str):
        """`uri` is a folder, or a URI such as s3://BUCKET/PATH?region=...; keys for it come from
        the environment, as its file system reads them. Raises UserError for no such kind.
        """
        self._uri = uri
        if urlsplit(uri).username is not None:
            # It is written into the store's folder, and into what is logged.
            raise UserError(
                "spans.archive: the URI has a key in it; put keys into the environment (for S3 "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), and leave them out of the URI"
            )
        try:
            if "://" in uri:
                self._files, self._root = fs.FileSystem.from_uri(uri)
            else:
                self._files, self._root = fs.LocalFileSystem(), os.path.abspath(uri)
        except (pa.ArrowException, ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"spans.archive={uri}: {reason}; write a folder or a URI such as s3://BUCKET/PATH"
            ) from error
        self._local = isinstance(self._files, fs.LocalFileSystem)

    def seal(self, keys: pa.Table, rows: RowsOf, shard: int, segment: int) -> Sealed:
        """Writes a segment's rows, a row group at a time, so that it is never in memory whole.

        Args:
            keys: The columns `KEYS` of all rows.
            rows: Gives the rows with these numbers, in that order, as batches of SPAN_SCHEMA.

        Raises OSError; nothing counts then.
        """
        order = pc.sort_indices(keys, [(name, "ascending") for name in KEYS]).to_numpy()
        partition = keys.select(list(_PARTITION)).take(pa.array(order)).to_pandas()
        changes = (partition != partition.shift()) & ~(partition.isna() & partition.shift().isna())
        starts = np.flatnonzero(changes.any(axis=1).to_numpy()).tolist() if len(order) else []
        files = []
        for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
            key = {name: keys[name][int(order[start])].as_py() for name in _PARTITION}
            name = f"shard{shard}-{segment:08d}.parquet"
            path = "/".join([*(f"{part}={_quoted(key[part])}" for part in _PARTITION), name])
            size = self._write(path, order[start:end], rows)
            files.append(SealedFile(path, **key, rows=end - start, bytes=size))
        times = pc.min_max(keys["start_ns"]).as_py()
        return Sealed(
            shard=shard,
            segment=segment,
            schema=SCHEMA_VERSION,
            rows=len(order),
            first_ns=times["min"] or 0,
            last_ns=times["max"] or 0,
            files=tuple(files),
        )

    def dataset(self, files: Sequence[SealedFile]) -> ds.Dataset:
        """The files as one dataset of SPAN_SCHEMA; a filter on their partition skips the others."""
        form = ds.ParquetFileFormat()
        fragments = [
            form.make_fragment(f"{self._root}/{file.path}", self._files, file.expression)
            for file in files
        ]
        return ds.FileSystemDataset(fragments, SPAN_SCHEMA, form, self._files)

    def read(
        self,
        files: Sequence[SealedFile],
        where: pc.Expression | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """The rows for which the expression holds. Raises InfrastructureError when one is gone."""
        named = None if columns is None else list(columns)
        try:
            return self.dataset(files).to_table(columns=named, filter=where)
        except OSError as error:
            raise InfrastructureError(
                f"sealed spans in {self._uri} cannot be read: {error}"
            ) from error

    def delete(self, files: Sequence[SealedFile]) -> None:
        """Deletes files; those that are gone already are no error. Raises OSError."""
        for file in files:
            try:
                self._files.delete_file(f"{self._root}/{file.path}")
            except FileNotFoundError:
                log.info("%s was deleted before", file.path)

    def _write(self, path: str, numbers: Numbers, rows: RowsOf) -> int:
        whole = f"{self._root}/{path}"
        # An object store shows an object when it is whole; a folder needs another name until then.
        temporary = f"{whole}.tmp" if self._local else whole
        self._files.create_dir(whole.rpartition("/")[0], recursive=True)
        with (
            self._files.open_output_stream(temporary) as sink,
            pq.ParquetWriter(sink, SPAN_SCHEMA, compression="zstd") as writer,
        ):
            for start in range(0, len(numbers), ROW_GROUP):
                batches = rows(numbers[start : start + ROW_GROUP])
                writer.write_table(pa.Table.from_batches(batches, SPAN_SCHEMA), ROW_GROUP)
        if self._local:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, whole)
            sync_folder(Path(whole).parent)
        return int(self._files.get_file_info(whole).size)


def _quoted(value: str | int | None) -> str:
    if value is None:
        return NONE
    quoted = quote(str(value), safe="")
    # Nothing that has a name looks like `NONE`.
    return f"%5F{quoted[1:]}" if quoted.startswith("_") else quoted
