"""Reading a folder of spans without its store: as one Arrow table, as a dataset, and by SQL.

Invariant: what a live store acknowledged is read, each segment once, be it open, closed or sealed.
Segments are memory-mapped, so they cost no copy of their tokens; of sealed ones a dataset reads the
columns and the files that a query needs. A folder may be read while a store writes to it. What was
removed is left out, and a warning says what.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.dataset as ds

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.spans.archive import Archive
from lightning_ray.spans.manifests import MANIFEST_SUFFIX, SealedFile, read_manifests
from lightning_ray.spans.retention import SpansRemoved, gone_files, read_removed
from lightning_ray.spans.schema import SPAN_SCHEMA, conform
from lightning_ray.spans.segment import SUFFIX, read_segment

log = logging.getLogger(__name__)

_TRIES = 20


def has_spans(folder: Path) -> bool:
    """Whether it is a folder of spans: it has segments, or had."""
    patterns = ("*" + SUFFIX, "shard-*/*" + SUFFIX, "shard-*/*" + MANIFEST_SUFFIX)
    return any(any(folder.glob(pattern)) for pattern in patterns)


def read_folder(folder: Path) -> pa.Table:
    """Every span in a store's folder (SPAN_SCHEMA), ordered by attempt and sequence.

    Raises UserError when there are no segments, SpansRemoved when all of them were removed.
    """
    try:
        table = open_dataset(folder).to_table()
    except (OSError, pa.ArrowException) as error:
        raise InfrastructureError(f"the spans in {folder} cannot be read: {error}") from error
    return table.sort_by([("attempt_id", "ascending"), ("sequence", "ascending")])


def open_dataset(folder: Path) -> ds.Dataset:
    """The spans in a store's folder as a dataset of SPAN_SCHEMA, in no order; raises as above."""
    for _ in range(_TRIES):
        try:
            return _open(folder)
        except FileNotFoundError as error:
            # Sealed and deleted between the listing and the opening: its manifest is there now.
            last = error
    raise InfrastructureError(f"the segments in {folder} vanish while they are read: {last}")


def _open(folder: Path) -> ds.Dataset:
    # Segments are listed before manifests: one that is missing here was sealed by then.
    paths = sorted([*folder.glob("*" + SUFFIX), *folder.glob("shard-*/*" + SUFFIX)])
    sealed = read_manifests(folder)
    if not paths and not sealed:
        raise UserError(f"no spans in {folder}; name the folder `spans` of a run")
    removed = read_removed(folder)
    for record in removed:
        log.warning("%s: left out: %s", folder, record)
    known = {folder / one.manifest.replace(MANIFEST_SUFFIX, SUFFIX) for one in sealed}
    batches = [
        conform(batch)
        for path in paths
        if path not in known
        for _, batch in read_segment(path).batches
    ]
    gone = gone_files(removed)
    archives: dict[str, list[SealedFile]] = {}
    for one in sealed:
        there = [file for file in one.files if (one.archive, file.path) not in gone]
        archives.setdefault(one.archive, []).extend(there)
    if removed and not batches and not any(archives.values()):
        raise SpansRemoved(f"the spans in {folder} are gone; the last: {removed[-1]}")
    parts = [Archive(uri, folder).dataset(files) for uri, files in archives.items() if files]
    return ds.UnionDataset(SPAN_SCHEMA, [ds.InMemoryDataset(batches, SPAN_SCHEMA), *parts])


class Query(Protocol):
    """A SQL query over a table, as `query` describes it."""

    def __call__(self, sql: str, parameters: Sequence[object] = ()) -> pa.Table: ...


def query(
    spans: "pa.Table | ds.Dataset",
    sql: str,
    parameters: Sequence[object] = (),
    tables: Mapping[str, pa.Table] | None = None,
) -> pa.Table:
    """The answer to a SQL query in which the spans are called `spans`, and `tables` by their names.

    The query reads these tables alone: neither other files nor the network. Of a dataset it reads
    the columns it names and, where it filters by run, policy or version, their files. `attributes`
    is JSON text, for DuckDB's `attributes->>'key'`. Raises UserError when the query cannot be run.
    """
    with querying(spans, tables) as ask:
        return ask(sql, parameters)


@contextmanager
def querying(
    spans: "pa.Table | ds.Dataset", tables: Mapping[str, pa.Table] | None = None
) -> Iterator[Query]:
    """`query` for several queries over the same spans: opening DuckDB costs more than asking it."""
    import duckdb

    with duckdb.connect(config={"enable_external_access": "false"}) as connection:
        for name, table in {"spans": spans, **(tables or {})}.items():
            connection.register(name, table)
        connection.execute("SET lock_configuration = true")

        def ask(sql: str, parameters: Sequence[object] = ()) -> pa.Table:
            try:
                answer = connection.sql(sql, params=list(parameters))
                if answer is None:
                    raise UserError(
                        "the query cannot be run: it gives no rows; begin it with SELECT"
                    )
                return answer.to_arrow_table()
            except duckdb.Error as error:
                reason = " ".join(str(error).split())
                raise UserError(f"the query cannot be run: {reason}") from error

        yield ask
