"""lightning-ray rollouts: the rollouts of a run, while it runs and after.

    lightning-ray rollouts ls RUN status=failed
    lightning-ray rollouts show RUN ROLLOUT
    lightning-ray rollouts retry RUN ROLLOUT ...
    lightning-ray rollouts cancel RUN ROLLOUT ... | all
    lightning-ray rollouts workers RUN

RUN is a run's id in output_dir, or its folder. `ls` and `show` read the queue's journal and the
spans; the others ask the run's own queue, which must be there.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich.table import Table
from rich.text import Text

from lightning_ray.errors import UserError
from lightning_ray.jobs.spans_words import console, output_dir
from lightning_ray.rollouts import RolloutStatus
from lightning_ray.rollouts.journal import NAME, read_journal
from lightning_ray.rollouts.lifecycle import Lifecycle
from lightning_ray.rollouts.lives import Life
from lightning_ray.rollouts.requests import ask_queue
from lightning_ray.spans import SpanKind, has_spans, open_dataset
from lightning_ray.spans.rewards import by_attempt

ANSWER_TIMEOUT_S = 20.0
SHOWN = 50
"""Rollouts that `ls` shows unless limit= is typed."""


def main(arguments: Sequence[str]) -> None:
    """Runs a subcommand. Raises UserError for what the user can mend."""
    subcommands: dict[str, Callable[[Path, list[str]], None]] = {
        "ls": _ls,
        "show": _show,
        "retry": _retry,
        "cancel": _cancel,
        "workers": _workers,
    }
    name, *rest = arguments or [""]
    if name not in subcommands:
        known = ", ".join(f"`lightning-ray rollouts {known}`" for known in subcommands)
        raise UserError(f"no subcommand {name!r}; there are {known}")
    root, words = output_dir(rest)
    if not words or "=" in words[0]:
        raise UserError(f"name the run: lightning-ray rollouts {name} RUN")
    subcommands[name](_folder(root, words[0]), words[1:])


def read_lives(folder: Path) -> list[Life]:
    """The rollouts in a run's journal, in order of arrival. Raises UserError without one."""
    path = folder / "rollouts" / NAME
    if not path.is_file():
        raise UserError(f"{folder}: no rollouts are recorded there ({path} is missing)")
    events, _, _ = read_journal(path)
    lives = Lifecycle(folder.name, 0.0)
    for event in events:
        lives.apply(event)
    # A rollout that was forgotten and queued again is shown as it is now.
    found = {life.spec.rollout_id: life for life in lives.past}
    return list((found | {life.spec.rollout_id: life for life in lives.lives()}).values())


def _folder(root: Path, run: str) -> Path:
    for candidate in (root / run, Path(run)):
        if (candidate / "rollouts").is_dir():
            return candidate
    known = sorted(path.parent.name for path in root.glob("*/rollouts"))
    there = f"the runs there are: {', '.join(known[-5:])}" if known else "no run is there"
    raise UserError(
        f"{run}: no run with rollouts in {root}; {there}; another folder of runs is "
        "output_dir=FOLDER"
    )


def _ls(folder: Path, words: list[str]) -> None:
    named = _named(words, ("status", "task", "group", "attempts", "limit"))
    statuses = [status.value for status in RolloutStatus]
    status = named.get("status")
    if status is not None and status not in statuses:
        raise UserError(f"status={status}: use one of {', '.join(statuses)}")
    least = _whole("attempts", named.get("attempts", "0"))
    limit = _whole("limit", named.get("limit", str(SHOWN)))
    lives = [
        life
        for life in read_lives(folder)
        if status in (None, life.status.value)
        and named.get("task") in (None, life.spec.task_id)
        and named.get("group") in (None, life.spec.group_id)
        and len(life.attempts) >= least
    ]
    table = Table(box=None, pad_edge=False)
    for name in ("rollout", "task", "status", "attempts", "reward", "seconds", "why"):
        table.add_column(name, justify="right" if name in ("attempts", "seconds") else "left")
    for life in lives[-limit:]:
        outcome = life.outcome
        why = "" if outcome is None else " ".join(outcome.error.split())[:80]
        cells = (
            life.spec.rollout_id,
            life.spec.task_id,
            life.status.value + (" (a fault of ours)" if life.faulted else ""),
            str(len(life.attempts)),
            "" if outcome is None else _rewards(outcome.rewards),
            "" if outcome is None else f"{outcome.seconds:.1f}",
            why,
        )
        table.add_row(*(Text(cell) for cell in cells))
    console().print(table)
    more = len(lives) - min(limit, len(lives))
    print(f"{len(lives)} rollouts" + (f", the last {limit} shown; limit=N shows more" * bool(more)))


