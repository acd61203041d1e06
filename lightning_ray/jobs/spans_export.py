"""lightning-ray spans export, forward and remove: spans to a file, to MLflow, and away.

`export` writes the spans, all or those of a SQL condition, to Parquet (a file or any `pyarrow.fs`
URI) or CSV. `forward` makes MLflow traces of chosen attempts. `remove` shows what it would remove,
and removes it with --yes.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet

from lightning_ray.errors import UserError
from lightning_ray.jobs.compose import override_value
from lightning_ray.jobs.spans_words import output_dir, parse, spans_folder
from lightning_ray.spans import SPAN_SCHEMA, open_dataset, query, read_folder
from lightning_ray.spans.manifests import read_manifests
from lightning_ray.spans.retention import (
    check_not_removed,
    finish_removals,
    gone_files,
    plan_removals,
    read_removed,
    remove,
)
from lightning_ray.tracking import TrackingConfig
from lightning_ray.tracking.store import default_uri, without_password
from lightning_ray.tracking.traces import forward_attempt, place_for_traces
from lightning_ray.training import RunFolder


def export(arguments: Sequence[str]) -> None:
    """Writes spans to a file. Raises UserError."""
    words, options, _ = parse(arguments, files=("--parquet", "--csv"))
    folder, named = _words(words, ("where",))
    if not options:
        raise UserError("name the file: --parquet FILE_OR_URI or --csv FILE")
    spans = _chosen(folder, named["where"]) if "where" in named else read_folder(folder)
    for option, target in options.items():
        try:
            if option == "--parquet":
                filesystem, path = _target(target)
                pa.parquet.write_table(spans, path, filesystem=filesystem, compression="zstd")
            else:
                pa.csv.write_csv(_flat(spans), target)
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot write {without_password(target)}: {reason}") from error
        print(f"{spans.num_rows} spans written to {target}")


def forward(arguments: Sequence[str]) -> None:
    """Makes MLflow traces of chosen attempts. Raises UserError."""
    words, _, _ = parse(arguments, files=())
    folder, named = _words(words, ("rollout", "where", "tracking.uri"))
    if ("rollout" in named) == ("where" in named):
        raise UserError('choose what is forwarded: rollout=ID,... or where="SQL"')
    dataset = open_dataset(folder)
    if "rollout" in named:
        chosen = [name for name in named["rollout"].split(",") if name]
        check_not_removed(folder, chosen)
        sql = "SELECT DISTINCT rollout_id FROM spans WHERE list_contains(?, rollout_id)"
        there = set(query(dataset, sql, [chosen])["rollout_id"].to_pylist())
        for name in chosen:
            if name not in there:
                raise UserError(f"rollout={name}: no such rollout in {folder}")
        condition, parameters = "list_contains(?, rollout_id)", [chosen]
    else:
        sql = f"SELECT DISTINCT attempt_id FROM spans WHERE ({named['where']}\n)"
        attempts = query(dataset, sql)["attempt_id"].to_pylist()
        if not attempts:
            raise UserError(f"where={named['where']}: no span is so in {folder}")
        condition, parameters = "list_contains(?, attempt_id)", [attempts]
    sql = f"SELECT * FROM spans WHERE {condition} ORDER BY attempt_id, sequence"
    rows = query(dataset, sql, parameters).cast(SPAN_SCHEMA).to_pylist()
    run = RunFolder(folder.absolute().parent)
    typed = (
        override_value(run.overrides(), "tracking.uri")
        if (run.path / "overrides.json").is_file()
        else None
    )
    uri = named.get("tracking.uri") or typed or default_uri(run.path.parent)
    mlflow_run = run.facts().get("mlflow_run_id")
    experiment = place_for_traces(uri, mlflow_run, TrackingConfig.experiment, run.path.parent)
    by_attempt: dict[tuple[str, str], list[dict[str, object]]] = {}
    for row in rows:
        by_attempt.setdefault((row["run_id"], row["attempt_id"]), []).append(row)
    for spans in by_attempt.values():
        done = forward_attempt(uri, experiment, spans, mlflow_run)
        said = "" if done.new else "; it was there"
        print(f"{done.attempt_id}: {done.spans} spans, trace {done.trace_id}{said}")
    print(f"{len(by_attempt)} traces in {without_password(uri)}")


def remove_spans(arguments: Sequence[str]) -> None:
    """Shows or removes sealed spans. Raises UserError."""
    words, _, sure = parse(arguments, files=(), switch="--yes")
    folder, named = _words(words, ("keep_days", "keep_bytes"))
    days, size = (_number(key, named.get(key)) for key in ("keep_days", "keep_bytes"))
    finish_removals(folder)
    sealed = read_manifests(folder)
    gone = gone_files(read_removed(folder))
    now = time.time_ns()
    if named:
        plans = plan_removals(sealed, gone, now_ns=now, keep_days=days, keep_bytes=int(size))
    else:
        runs = sorted({file.run_id for one in sealed for file in one.files})
        plans = [
            plan for run in runs for plan in plan_removals(sealed, gone, now_ns=now, run_id=run)
        ]
    if not plans:
        print(f"nothing to remove: {folder} has no such sealed spans")
        return
    for plan in plans:
        said = f"{plan.rows} spans, {plan.bytes} bytes of run {plan.run_id} ({plan.reason})"
        if sure:
            done = remove(folder, plan, now)
            print(f"removed {said}, of {done.rollouts} rollouts")
        else:
            print(f"would remove {said}")
    if not sure:
        print("nothing was removed; --yes removes it")


def _words(words: Sequence[str], keys: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """The folder that RUN names, and the words KEY=VALUE. Raises UserError."""
    root, rest = output_dir(words)
    named = {}
    runs = []
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals:
            runs.append(word)
        elif key in keys and value:
            named[key] = value
        else:
            raise UserError(f"{word}: write one of {', '.join(f'{key}=...' for key in keys)}")
    if len(runs) != 1:
        raise UserError("name one run: its id in output_dir, its folder, or a folder of spans")
    return spans_folder(root, runs[0]), named


def _chosen(folder: Path, where: str) -> pa.Table:
    sql = f"SELECT * FROM spans WHERE ({where}\n) ORDER BY attempt_id, sequence"
    return query(open_dataset(folder), sql).cast(SPAN_SCHEMA)


def _target(text: str) -> tuple[pa.fs.FileSystem | None, str]:
    return pa.fs.FileSystem.from_uri(text) if "://" in text else (None, text)


def _flat(spans: pa.Table) -> pa.Table:
    """Lists as text, which CSV has a place for."""
    lists = [field.name for field in SPAN_SCHEMA if pa.types.is_list(field.type)]
    texts = ", ".join(f"CAST({name} AS VARCHAR) AS {name}" for name in lists)
    return query(spans, f"SELECT * REPLACE ({texts}) FROM spans")


def _number(key: str, value: str | None) -> float:
    if value is None:
        return 0.0
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not number > 0:
        raise UserError(f"{key}={value}: must be a number above 0")
    return number
