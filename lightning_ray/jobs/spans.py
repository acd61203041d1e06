"""lightning-ray spans: look at the spans that a run left, without starting anything.

    lightning-ray spans check RUN heldout=heldout.jsonl
    lightning-ray spans sql RUN "SELECT kind, count(*) FROM spans GROUP BY kind"
    lightning-ray spans export RUN where="kind = 'reward'" --parquet rewards.parquet
    lightning-ray spans forward RUN rollout=ID
    lightning-ray spans remove RUN

RUN is a run's id in output_dir, a run's folder, or a folder of spans. `check` makes the checks that
a training step makes, with the run's own hygiene settings and those that are typed. It ends with
status 0 when nothing was found or only what is dropped or kept, and with 3 when a check whose
policy is `stop` found something, or any check did under --strict.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.table import Table
from rich.text import Text

from lightning_ray.agents import load_tasks
from lightning_ray.errors import UserError
from lightning_ray.jobs.compose import compose_config
from lightning_ray.jobs.spans_export import export, forward, remove_spans
from lightning_ray.jobs.spans_words import OUTPUT_DIR, console, output_dir, parse, spans_folder
from lightning_ray.spans import open_dataset, query, read_folder
from lightning_ray.tracking import write_json
from lightning_ray.training.names import place_of
from lightning_ray.trajectories import (
    AttemptFacts,
    Check,
    HygieneConfig,
    HygieneReport,
    attempts_of_spans,
    check_hygiene,
    distinct_spans,
    inspect,
    rebuild_trees,
    task_keys,
)
from lightning_ray.trajectories.hygiene_report import unit

FOUND = 3
"""Exit status of a check that found what must not be there."""

SHOWN_ROWS = 200
"""Rows of an answer that are printed; files get all of them."""


@dataclass
class SpansCheckConfig:
    """The settings of `spans check`."""

    output_dir: str = OUTPUT_DIR
    """Folder that holds runs."""
    heldout: str | None = None
    """JSONL file of held-out tasks; None makes no check for leakage."""
    hygiene: HygieneConfig = field(default_factory=HygieneConfig)


def main(arguments: Sequence[str]) -> None:
    """Runs a subcommand. Raises UserError for what the user can mend."""
    subcommands: dict[str, Callable[[Sequence[str]], None]] = {
        "check": _check,
        "sql": _sql,
        "export": export,
        "forward": forward,
        "remove": remove_spans,
    }
    name, *rest = arguments or [""]
    if name not in subcommands:
        known = " or ".join(f"`lightning-ray spans {known}`" for known in subcommands)
        raise UserError(f"no subcommand {name!r}; use {known}")
    subcommands[name](rest)


def _check(arguments: Sequence[str]) -> None:
    words, options, strict = parse(arguments, files=("--json",), switch="--strict")
    runs = [word for word in words if "=" not in word]
    if len(runs) != 1:
        raise UserError("name one run: lightning-ray spans check RUN [heldout=FILE]")
    settings = [word for word in words if "=" in word]
    config = compose_config("spans_check", SpansCheckConfig, settings)
    folder = spans_folder(Path(config.output_dir), runs[0])
    own = _own_settings(folder)
    if own:
        config = compose_config("spans_check", SpansCheckConfig, [*own, *settings])
    check_hygiene(config.hygiene)
    heldout = None
    if config.heldout is not None:
        heldout = task_keys((task.id, task.data) for task in load_tasks(config.heldout))
    spans = read_folder(folder)
    report, attempts = check_spans_of(spans, config.hygiene, heldout)
    _show(folder, spans, report, attempts)
    if (path := options.get("--json")) is not None:
        write_json(Path(path), _as_json(folder, spans, report, attempts))
        print(f"written to {path}")
    found = [check for check, count in report.counts.items() if count]
    refused = found if strict else report.stopping()
    if refused:
        print(f"must not be there: {', '.join(check.value for check in refused)}")
        raise SystemExit(FOUND)


def check_spans_of(
    spans: pa.Table, config: HygieneConfig, heldout: dict[str, str] | None
) -> tuple[HygieneReport, list[AttemptFacts]]:
    """Every check over all attempts of a table of spans, and the attempts."""
    spans, repeated = distinct_spans(spans, config)
    attempts = attempts_of_spans(spans, place_of)
    _, inexact = rebuild_trees(spans)
    report = inspect(spans, attempts, config, inexact=inexact, repeated=repeated, heldout=heldout)
    if any(facts.task is not None for facts in attempts):
        return report, attempts
    # Nothing to compare: runs of early versions did not record their tasks.
    report.counts.pop(Check.LEAKAGE, None)
    return report, attempts


def _own_settings(folder: Path) -> list[str]:
    """The hygiene settings that the run was begun with."""
    typed = folder.parent / "overrides.json"
    if not typed.is_file():
        return []
    overrides: list[str] = json.loads(typed.read_text())
    keys = [word.partition("=")[0].lstrip("+") for word in overrides]
    return [
        word
        for word, key in zip(overrides, keys, strict=True)
        if key == "hygiene" or key.startswith("hygiene.")
    ]


def _show(
    folder: Path, spans: pa.Table, report: HygieneReport, attempts: Sequence[AttemptFacts]
) -> None:
    measured = sum(not facts.place.learnt for facts in attempts)
    print(
        f"{spans.num_rows} spans of {len(attempts)} attempts in {folder}"
        + (f"; {measured} attempts only measured" if measured else "")
    )
    table = Table(box=None, pad_edge=False)
    for name in ("check", "policy", "found", "first"):
        table.add_column(name, justify="right" if name == "found" else "left", overflow="fold")
    for check in Check:
        policy = report.policies[check].value
        if check not in report.counts:
            why = "" if policy == "off" else "not checked: needs heldout=FILE and recorded tasks"
            table.add_row(check.value, policy, "-", why)
            continue
        count = report.counts[check]
        first = ""
        if count:
            finding = report.offenders[check][0]
            first = f"{finding.subject}: {finding.reason}"
        found = f"{count} {unit(check, count)}" if count else "0"
        table.add_row(check.value, policy, found, Text(first))
    console().print(table)
    left = len(report.dropped)
    print(f"{left} attempts would be left out of training" if left else "nothing to leave out")


def _as_json(
    folder: Path, spans: pa.Table, report: HygieneReport, attempts: Sequence[AttemptFacts]
) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "spans": spans.num_rows,
        "attempts": len(attempts),
        "policies": {check.value: policy.value for check, policy in report.policies.items()},
        "totals": {check.value: count for check, count in report.counts.items()},
        "offenders": {
            check.value: [finding.to_json() for finding in findings]
            for check, findings in report.offenders.items()
        },
        "dropped": {attempt: check.value for attempt, check in report.dropped.items()},
    }


def _sql(arguments: Sequence[str]) -> None:
    words, options, _ = parse(arguments, files=("--csv", "--parquet"))
    root, words = output_dir(words)
    if len(words) != 2:
        raise UserError('write: lightning-ray spans sql RUN "SELECT ... FROM spans"')
    folder = spans_folder(root, words[0])
    answer = query(open_dataset(folder), words[1])
    try:
        if (path := options.get("--csv")) is not None:
            pyarrow.csv.write_csv(answer, path)
        if (path := options.get("--parquet")) is not None:
            pyarrow.parquet.write_table(answer, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    except pa.ArrowInvalid as error:
        raise UserError(f"{error}; leave those columns out, or use --parquet FILE") from error
    if options:
        print(f"{answer.num_rows} rows written to {', '.join(map(str, options.values()))}")
        return
    table = Table(box=None, pad_edge=False)
    for name in answer.column_names:
        table.add_column(Text(name), overflow="fold")
    for row in answer.slice(0, SHOWN_ROWS).to_pylist():
        table.add_row(*(Text("" if value is None else str(value)) for value in row.values()))
    console().print(table)
    if answer.num_rows > SHOWN_ROWS:
        print(f"... {answer.num_rows - SHOWN_ROWS} more rows; --csv or --parquet FILE writes all")
