"""The pictures of an evaluation, as data URIs: measures with their intervals, rewards, pairs.

Invariant: nothing here needs a display or touches matplotlib's global state.
"""

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from lightning_ray.evaluation.comparison import Comparison
from lightning_ray.evaluation.measures import Interval
from lightning_ray.evaluation.scorecard import Scorecard

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's blue, orange, green and vermilion: told apart with any colour vision.
_SUBJECT, _AGAINST, _GAIN, _LOSS = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_INK, _FAINT = "#2b2f36", "#8b929c"
_LABEL = 90


def forest(card: Scorecard, against: Scorecard | None) -> str | None:
    """Every measure and its interval, one row each; None where nothing was measured.

    Measures in USD have an axis of their own, below.
    """
    cards = [(card, _SUBJECT)] + ([(against, _AGAINST)] if against else [])
    units = [
        [m.name for m in card.measures if (m.unit == "usd") is usd and _any(cards, m.name)]
        for usd in (False, True)
    ]
    units = [names for names in units if names]
    if not units:
        return None
    rows = [len(names) for names in units]
    figure = _figure(7.6, 0.9 + 0.55 * sum(rows) + 0.5 * len(rows))
    plots = figure.subplots(len(units), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, names in zip(plots, units, strict=True):
        for at, name in enumerate(names):
            for place, (side, colour) in enumerate(cards):
                interval = side.measure(name).interval
                if interval is not None:
                    _row(axes, at + 0.24 * place, interval, colour)
        axes.set_yticks(range(len(names)), [card.measure(name).title for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        usd = card.measure(names[0]).unit == "usd"
        if not usd and axes.get_xlim()[0] > -0.3 and axes.get_xlim()[1] < 1.3:
            axes.set_xlim(-0.03, 1.12)
        axes.set_xlabel("USD" if usd else "")
        _clean(axes, "x")
    if against:
        _legend(figure, [(card.label, _SUBJECT), (against.label, _AGAINST)])
    return _uri(figure)


def histogram(
    rewards: Sequence[float], against: Sequence[float], labels: Sequence[str], name: str
) -> str | None:
    """How often each value of the reward came; None where there is none."""
    if not rewards and not against:
        return None
    every = np.array([*rewards, *against], dtype=np.float64)
    low, high = float(every.min()), float(every.max())
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    edges = np.linspace(low, high if high > low else low + 1, 21).tolist()
    figure = _figure(7.6, 2.9)
    axes = figure.add_subplot()
    for values, colour in ((rewards, _SUBJECT), (against, _AGAINST)):
        if values:
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values, edges, weights=weights, color=colour, alpha=0.55)
    axes.set_xlabel(name, color=_INK)
    axes.set_ylabel("share of rollouts", color=_INK)
    _clean(axes, "y")
    if against:
        _legend(figure, list(zip(labels, (_SUBJECT, _AGAINST), strict=True)))
    return _uri(figure)


def paired(comparison: Comparison) -> str:
    """Task by task: the evaluated side over the other, and the sorted differences."""
    ours = np.array([pair.reward for pair in comparison.pairs])
    theirs = np.array([pair.against for pair in comparison.pairs])
    differences = np.sort(ours - theirs)
    figure = _figure(7.6, 3.6)
    left, right = figure.subplots(1, 2)
    low, high = float(min(ours.min(), theirs.min())), float(max(ours.max(), theirs.max()))
    left.plot([low, high], [low, high], color=_FAINT, linewidth=0.9)
    points, counts = np.unique(np.stack([theirs, ours], axis=1), axis=0, return_counts=True)
    colours = [_colour(y - x) for x, y in points]
    left.scatter(
        points[:, 0], points[:, 1], s=18 + 10 * counts, c=colours, alpha=0.75, edgecolor="white"
    )
    for (x, y), count in zip(points, counts, strict=True):
        if count > 1:
            left.annotate(str(count), (x, y), xytext=(7, 5), textcoords="offset points", fontsize=8)
    left.margins(0.12)
    left.set_xlabel("reward of the task, against", color=_INK)
    left.set_ylabel("reward of the task, evaluated", color=_INK)
    _clean(left, "both")
    right.bar(range(len(differences)), differences, color=[_colour(d) for d in differences])
    mean = comparison.difference
    right.axhline(mean.mean, color=_INK, linewidth=1.2)
    if math.isfinite(mean.low) and math.isfinite(mean.high):
        right.axhspan(mean.low, mean.high, color=_FAINT, alpha=0.25)
    right.set_xlabel("tasks, sorted", color=_INK)
    right.set_ylabel("difference (line: mean, band: 95 %)", color=_INK)
    _clean(right, "y")
    return _uri(figure)


def _any(cards: Sequence[tuple[Scorecard, str]], name: str) -> bool:
    return any(card.measure(name).interval is not None for card, _ in cards)


def _row(axes: "Axes", at: float, interval: Interval, colour: str) -> None:
    ends = [end if math.isfinite(end) else interval.mean for end in (interval.low, interval.high)]
    axes.plot(ends, [at, at], color=colour, linewidth=2.4, solid_capstyle="butt")
    axes.plot([interval.mean], [at], "o", color=colour, markersize=7, markeredgecolor="white")
    axes.annotate(
        f"{interval.mean:.3g}",
        (ends[1], at),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=_INK,
    )


def _colour(difference: float) -> str:
    if abs(difference) < 1e-12:
        return _FAINT
    return _GAIN if difference > 0 else _LOSS


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(figure: "Figure", entries: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=_plain(label)) for label, colour in entries]
    figure.legend(handles=handles, loc="outside upper left", ncols=1, frameon=False, fontsize=9)


def _plain(label: str) -> str:
    # The ends tell labels apart. A leading underscore would hide an entry, dollars begin a formula.
    short = label if len(label) <= _LABEL else label[:30] + " ... " + label[35 - _LABEL :]
    return short.lstrip("_").replace("$", r"\$")


def _clean(axes: "Axes", grid: Literal["x", "y", "both"]) -> None:
    axes.grid(axis=grid, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c9cdd3")
    axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=9)


def _uri(figure: "Figure") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
