"""Runs side by side: what was set differently, the figures each came to, and the tables of both.

Invariant: a figure that a run does not have is None, and `-` in a table; it is never a zero.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.table import Table

from lightning_ray.tracking.recorded import HELDOUT, RecordedRun

Figures = Mapping[str, float | None]

FIGURES = {
    "steps": ("steps trained", ",.0f"),
    "steps_planned": ("steps planned", ",.0f"),
    "reward_first": ("reward, first step", ".3f"),
    "reward_last": ("reward, last step", ".3f"),
    "reward_best": ("reward, best step", ".3f"),
    "reward_best_step": ("  which step", ",.0f"),
    "train_seconds": ("train seconds", ",.0f"),
    "seconds_per_step": ("seconds a step", ",.1f"),
    "tokens_sampled": ("tokens sampled", ",.0f"),
    "staleness_mean": ("staleness, mean", ".2f"),
    "staleness_max": ("staleness, largest", ".0f"),
    "left_out": ("rollouts left out", ",.0f"),
}
"""By the name in JSON: the words and the format of the table. Held-out scores come before them."""


def differing(configs: Sequence[Mapping[str, str]]) -> dict[str, list[str | None]]:
    """The keys that are not the same in all, with each one's value; None where it is not set."""
    keys = sorted({key for config in configs for key in config})
    rows = {key: [config.get(key) for config in configs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def heldout_measures(runs: Sequence[RecordedRun]) -> list[str]:
    """The measures that held-out tasks were scored by in any of the runs, the reward first."""
    names = dict.fromkeys(
        name.removeprefix(HELDOUT)
        for run in runs
        for row in run.scored
        for name in row
        if name.startswith(HELDOUT)
    )
    return sorted(names, key=lambda name: name != "reward")


def heldout(run: RecordedRun, measure: str, *, after: bool) -> float | None:
    """The score before the first step, or the newest one after any step; None where not scored."""
    name = HELDOUT + measure
    values = [row[name] for row in run.scored if name in row and (row["step"] > 0) is after]
    return values[-1] if values else None


def figures(run: RecordedRun) -> dict[str, float | None]:
    """The run's figures by the names of `FIGURES`, from as many steps as it has trained."""
    rows = run.trained
    rewards = [(row["reward"], row["step"]) for row in rows if "reward" in row]
    # The first of several equally good ones.
    best = max(rewards, key=lambda pair: (pair[0], -pair[1]), default=(None, None))
    seconds = _column(rows, "seconds")
    staleness = _column(rows, "staleness")
    planned = run.config.get("training.steps", "")
    return {
        "steps": float(len(rows)),
        "steps_planned": float(planned) if planned.isdigit() else None,
        "reward_first": rewards[0][0] if rewards else None,
        "reward_last": rewards[-1][0] if rewards else None,
        "reward_best": best[0],
        "reward_best_step": best[1],
        "train_seconds": sum(seconds) if seconds else None,
        "seconds_per_step": fmean(seconds) if seconds else None,
        "tokens_sampled": _sum(_column(rows, "sampled_tokens")),
        "staleness_mean": fmean(staleness) if staleness else None,
        "staleness_max": max(staleness, default=None),
        "left_out": _sum(_column(rows, "left_out")),
    }


def configuration_table(rows: Mapping[str, Sequence[str | None]], labels: Sequence[str]) -> Table:
    """The rows of `differing`."""
    table = _table("configuration", labels)
    for key, values in rows.items():
        table.add_row(key, *("-" if value is None else value for value in values))
    return table


def figures_table(
    columns: Sequence[Figures], labels: Sequence[str], first: Mapping[str, Sequence[str]]
) -> Table:
    """The rows of `first`, words already, and below them the figures, one column a run."""
    table = _table("figures", labels, justify="right")
    for words, texts in first.items():
        table.add_row(words, *texts)
    for name, (words, style) in FIGURES.items():
        values = [column.get(name) for column in columns]
        if any(value is not None for value in values):
            table.add_row(words, *(shown(value, style) for value in values))
    return table


def shown(value: float | None, style: str = ".3f") -> str:
    """A number for a table; `-` for one that is not there."""
    return "-" if value is None or math.isnan(value) else format(value, style)


def _table(title: str, labels: Sequence[str], justify: str = "left") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(title, no_wrap=True)
    for label in labels:
        table.add_column(label, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def _column(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def _sum(values: Sequence[float]) -> float | None:
    return sum(values) if values else None
