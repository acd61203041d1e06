"""Reading the spans of a run that may be over: its folder as one Arrow table, and SQL over it.

Invariant: what a live store acknowledged is read; segments are memory-mapped, so a table costs no
copy of its tokens. A folder may be read while a store writes to it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from lightning_ray.errors import UserError
from lightning_ray.spans.schema import SPAN_SCHEMA
from lightning_ray.spans.segment import SUFFIX, read_segment


def read_folder(folder: Path) -> pa.Table:
    """Every span in a store's folder (SPAN_SCHEMA), ordered by attempt and sequence.

    Raises UserError when there are no segments.
    """
    paths = sorted(folder.rglob("*" + SUFFIX))
    if not paths:
        raise UserError(f"no spans in {folder}; name the folder `spans` of a run")
    batches = [batch for path in paths for _, batch in read_segment(path).batches]
    table = pa.Table.from_batches(batches, SPAN_SCHEMA)
    return table.sort_by([("attempt_id", "ascending"), ("sequence", "ascending")])


class Query(Protocol):
    """A SQL query over a table, as `query` describes it."""

    def __call__(self, sql: str, parameters: Sequence[object] = ()) -> pa.Table: ...


def query(
    spans: pa.Table,
    sql: str,
    parameters: Sequence[object] = (),
    tables: Mapping[str, pa.Table] | None = None,
) -> pa.Table:
    """The answer to a SQL query in which the table is called `spans`, and `tables` by their names.

    The query reads these tables alone: neither files nor the network. `attributes` is JSON text,
    for DuckDB's `attributes->>'key'`. Raises UserError when the query cannot be run.
    """
    with querying(spans, tables) as ask:
        return ask(sql, parameters)


@contextmanager
def querying(spans: pa.Table, tables: Mapping[str, pa.Table] | None = None) -> Iterator[Query]:
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
