"""The samples of supervised tuning: chosen from the spans of earlier runs, by reward or by SQL.

Invariant: a sample's tokens are exactly those that were seen and sampled; nothing is tokenised
again. An attempt at a held-out task is never chosen, whatever the choice says. What was left out,
and why, is counted.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.agents import Task
from lightning_ray.errors import UserError
from lightning_ray.spans import SPAN_SCHEMA, query, read_folder
from lightning_ray.spans.rewards import rewards, whole_attempt
from lightning_ray.training.finetuning import FinetuneConfig, SamplesConfig
from lightning_ray.training.folder import RunFolder
from lightning_ray.training.names import MEASURING
from lightning_ray.trajectories import (
    SEQUENCE_SCHEMA,
    build_sequences,
    cut_sequences,
    task_key,
    task_keys,
    trainable_counts,
    with_advantages,
)
from lightning_ray.trajectories.batch import list_arrays

_COLUMNS = {
    "attempt_id": "attempt_id",
    "rollout_id": "any_value(rollout_id)",
    "run_id": "any_value(run_id)",
    "task_id": "any_value(attributes->>'task_id') FILTER (WHERE kind = 'resource')",
    "task": "any_value(attributes->'task') FILTER (WHERE kind = 'resource')",
    "group_id": "any_value(attributes->>'group_id') FILTER (WHERE kind = 'resource')",
    "status": "any_value(attributes->>'status') FILTER (WHERE kind = 'resource')",
    "result": "any_value(attributes->>'stdout') FILTER (WHERE kind = 'resource')",
    "seconds": "any_value((attributes->>'seconds')::DOUBLE) FILTER (WHERE kind = 'resource')",
    "calls": "count(*) FILTER (WHERE kind = 'model_call')",
    "sampled_tokens": "coalesce(sum(len(logprobs)) FILTER (WHERE kind = 'model_call'), 0)",
    "version": "max(version) FILTER (WHERE kind = 'model_call')",
}
"""The table `attempts`, one row an attempt; every named reward is a further column."""


@dataclass(frozen=True)
class Counts:
    """What was chosen, and what was not."""

    attempts: int
    """Attempts in the runs."""
    chosen: int
    """Of these, those that the choice names."""
    heldout: int
    """Of these, attempts at held-out tasks: left out."""
    inexact: int
    """Of these, attempts whose tokens are not exact: left out."""
    empty: int
    """Of these, attempts with no token of the policy: left out."""
    repeated: int
    """Samples whose tokens are those of another one: left out."""
    cut: int
    """Calls that `training.max_sequence_tokens` took from the end of longer sequences."""
    beyond: int
    """Samples left out by `samples.max_samples`."""
    samples: int
    """Samples to learn from: sequences, each a path of an attempt's calls."""
    tokens: int
    """Tokens to learn from, over all samples."""


@dataclass(frozen=True)
class Samples:
    """The samples, and how they were come by."""

    table: pa.Table
    """SEQUENCE_SCHEMA, the credit of every token to learn from 1, its weight."""
    counts: Counts
    runs: tuple[str, ...]
    digest: str
    """Of all tokens and masks, in order: the same samples have the same."""

    def lines(self) -> list[str]:
        """What was chosen, for the person at the terminal."""
        counts = self.counts
        out = {
            "at held-out tasks": counts.heldout,
            "whose tokens are not exact": counts.inexact,
            "with no token of the policy": counts.empty,
        }
        left = "".join(f"; {count:,} {why} left out" for why, count in out.items() if count)
        less = {
            "identical": counts.repeated,
            "calls beyond training.max_sequence_tokens": counts.cut,
            "beyond samples.max_samples": counts.beyond,
        }
        fewer = "".join(f"; {count:,} {why} left out" for why, count in less.items() if count)
        return [
            f"chosen {counts.chosen:,} of {counts.attempts:,} attempts of "
            f"{', '.join(self.runs)}{left}",
            f"learning from {counts.samples:,} samples with {counts.tokens:,} sampled tokens"
            f"{fewer}",
        ]

    def facts(self) -> dict[str, object]:
        """As JSON values, for keeping beside a run."""
        return {"samples": asdict(self.counts), "from": list(self.runs), "digest": self.digest}