def _show(folder: Path, words: list[str]) -> None:
    if len(words) != 1:
        raise UserError("name one rollout: lightning-ray rollouts show RUN ROLLOUT")
    life = next((x for x in read_lives(folder) if x.spec.rollout_id == words[0]), None)
    if life is None:
        raise UserError(
            f"no rollout {words[0]} in {folder}; `lightning-ray rollouts ls` lists them"
        )
    spec = life.spec
    print(f"{spec.rollout_id}: {life.status.value}, task {spec.task_id}")
    print(f"  {json.dumps(spec.task, ensure_ascii=False)[:300]}")
    rows, given = _spans_of(folder, spec.rollout_id)
    for attempt in life.history():
        began = datetime.fromtimestamp(attempt.began).isoformat(" ", "seconds")
        took = "" if attempt.ended is None else f" after {attempt.ended - attempt.began:.1f} s"
        print(f"\n{attempt.attempt_id}: {attempt.status.value}{took}, began {began}")
        if rewards := given.get(attempt.attempt_id):
            print(f"  rewards: {_rewards(rewards)}")
        if attempt.outcome is not None and attempt.outcome.error:
            print("".join(f"  {line}\n" for line in attempt.outcome.error.splitlines()), end="")
        for row in rows:
            if row["attempt_id"] == attempt.attempt_id:
                print(f"  {_span_line(row)}")


def _spans_of(
    folder: Path, rollout_id: str
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """The rollout's spans by attempt and sequence, and the rewards that hold."""
    spans = folder / "spans"
    if not has_spans(spans):
        return [], {}
    table = open_dataset(spans).to_table(filter=pc.field("rollout_id") == rollout_id)
    table = table.sort_by([("attempt_id", "ascending"), ("sequence", "ascending")])
    return table.to_pylist(), by_attempt(table)


def _span_line(row: dict[str, Any]) -> str:
    parts = [f"{row['sequence']:3}", row["kind"], row["name"]]
    if row["kind"] == SpanKind.MODEL_CALL:
        parts.append(f"{row['policy']}@{row['version']}")
        sampled = len(row["logprobs"] or ())
        parts.append(f"{(row['prefix_tokens'] or 0) + len(row['token_ids'] or ())} tokens")
        parts.append(f"{sampled} of them sampled")
    if row["value"] is not None:
        step = "" if row["step"] is None else f" at step {row['step']}"
        parts.append(f"{row['value']:g}{step} by {row['source'] or 'grader'}")
    if row["status"] != "ok":
        parts.append(f"({row['status']})")
    return "  ".join(parts) + f"  {(row['end_ns'] - row['start_ns']) / 1e9:.2f} s"


def _retry(folder: Path, words: list[str]) -> None:
    _require_known(folder, words, "retry")
    queued = ask_queue(folder / "rollouts", "retry", words, ANSWER_TIMEOUT_S)
    left = [name for name in words if name not in queued]
    print(f"queued again: {', '.join(queued) or 'none'}")
    if left:
        print(f"not queued, for they have not ended or were forgotten: {', '.join(left)}")


def _cancel(folder: Path, words: list[str]) -> None:
    if words == ["all"]:
        words = [x.spec.rollout_id for x in read_lives(folder) if not x.status.ended]
        if not words:
            print("nothing to cancel: every rollout has ended")
            return
    _require_known(folder, words, "cancel")
    cancelled = ask_queue(folder / "rollouts", "cancel", words, ANSWER_TIMEOUT_S)
    print(f"{len(cancelled)} rollouts cancelled")


def _workers(folder: Path, words: list[str]) -> None:
    if words:
        raise UserError("lightning-ray rollouts workers RUN takes nothing else")
    found = ask_queue(folder / "rollouts", "workers", [], ANSWER_TIMEOUT_S)
    table = Table(box=None, pad_edge=False)
    for name in ("worker", "state", "last word"):
        table.add_column(name)
    for worker, state, silent in found:
        table.add_row(worker, state, f"{silent:.0f} s ago")
    console().print(table)
    print(f"{len(found)} workers")


def _require_known(folder: Path, names: Sequence[str], command: str) -> None:
    if not names:
        raise UserError(f"name rollouts: lightning-ray rollouts {command} RUN ROLLOUT ...")
    known = {life.spec.rollout_id for life in read_lives(folder)}
    if strangers := [name for name in names if name not in known]:
        raise UserError(
            f"no rollout {strangers[0]} in {folder}; `lightning-ray rollouts ls` lists them"
        )


def _named(words: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    named = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in keys or not value:
            raise UserError(f"{word}: write one of {', '.join(f'{key}=...' for key in keys)}")
        named[key] = value
    return named


def _whole(key: str, value: str) -> int:
    if not value.isdecimal():
        raise UserError(f"{key}={value}: must be a whole number")
    return int(value)


def _rewards(rewards: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:g}" for name, value in rewards.items())
