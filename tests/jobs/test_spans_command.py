"""`lightning-ray spans` over folders that the real store wrote."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest

from lightning_ray.errors import UserError
from lightning_ray.jobs.spans import main
from lightning_ray.rollouts.types import AttemptOutcome, AttemptStatus, Lease
from lightning_ray.rollouts.worker import _end_spans
from lightning_ray.spans import SpanKind, SpansConfig, span, to_batch
from lightning_ray.spans.segment import SegmentWriter
from lightning_ray.spans.store import SpanStore
from lightning_ray.training.names import place_of, rollout_id

GOOD = AttemptOutcome(AttemptStatus.SUCCEEDED, {"reward": 1.0, "exact": 1.0}, result="42")
CRASH = AttemptOutcome(AttemptStatus.FAILED, error="exit code 3\nRuntimeError: no disk")


def attempt(place: int, sample: int, outcome: AttemptOutcome, **call: Any) -> list[dict[str, Any]]:
    """One attempt's spans, its end as the worker writes it."""
    rollout = rollout_id("s00001", "abc123", place, sample)
    lease = Lease(
        "run", rollout, f"{rollout}/1", 1, f"t{place}", {"question": f"{place}?"}, 1.0, "", "g"
    )
    tokens = [1, 2, 100 * place + sample]
    made = span(
        SpanKind.MODEL_CALL,
        "/v1/chat/completions",
        run_id="run",
        rollout_id=rollout,
        attempt_id=lease.attempt_id,
        **{
            "policy": "policy",
            "version": 0,
            "token_ids": tokens,
            "logprobs": [-0.5],
            "finish_reason": "stop",
            **call,
        },
    )
    return [made, *_end_spans(lease, outcome, None, 0)]


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """A run's folder, `outputs/run-1`, written by the store; no attempt has a defect."""
    folder = tmp_path / "outputs" / "run-1"

    async def write() -> None:
        store = SpanStore(str(folder / "spans"), SpansConfig())
        for place in range(2):
            for sample in range(2):
                outcome = replace(GOOD, rewards={"reward": float(sample)})
                await store.append(to_batch(attempt(place, sample, outcome)))
        await store.close()

    asyncio.run(write())
    return folder


@pytest.fixture
def spoil(clean: Path) -> Callable[..., None]:
    """Writes another attempt of the run into a segment of its own."""

    def write(outcome: AttemptOutcome, **call: Any) -> None:
        sample = len(list((clean / "spans").glob("*.arrows"))) + 3
        writer = SegmentWriter(clean / "spans" / f"{sample:08d}.arrows")
        writer.append(to_batch(attempt(0, sample, outcome, **call)))
        writer.close()

    return write


def test_a_clean_run_has_status_0_however_it_is_named(clean: Path, cli, capsys) -> None:
    done = cli.run("spans", "check", "run-1", f"output_dir={clean.parent}", "--strict")
    assert done.returncode == 0, done.stderr
    assert "12 spans of 4 attempts" in done.stdout and "nothing to leave out" in done.stdout
    for named in (clean, clean / "spans"):
        main(["check", str(named), "--strict"])
        assert "12 spans of 4 attempts" in capsys.readouterr().out


def test_findings_are_counted_and_named(clean: Path, spoil, tmp_path: Path, capsys) -> None:
    spoil(CRASH)
    spoil(CRASH)
    spoil(GOOD, finish_reason="length")
    main(["check", str(clean), "--json", str(tmp_path / "found.json")])
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("infrastructure_faults")]
    assert "2 attempts" in line and "exit code 3 RuntimeError: no disk" in line
    assert "2 attempts would be left out of training" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert {check: n for check, n in found["totals"].items() if n} == {
        "infrastructure_faults": 2,
        "cut_traces": 1,
    }
    assert "leakage" not in found["totals"]
    assert set(found["dropped"].values()) == {"infrastructure_faults"}
    (cut,) = found["offenders"]["cut_traces"]
    assert cut["attempt_ids"] == ["s00001-abc123-0000-05/1"] and "length" in cut["reason"]


def test_status_3_says_that_something_must_not_be_there(clean: Path, spoil, cli) -> None:
    spoil(GOOD, finish_reason="length")
    main(["check", str(clean)])
    assert cli.run("spans", "check", str(clean), "--strict").returncode == 3
    with pytest.raises(SystemExit) as ended:
        main(["check", str(clean), "hygiene.cut_traces=stop"])
    assert ended.value.code == 3
    main(["check", str(clean), "hygiene.cut_traces=off", "--strict"])