def choose_samples(config: FinetuneConfig, base: Path, heldout: Sequence[Task]) -> Samples:
    """Reads the runs' spans and builds the samples that the configuration chooses.

    `base` is the folder of the model to be tuned. Raises UserError when a run has no spans, the
    choice cannot be made (no such reward, wrong SQL), or nothing is left.
    """
    settings = config.samples
    policy = settings.policy or config.policy.name
    folders = _folders(Path(config.output_dir), settings.runs, base)
    tables = {name: read_folder(folder) for name, folder in folders.items()}
    spans = pa.concat_tables(tables.values())
    _check_learner(spans, policy, settings.role)
    attempts = attempts_table(spans)
    chosen = _choose(spans, attempts, settings)
    barred = _heldout(attempts, heldout)
    kept = [attempt for attempt in chosen if attempt not in barred]
    if settings.role is not None:
        tables = {name: _only_role(table, settings.role) for name, table in tables.items()}
    built: list[pa.Table] = []
    left = set(kept)
    inexact = empty = 0
    for table in tables.values():
        there = set(pc.unique(table["attempt_id"]).to_pylist())
        mine = {attempt: attempt for attempt in kept if attempt in left and attempt in there}
        left -= mine.keys()  # A copy of a run among the runs is read once.
        sequences, report = build_sequences(table, mine, policy)
        inexact += len(report.inexact)
        empty += len(report.empty)
        built.append(sequences)
    sequences = pa.concat_tables(built) if built else SEQUENCE_SCHEMA.empty_table()
    sequences, cut = cut_sequences(sequences, config.training.max_sequence_tokens)
    distinct = _distinct(sequences) if settings.deduplicate else sequences
    few = _at_most(distinct, settings.max_samples, config.finetuning.seed)
    counts = Counts(
        attempts=attempts.num_rows,
        chosen=len(chosen),
        heldout=len(chosen) - len(kept),
        inexact=inexact,
        empty=empty,
        repeated=sequences.num_rows - distinct.num_rows,
        cut=cut.calls,
        beyond=distinct.num_rows - few.num_rows,
        samples=few.num_rows,
        tokens=sum(trainable_counts(few).values()),
    )
    if not counts.samples:
        raise UserError(
            f"nothing to learn from: of {counts.chosen} attempts chosen, {counts.heldout} are at "
            f"held-out tasks, the tokens of {counts.inexact} are not exact, and {counts.empty} "
            "have no token of the policy; choose others"
        )
    _check_vocabulary(few, base)
    weighted = with_advantages(few, dict.fromkeys(few["attempt_id"].to_pylist(), 1.0))
    return Samples(weighted, counts, tuple(folders), _digest(weighted))


def attempts_table(spans: pa.Table) -> pa.Table:
    """One row per attempt (the columns of `_COLUMNS`), and the reward that holds of each name."""
    held = whole_attempt(rewards(spans))
    columns = ", ".join(f"{value} AS {_quoted(name)}" for name, value in _COLUMNS.items())
    given = ["attempt_id"]
    for name in sorted(pc.unique(held["name"]).to_pylist()):
        literal = name.replace("'", "''")
        if not name.isprintable():
            continue
        # A reward that has the name of a column keeps out of its way; SQL does not tell case apart.
        taken = name.lower() in _COLUMNS
        column = _quoted(f"reward_{name}" if taken else name)
        given.append(f"any_value(value) FILTER (name = '{literal}') AS {column}")
    return query(
        spans,
        f"SELECT * FROM (SELECT {columns} FROM spans GROUP BY attempt_id) LEFT JOIN "
        f"(SELECT {', '.join(given)} FROM held GROUP BY attempt_id) USING (attempt_id) "
        "ORDER BY attempt_id",
        tables={"held": held},
    )


