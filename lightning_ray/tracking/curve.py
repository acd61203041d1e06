"""The picture of a run's learning: its measures against the step.

Invariant: nothing here needs a display or touches matplotlib's global state; a picture is drawn on
a figure of its own and saved.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]
"""Rows with `step` and any of the measures and `heldout`, a score on held-out tasks."""

MEASURES = ("reward", "format", "exact")
HELDOUT = "heldout"

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_DASHES = ("-", "--", ":")
# What fits under one plot: of tick labels side by side, and of the legend.
_TICK_CHARACTERS = 30
_LEGEND_CHARACTERS = 28
_INK = "#2b2f36"
_FAINT = "#8b929c"
_SMOOTHING_STEPS = 5
_DIAMOND: dict[str, Any] = {"marker": "D", "markersize": 8, "zorder": 5, "clip_on": False}
_EDGE: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 1.0}


def plot_learning_curve(
    history: History,
    path: Path,
    *,
    title: str = "",
    measures: Sequence[str] = MEASURES,
) -> None:
    """Draw one run into `path` (the suffix says the format: png, svg, pdf).

    Each measure is a thin line of what each step gave and a thick one, its mean over five steps.
    Rows with `heldout` are marked as diamonds with their value.
    """
    figure = _figure(7.2, 4.0)
    axes = figure.add_subplot()
    for name, colour in zip(measures, _cycle(len(measures)), strict=True):
        _line(axes, history, name, colour, label=name)
    _heldout(axes, history)
    _finish(axes, title)
    _save(figure, path)


def plot_learning_curves(
    histories: Mapping[str, History],
    path: Path,
    *,
    title: str = "",
    measures: Sequence[str] = MEASURES,
) -> None:
    """Draw several runs, such as seeds, into `path`: one plot a measure, one colour a run.

    `histories` maps a run's label to its rows. The first and last held-out score of every run
    have a plot of their own, at the right. Beyond six runs the colours come again, dashed.
    """
    drawn = [
        name for name in measures if any(name in row for rows in histories.values() for row in rows)
    ]
    heldout = any(HELDOUT in row for rows in histories.values() for row in rows)
    count = max(1, len(drawn) + heldout)
    longest = max(map(len, histories), default=0)
    columns = max(1, min(len(histories), _LEGEND_CHARACTERS * count // max(1, longest)))
    legend_rows = -(-len(histories) // columns)
    figure = _figure(1.2 + 2.9 * count, 3.2 + 0.22 * legend_rows)
    plots = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    colours = dict(zip(histories, _cycle(len(histories)), strict=True))
    dashes = {label: _DASHES[at // len(_COLOURS) % 3] for at, label in enumerate(histories)}
    for axes, name in zip(plots, drawn, strict=False):
        for label, rows in histories.items():
            _line(axes, rows, name, colours[label], label=label, dashes=dashes[label])
        _finish(axes, name, legend=False)
    if heldout:
        _before_and_after(plots[-1], histories, list(colours.values()))
        _finish(plots[-1], "held-out, before and after", legend=False)
        fits = longest * len(histories) <= _TICK_CHARACTERS
        ticks = list(histories) if fits else [str(at + 1) for at in range(len(histories))]
        plots[-1].set_xticks(range(len(histories)), ticks)
        plots[-1].set_xlim(-0.6, len(histories) - 0.4)
        plots[-1].set_xlabel("run" if fits else "run, in the legend's order", color=_INK)
    for axes in plots[1:]:
        axes.set_ylabel("")
    handles = [
        plots[0].plot([], [], dashes[label], color=colour, linewidth=2.2, label=label)[0]
        for label, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    if title:
        figure.suptitle(title, color=_INK, fontsize=12, fontweight="bold")
    _save(figure, path)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white")


def _cycle(count: int) -> list[str]:
    return [_COLOURS[at % len(_COLOURS)] for at in range(count)]


def _line(
    axes: "Axes", history: History, name: str, colour: str, label: str, dashes: str = "-"
) -> None:
    points = sorted((row["step"], row[name]) for row in history if name in row)
    if not points:
        return
    steps, values = (np.asarray(column, dtype=float) for column in zip(*points, strict=True))
    axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.35)
    # A run of one step has no line to be seen.
    marker = "o" if len(points) == 1 else ""
    axes.plot(
        steps, _smooth(values), dashes, color=colour, linewidth=2.2, label=label, marker=marker
    )


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over at most five steps, fewer at the ends; float64, same length."""
    half = _SMOOTHING_STEPS // 2
    return np.asarray(
        [np.mean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]
    )


def _heldout(axes: "Axes", history: History) -> None:
    """Mark the held-out scores of one run at their steps."""
    points = _heldout_points(history)
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(
        steps, values, color=_INK, linestyle="none", label="held-out tasks", **_DIAMOND, **_EDGE
    )
    for step, value in points:
        _say(axes, f"{value:.2f}", step, value, _INK, above=True)


def _before_and_after(axes: "Axes", histories: Mapping[str, History], colours: list[str]) -> None:
    """The first and last held-out score of each run, a hollow and a full diamond joined."""
    for at, (history, colour) in enumerate(zip(histories.values(), colours, strict=True)):
        points = _heldout_points(history)
        if not points:
            continue
        before, after = points[0][1], points[-1][1]
        axes.plot([at, at], [before, after], color=colour, linewidth=2.2, alpha=0.35)
        axes.plot(at, before, **_DIAMOND, markerfacecolor="white", markeredgecolor=colour)
        axes.plot(at, after, color=colour, **_DIAMOND, **_EDGE)
        _say(axes, f"{before:.2f}", at, before, colour, above=before > after)
        _say(axes, f"{after:.2f}", at, after, colour, above=after >= before)


def _heldout_points(history: History) -> list[tuple[float, float]]:
    return sorted((row["step"], row[HELDOUT]) for row in history if HELDOUT in row)


def _say(axes: "Axes", text: str, x: float, y: float, colour: str, *, above: bool) -> None:
    axes.annotate(
        text,
        (x, y),
        textcoords="offset points",
        xytext=(0, 9 if above else -9),
        ha="center",
        va="bottom" if above else "top",
        color=colour,
        fontsize=9,
        fontweight="bold",
    )


def _finish(axes: "Axes", title: str, *, legend: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("mean over the step's samples", color=_INK)
    low, high = axes.get_ylim()
    # Scores between 0 and 1 get the whole of that range, so that two pictures can be compared.
    if low > -0.2 and high < 1.2:
        axes.set_ylim(-0.03, 1.05)
    axes.margins(x=0.03)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c9cdd3")
    axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
    if title:
        # Above the labels of scores near 1.
        axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold", pad=16)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="best", labelcolor=_INK)