def test_a_held_out_task_that_was_trained_on(clean: Path, tmp_path: Path, capsys) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"id": "h1", "question": "7?"}\n')
    main(["check", str(clean), f"heldout={heldout}", "--strict"])
    heldout.write_text('{"id": "h1", "question": "7?"}\n{"id": "h2", "question": " 1?"}\n')
    with pytest.raises(SystemExit) as ended:
        main(["check", str(clean), f"heldout={heldout}"])
    assert ended.value.code == 3
    assert "its task t1 is the held-out task h2" in capsys.readouterr().out
    main(["check", str(clean), f"heldout={heldout}", "hygiene.leakage=warn"])


def test_the_settings_of_the_run_count_unless_others_are_typed(clean: Path, spoil) -> None:
    spoil(GOOD, finish_reason="length")
    typed = ["experiment=calculator", "hygiene.cut_traces=stop", "training.steps=2"]
    (clean / "overrides.json").write_text(json.dumps(typed))
    with pytest.raises(SystemExit):
        main(["check", str(clean)])
    main(["check", str(clean), "hygiene.cut_traces=warn"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "no subcommand ''; use `lightning-ray spans check`"),
        (["drop"], "no subcommand 'drop'"),
        (["check"], "name one run"),
        (["check", "yesterday"], "the runs there are: run-1"),
        (["check", "run-1", "hygiene.leak=drop"], "hygiene.leak"),
        (["check", "run-1", "hygiene.leakage=ignore"], "expected one of [drop, warn, stop, off]"),
        (["check", "run-1", "hygiene.max_duplicate_share=2"], "hygiene.max_duplicate_share=2"),
        (["check", "run-1", "heldout=/nowhere.jsonl"], "/nowhere.jsonl: cannot read"),
        (["check", "run-1", "--fast"], "no option --fast; there are --json FILE, --strict"),
        (["check", "run-1", "--json"], "--json needs a file"),
        (["sql", "run-1"], "lightning-ray spans sql RUN"),
        (["sql", "run-1", "SELECT nothing FROM spans"], "the query cannot be run"),
        (["sql", "run-1", "SELECT 1", "--csv", "/nowhere/a.csv"], "cannot write /nowhere/a.csv"),
        (["sql", "run-1", "SELECT token_ids FROM spans", "--csv", "a.csv"], "--parquet"),
    ],
)
def test_a_mistake_is_one_line(clean: Path, words: list[str], named: str, monkeypatch) -> None:
    monkeypatch.chdir(clean.parent)
    with pytest.raises(UserError) as raised:
        main([*words, *(["output_dir=."] if "run-1" in words or "yesterday" in words else [])])
    assert named in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_sql_prints_a_table_and_writes_files(clean: Path, tmp_path: Path, cli, capsys) -> None:
    sql = "SELECT kind, count(*) AS spans FROM spans GROUP BY kind ORDER BY kind"
    done = cli.run("spans", "sql", str(clean), sql)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["kind", "spans"],
        ["model_call", "4"],
        ["resource", "4"],
        ["reward", "4"],
    ]
    files = {name: tmp_path / f"answer.{name}" for name in ("csv", "parquet")}
    words = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    main(["sql", str(clean), "SELECT name, value FROM spans WHERE kind = 'reward'", *words])
    assert "4 rows written to" in capsys.readouterr().out
    assert pyarrow.csv.read_csv(files["csv"])["value"].to_pylist() == [0.0, 1.0, 0.0, 1.0]
    assert pyarrow.parquet.read_table(files["parquet"]).num_rows == 4


def test_a_rollouts_name_says_where_it_stands() -> None:
    step = place_of(rollout_id("s00003", "0a1b2c", 7, 12), "whatever")
    assert (step.group, step.batch, step.learnt) == ("s00003-0a1b2c-0007", "s00003-0a1b2c", True)
    measured = place_of(rollout_id("heldout-s00000", "0a1b2c", 0, 0), None)
    assert not measured.learnt
    live = place_of("conversation-17", "g")
    assert (live.group, live.batch, live.learnt) == ("g", None, True)