def _choose(spans: pa.Table, attempts: pa.Table, settings: SamplesConfig) -> list[str]:
    """The ids of the attempts that the settings name, sorted. Raises UserError for none."""
    if settings.sql is not None:
        answer = _ask("sql", settings.sql, settings.sql, spans, attempts)
        if "attempt_id" not in answer.column_names:
            raise UserError(
                f"sql= gives the columns {', '.join(answer.column_names)}; it must give attempt_id"
            )
        ids = set(answer["attempt_id"].to_pylist()) & set(attempts["attempt_id"].to_pylist())
        if not ids:
            raise UserError(
                f"sql= names no attempt of the {attempts.num_rows} there are ({answer.num_rows} "
                "rows); widen it"
            )
        return sorted(ids)
    conditions = []
    if settings.where is not None:
        conditions.append(f"({settings.where}\n)")
    if settings.min_reward is not None:
        _require_reward(spans, settings.reward)
        column = f"reward_{settings.reward}" if settings.reward in _COLUMNS else settings.reward
        conditions.append(f"({_quoted(column)} >= {settings.min_reward!r})")
    text = f"SELECT attempt_id FROM attempts WHERE {' AND '.join(conditions)}"
    typed = f"where={settings.where}" if settings.where is not None else ""
    answer = _ask("where", settings.where or "", text, spans, attempts)
    if not answer.num_rows:
        least = "" if settings.min_reward is None else f" min_reward={settings.min_reward:g}"
        raise UserError(
            f"of {attempts.num_rows} attempts none is chosen by{least} {typed}".rstrip()
            + _highest(attempts, settings)
        )
    return sorted(answer["attempt_id"].to_pylist())


def _ask(word: str, typed: str, sql: str, spans: pa.Table, attempts: pa.Table) -> pa.Table:
    """The answer to a query over `spans` and `attempts`. Raises UserError."""
    try:
        return query(spans, sql.strip().rstrip(";"), tables={"attempts": attempts})
    except UserError as error:
        # Without DuckDB's drawing of the place.
        reason = str(error).partition(" LINE 1:")[0].removeprefix("the query cannot be run: ")
        raise UserError(
            f"{word}={typed}: {reason}; the columns of attempts are "
            f"{', '.join(attempts.column_names)}"
        ) from error


def _require_reward(spans: pa.Table, name: str) -> None:
    names = sorted(pc.unique(whole_attempt(rewards(spans))["name"]).to_pylist())
    if name not in names:
        there = f"there are {', '.join(names)}" if names else "there are no rewards at all"
        raise UserError(f"samples.reward={name}: the spans have no such reward; {there}")


def _highest(attempts: pa.Table, settings: SamplesConfig) -> str:
    if settings.min_reward is None:
        return "; widen it"
    column = f"reward_{settings.reward}" if settings.reward in _COLUMNS else settings.reward
    return f"; the highest {settings.reward} is {pc.max(attempts[column]).as_py():g}, lower it"


def _heldout(attempts: pa.Table, heldout: Sequence[Task]) -> set[str]:
    """Attempts at held-out tasks: of this job's, by content or id, and of the runs' own."""
    keys = task_keys((task.id, task.data) for task in heldout)
    ids = {task.id for task in heldout}
    barred = set()
    names = ["attempt_id", "rollout_id", "task_id", "task"]
    for attempt, rollout, task_id, task in zip(
        *(attempts[name].to_pylist() for name in names), strict=True
    ):
        if rollout.startswith(MEASURING):
            barred.add(attempt)
        elif task is None:
            # Older spans name the task alone.
            if task_id in ids:
                barred.add(attempt)
        elif task_key(json.loads(task)) in keys:
            barred.add(attempt)
    return barred


