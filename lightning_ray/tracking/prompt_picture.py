"""The picture of a prompt search: what each candidate scored, against the rollouts spent.

Invariant: as for every picture here, nothing needs a display or touches matplotlib's global state.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_INK = "#24292f"
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8c959f"


def plot_prompt_search(
    history: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    before: float | None,
    after: float | None,
    title: str = "",
) -> None:
    """Write the picture of a search to `path`, PNG.

    `history` has a row per try: `version`, `part` ("minibatch" or "validation"), `score`, and
    `spent`, the rollouts up to then. `before` and `after` are scores on held-out tasks.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tried = [row for row in history if row["part"] == "minibatch"]
    scored = [row for row in history if row["part"] == "validation"]
    axes.plot(
        [row["spent"] for row in tried],
        [row["score"] for row in tried],
        linestyle="none",
        marker=".",
        color=_GREY,
        label="on a minibatch",
    )
    best: list[float] = []
    for row in scored:
        best.append(max([row["score"], *best[-1:]]))
        axes.annotate(
            str(row["version"]),
            (row["spent"], row["score"]),
            textcoords="offset points",
            xytext=(6, -10),
            color=_BLUE,
            fontsize=8,
        )
    spent = [row["spent"] for row in scored]
    axes.plot(
        spent,
        [row["score"] for row in scored],
        linestyle="none",
        marker="o",
        color=_BLUE,
        label="on the validation tasks, by version",
    )
    axes.step(spent, best, where="post", color=_BLUE, linewidth=1.5, label="best so far")
    for value, word in ((before, "before"), (after, "after")):
        if value is not None:
            axes.axhline(
                value,
                color=_ORANGE,
                linestyle=":" if word == "before" else "--",
                label=f"held-out tasks, {word}: {value:.2f}",
            )
    axes.set_xlabel("rollouts", color=_INK)
    axes.set_ylabel("mean reward", color=_INK)
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # Below the axes: inside, it would lie on some point or other.
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)
