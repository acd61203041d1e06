"""Reading the spans of a run that may be over: its folder as one Arrow table, and SQL over it.

Invariant: what a live store acknowledged is read; segments are memory-mapped, so a table costs no
copy of its tokens. A folder may be read while a store writes to it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from lightning_ray.errors import UserError
from lightning_ray.spans.schema import SPAN_SCHEMA
from lightning_ray.spans.segment import SUFFIX, read_segment


def read_folder(folder: Path) -> pa.Table:
    """Every span in a store's folder (SPAN_SCHEMA), ordered by attempt and sequence.

    Raises UserError when there are no segments.
    """
    paths = sorted(folder.glob("*" + SUFFIX))
    if not paths:
        raise UserError(f"no spans in {folder}; name the folder `spans` of a run")
    batches = [batch for path in paths for _, batch in read_segment(path).batches]
    table = pa.Table.from_batches(batches, SPAN_SCHEMA)
    return table.sort_by([("attempt_id", "ascending"), ("sequence", "ascending")])


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
    import duckdb

    with duckdb.connect(config={"enable_external_access": "false"}) as connection:
        for name, table in {"spans": spans, **(tables or {})}.items():
            connection.register(name, table)
        try:
            connection.execute("SET lock_configuration = true")
            answer = connection.sql(sql, params=list(parameters))
            if answer is None:
                raise UserError("the query cannot be run: it gives no rows; begin it with SELECT")
            return answer.to_arrow_table()
        except duckdb.Error as error:
            raise UserError(f"the query cannot be run: {' '.join(str(error).split())}") from error