def _folders(output_dir: Path, runs: Sequence[str], base: Path) -> dict[str, Path]:
    """The spans' folder of each run, each once. Raises UserError."""
    folders: dict[str, Path] = {}
    for run in runs:
        path = Path(run)
        if path.is_dir() and not (path / "overrides.json").exists():
            folders.setdefault(path.name, path.resolve())
            continue
        folder = RunFolder.find(output_dir, run, word="from")
        _check_tokenizer(folder, base)
        folders.setdefault(folder.run_id, folder.spans)
    return folders


def _check_tokenizer(folder: RunFolder, base: Path) -> None:
    """Raises UserError when the run's model has other tokens than the one to be tuned."""
    theirs = folder.facts().get("base_model")
    if theirs is None:
        return
    one, other = Path(theirs) / "tokenizer.json", base / "tokenizer.json"
    if one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes():
        raise UserError(
            f"from={folder.run_id}: its model {theirs} has another tokenizer than {base}, so its "
            "tokens mean something else there; choose a model of the same family in policy.model"
        )


def _check_learner(spans: pa.Table, policy: str, role: str | None) -> None:
    """Raises UserError when there is no call of the policy, or of the role."""
    sql = "SELECT DISTINCT policy, role FROM spans WHERE kind = 'model_call' AND policy IS NOT NULL"
    there = query(spans, sql).to_pylist()
    policies = sorted({row["policy"] for row in there})
    if policy not in policies:
        raise UserError(
            f"no call of the policy {policy!r} in these spans; there are "
            f"{', '.join(policies) or 'none'}: set samples.policy"
        )
    roles = sorted({row["role"] for row in there if row["policy"] == policy and row["role"]})
    if role is not None and role not in roles:
        raise UserError(
            f"samples.role={role}: {policy!r} was never asked for under that name; there are "
            f"{', '.join(roles) or 'none'}"
        )


def _check_vocabulary(samples: pa.Table, base: Path) -> None:
    size = json.loads((base / "config.json").read_text()).get("vocab_size")
    largest = pc.max(pc.list_flatten(samples["token_ids"])).as_py()
    if size is not None and largest >= size:
        raise UserError(
            f"the spans have the token {largest}, but {base} has only {size}: they are of another "
            "model; choose its family in policy.model"
        )


def _only_role(spans: pa.Table, role: str) -> pa.Table:
    """The spans with the calls of other roles as nobody's, so that they are context alone."""
    place = SPAN_SCHEMA.get_field_index("policy")
    policy = pc.if_else(
        pc.fill_null(pc.equal(spans["role"], role), False), spans["policy"], pa.scalar(None)
    )
    return spans.set_column(place, SPAN_SCHEMA.field(place), policy.cast(pa.string()))


def _distinct(sequences: pa.Table) -> pa.Table:
    """The first of the rows that have the same tokens to learn and the same context."""
    offsets, tokens = list_arrays(sequences["token_ids"])
    _, trainable = list_arrays(sequences["trainable"])
    seen: set[bytes] = set()
    first = []
    for row in range(len(offsets) - 1):
        place = slice(offsets[row], offsets[row + 1])
        key = hashlib.sha256(tokens[place].tobytes() + trainable[place].tobytes()).digest()
        if key not in seen:
            seen.add(key)
            first.append(row)
    return sequences.take(pa.array(first, pa.int64()))


def _at_most(sequences: pa.Table, most: int | None, seed: int) -> pa.Table:
    if most is None or sequences.num_rows <= most:
        return sequences
    drawn = np.random.default_rng((seed, 1)).permutation(sequences.num_rows)[:most]
    return sequences.take(pa.array(np.sort(drawn)))


def _digest(samples: pa.Table) -> str:
    digest = hashlib.sha256()
    for name in ("token_ids", "trainable"):
        offsets, values = list_arrays(samples[name])
        digest.update(offsets.tobytes())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
