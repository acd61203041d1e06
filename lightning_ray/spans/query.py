"""Reading the spans of a run that may be over: its folder as one Arrow table, and SQL over it.

Invariant: what a live store acknowledged is read, and once, whether it lies in a segment, in the
archive, or in both. Segments are memory-mapped, so a table costs no copy of their tokens. A folder
may be read while a store writes to it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

import pyarrow as pa
import pyarrow.dataset as ds

from lightning_ray.errors import UserError
from lightning_ray.spans.archive import Archive, SealedFile, read_manifests
from lightning_ray.spans.layout import read_layout
from lightning_ray.spans.schema import SPAN_SCHEMA
from lightning_ray.spans.segment import SUFFIX, read_segment

Spans: TypeAlias = "pa.Table | ds.Dataset"
"""Rows of SPAN_SCHEMA, in memory or not yet."""


def open_folder(folder: Path) -> ds.Dataset:
    """Every span in a store's folder, to be scanned; until then segments are only mapped.

    Raises UserError when there are no spans.
    """
    batches: list[pa.RecordBatch] = []
    sealed: list[SealedFile] = []
    layout = read_layout(folder)
    for place in [folder] if layout is None else layout.folders:
        # Manifests first: a segment's file goes only after its manifest has come.
        archived = {found.segment: found for found in read_manifests(place)}
        here: set[int] = set()
        for path in sorted(place.glob("*" + SUFFIX)):
            try:
                batches += [batch for _, batch in read_segment(path).batches]
            except FileNotFoundError:
                archived |= {found.segment: found for found in read_manifests(place)}
                continue
            here.add(int(path.stem))
        sealed += [file for n, found in archived.items() if n not in here for file in found.files]
    if layout is None and not batches and not any(folder.glob("*" + SUFFIX)):
        raise UserError(f"no spans in {folder}; name the folder `spans` of a run")
    parts: list[ds.Dataset] = [ds.dataset(pa.Table.from_batches(batches, SPAN_SCHEMA))]
    if sealed and layout is not None:
        parts.append(Archive(layout.archive_uri).dataset(sealed))
    return parts[0] if len(parts) == 1 else ds.UnionDataset(SPAN_SCHEMA, parts)


def read_folder(folder: Path) -> pa.Table:
    """Every span in a store's folder (SPAN_SCHEMA), ordered by attempt and sequence.

    Raises UserError when there are no segments.
    """
    table = open_folder(folder).to_table()
    return table.sort_by([("attempt_id", "ascending"), ("sequence", "ascending")])


class Query(Protocol):
    """A SQL query over a table, as `query` describes it."""

    def __call__(self, sql: str, parameters: Sequence[object] = ()) -> pa.Table: ...


def query(
    spans: Spans,
    sql: str,
    parameters: Sequence[object] = (),
    tables: Mapping[str, Spans] | None = None,
) -> pa.Table:
    """The answer to a SQL query in which the spans are called `spans`, and `tables` by their names.

    The query reads these alone: neither files nor the network. Of a dataset only the columns, rows
    and files that the query needs are read. `attributes` is JSON text, for DuckDB's
    `attributes->>'key'`. Raises UserError when the query cannot be run.
    """
    with querying(spans, tables) as ask:
        return ask(sql, parameters)


@contextmanager
def querying(spans: Spans, tables: Mapping[str, Spans] | None = None) -> Iterator[Query]:
    """`query` for several queries over one table: opening DuckDB costs more than asking it."""
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
