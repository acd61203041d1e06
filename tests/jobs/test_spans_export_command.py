"""`lightning-ray spans export`, `forward` and `remove` over open and sealed segments."""

import asyncio
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from lightning_ray.errors import UserError
from lightning_ray.jobs.spans import main
from lightning_ray.spans import (
    SPAN_SCHEMA,
    SpanKind,
    SpansConfig,
    read_folder,
    span,
    to_batch,
)
from lightning_ray.spans.store import SpanStore


def attempt(rollout):
    where = {"run_id": "run-1", "rollout_id": rollout, "attempt_id": f"{rollout}/1"}
    return to_batch(
        [
            span(SpanKind.MODEL_CALL, "/v1", **where, token_ids=[1, 2], logprobs=[-0.5]),
            span(SpanKind.REWARD, "reward", **where, value=1.0),
        ]
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs" / "run-1" / "spans"

    async def write() -> None:
        store = SpanStore(str(folder), SpansConfig(keep_local_bytes=0))
        await store.append(attempt("old"))
        assert await store.seal() == 1
        await store.append(attempt("new"))
        await store.close()

    asyncio.run(write())
    return folder.parent


def test_sql_and_export_read_sealed_and_open_segments(run, tmp_path, capsys):
    main(["sql", str(run), "SELECT rollout_id FROM spans WHERE value = 1 ORDER BY 1"])
    assert capsys.readouterr().out.split() == ["rollout_id", "new", "old"]
    target = tmp_path / "all.parquet"
    main(["export", str(run), "--parquet", target.as_uri()])
    assert "4 spans written" in capsys.readouterr().out
    found = pa.parquet.read_table(target)
    assert found.schema.equals(SPAN_SCHEMA) and found.equals(read_folder(run / "spans"))
    main(["export", str(run), "where=kind = 'model_call'", "--csv", str(tmp_path / "a.csv")])
    assert pa.csv.read_csv(tmp_path / "a.csv")["token_ids"].to_pylist() == ["[1, 2]"] * 2


def test_forwarding_twice_makes_one_trace(run, capsys):
    main(["forward", str(run), "rollout=old,new"])
    first = capsys.readouterr().out
    assert "2 traces in sqlite:///" in first and "it was there" not in first
    main(["forward", str(run), "where=name = 'reward'"])
    assert capsys.readouterr().out.count("it was there") == 2


def test_remove_shows_first_and_says_so_afterwards(run, capsys):
    main(["remove", str(run)])
    out = capsys.readouterr().out
    assert "would remove 2 spans" in out and "--yes" in out
    assert read_folder(run / "spans").num_rows == 4
    main(["remove", str(run), "--yes"])
    assert "removed 2 spans" in capsys.readouterr().out
    assert read_folder(run / "spans").num_rows == 2
    with pytest.raises(UserError, match=r"rollout old: its spans are gone.*by hand"):
        main(["forward", str(run), "rollout=old"])
    main(["remove", str(run), "--yes"])
    assert "nothing to remove" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["export"], "name the file"),
        (["export", "--parquet", "/nowhere/a.parquet"], "cannot write /nowhere/a.parquet"),
        (["export", "--parquet", "gopher://x/a"], "cannot write gopher://x/a"),
        (["export", "where=nothing = 1", "--csv", "a.csv"], "the query cannot be run"),
        (["export", "when=1", "--csv", "a.csv"], "when=1"),
        (["forward"], "choose what is forwarded"),
        (["forward", "rollout=none"], "no such rollout"),
        (["forward", "where=value = 7"], "no span is so"),
        (["remove", "keep_days=-1"], "above 0"),
    ],
)
def test_a_mistake_is_one_line(run, words, named):
    with pytest.raises(UserError) as raised:
        main([words[0], str(run), *words[1:]])
    assert named in str(raised.value) and len(str(raised.value).splitlines()) == 1
