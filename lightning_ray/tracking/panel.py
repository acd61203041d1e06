"""What a person sees while a run goes on: a live panel, or plain lines where there is no terminal.

Invariant: the terminal is given back as it was found, however the run ends: `close` runs on leaving
the `with` block (Ctrl-C included) and once more at exit, and may be called any number of times.
"""

import atexit
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from lightning_ray.tracking.config import Panel

METRICS = ("loss", "tokens_per_second", "staleness", "version", "left_out")
"""Metrics of a step that a person follows; MLflow has all of them."""

REFRESHES_PER_SECOND = 4
_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 40
_UNITS = {
    "tokens_per_second": ("tok/s", ",.0f"),
    "loss": ("loss", ".4f"),
    "seconds": ("s", ".1f"),
    "staleness": ("staleness", ".0f"),
    "version": ("version", ".0f"),
    "left_out": ("left out", ".0f"),
}


@dataclass
class Phase:
    """One stretch of work; `seconds` is its length so far, or in all once it has ended."""

    name: str
    slow: bool
    started: float
    ended: float | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock seconds."""
        return (time.monotonic() if self.ended is None else self.ended) - self.started


class Progress:
    """Progress of a run of `total_steps` steps.

    Use it as a context manager around the run. `phase`, `update`, `step_done` and `note` may be
    called from any thread. The metrics named in `rewards` are shown first, with a sparkline of the
    first of them, then those named in `metrics`; `first_step` is the number of steps done before,
    in a resumed run.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "training",
        mode: Panel | str = Panel.auto,
        rewards: Sequence[str] = ("reward", "format", "exact"),
        metrics: Sequence[str] = METRICS,
        first_step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self._total = total_steps
        self._title = title
        self._rewards = tuple(rewards)
        self._shown_metrics = tuple(metrics)
        self._stream = stream or sys.stdout
        self._live_wanted = Panel(mode) is Panel.rich or (
            Panel(mode) is Panel.auto and _is_terminal(self._stream)
        )
        self._live: Live | None = None
        self._lock = threading.RLock()
        self._active: list[Phase] = []
        self._done: dict[str, float] = {}
        self._shown: dict[str, float] = {}
        self._step = first_step
        self._metrics: dict[str, float] = {}
        self._fields: dict[str, object] = {}
        self._sparks: deque[float] = deque(maxlen=_SPARKS)
        self._durations: deque[float] = deque(maxlen=8)
        self._step_started = time.monotonic()
        self._started = time.monotonic()

    def __enter__(self) -> "Progress":
        self._started = self._step_started = time.monotonic()
        if self._live_wanted:
            console = Console(file=self._stream, force_terminal=True)
            self._live = Live(
                _Screen(self),
                console=console,
                refresh_per_second=REFRESHES_PER_SECOND,
                redirect_stdout=self._stream is sys.stdout,
                redirect_stderr=self._stream is sys.stdout,
            )
            self._live.start()
            atexit.register(self.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the panel as it last was and give the terminal back."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
            atexit.unregister(self.close)

    @contextmanager
    def phase(self, name: str, *, slow: bool = False) -> Iterator[Phase]:
        """Show `name` as what is going on, and count its seconds for the step.

        A `slow` phase (starting an engine) has a line of its own where there is no panel, at its
        start and at its end. Phases may overlap.
        """
        phase = Phase(name, slow, time.monotonic())
        with self._lock:
            self._active.append(phase)
            if slow and not self._live_wanted:
                self._line(f"{name} ...")
        completed = False
        try:
            yield phase
            completed = True
        finally:
            with self._lock:
                phase.ended = time.monotonic()
                self._active.remove(phase)
                if not slow:
                    self._done[name] = self._done.get(name, 0.0) + phase.seconds
                elif completed:
                    self.note(f"{name} {_duration(phase.seconds)}")
                else:
                    self.note(f"{name} stopped after {_duration(phase.seconds)}")

    def update(self, **fields: object) -> None:
        """Set what is shown beside the metrics: `version=3, staleness=0, queue=12`, any name."""
        with self._lock:
            self._fields.update(fields)

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count step `step` as done, with its metrics by name.

        Known names are the rewards, `tokens_per_second`, `loss`; others are shown as they are
        called. `seconds` is how long it took; without it, the time since the last call. The seconds
        of the phases since that are the step's.
        """
        with self._lock:
            now = time.monotonic()
            # What came before the first step, starting above all, is no part of it.
            seconds = float(metrics.get("seconds", now - self._step_started))
            self._durations.append(seconds)
            self._step_started = now
            self._step = step
            self._metrics = dict(metrics)
            self._shown, self._done = self._done, {}
            if self._rewards and self._rewards[0] in metrics:
                self._sparks.append(float(metrics[self._rewards[0]]))
            if not self._live_wanted:
                self._line(self._step_line(seconds))

    def note(self, text: str) -> None:
        """Say one thing: above the panel, or as a line."""
        with self._lock:
            if self._live is not None:
                self._live.console.print(Text(text, style="dim"))
            else:
                self._line(text)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the end at the median pace of the last steps; None before the first."""
        if not self._durations:
            return None
        return statistics.median(self._durations) * max(0, self._total - self._step)

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _step_line(self, seconds: float) -> str:
        parts = [f"step {self._step}/{self._total}"]
        parts += [f"{label} {value}" for label, value in self._numbers()]
        phases = ", ".join(f"{name} {spent:.1f}" for name, spent in self._shown.items())
        parts.append(f"{seconds:.1f} s" + (f" ({phases})" if phases else ""))
        parts += [f"{name} {_number(value)}" for name, value in self._fields.items()]
        if self.eta_seconds:
            parts.append(f"eta {_duration(self.eta_seconds)}")
        return "  ".join(parts)

    def _numbers(self) -> list[tuple[str, str]]:
        """The metrics of the last step as (label, text), rewards first."""
        names = [name for name in self._rewards if name in self._metrics]
        names += [name for name in self._shown_metrics if name in self._metrics]
        numbers = []
        for name in names:
            policy, _, plain = name.rpartition("/")
            label, form = _UNITS.get(plain, (plain, ".3f"))
            label = f"{policy} {label}" if policy else label
            numbers.append((label, format(self._metrics[name], form)))
        return numbers


class _Screen:
    """The panel as rich draws it, anew at each refresh."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        progress = self._progress
        with progress._lock:
            yield self._draw(progress)

    def _draw(self, progress: Progress) -> RenderableType:
        head = Table.grid(expand=True, padding=(0, 2))
        head.add_column()
        head.add_column(ratio=1)
        head.add_column(justify="right")
        eta = progress.eta_seconds
        elapsed = _duration(time.monotonic() - progress._started)
        head.add_row(
            Text.assemble("step ", (f"{progress._step}", "bold"), f"/{progress._total}"),
            ProgressBar(total=max(1, progress._total), completed=progress._step),
            Text(elapsed + ("" if eta is None else f" · {_duration(eta)} left"), style="dim"),
        )

        numbers = Table.grid(padding=(0, 2))
        for label, value in progress._numbers():
            numbers.add_row(Text(label, style="dim"), Text(value, style="bold"))
        for name, field in progress._fields.items():
            numbers.add_row(Text(name.replace("_", " "), style="dim"), Text(_number(field)))

        phases = Table.grid(padding=(0, 2))
        for name, seconds in progress._shown.items():
            phases.add_row(Text(name, style="dim"), Text(f"{seconds:.1f} s"))

        right = Table.grid()
        if progress._sparks:
            right.add_row(Text(progress._rewards[0], style="dim"))
            right.add_row(Text(sparkline(progress._sparks), style="green"))
            right.add_row("")
        if progress._shown:
            right.add_row(phases)

        columns = Table.grid(expand=True, padding=(0, 4))
        columns.add_column(ratio=1)
        columns.add_column(ratio=1)
        columns.add_row(numbers, right)

        body = Table.grid(expand=True)
        body.add_row(head)
        if progress._metrics or progress._fields:
            body.add_row("")
            body.add_row(columns)
        if progress._active and progress._step:
            body.add_row("")
        for phase in progress._active:
            label = f"{phase.name} {_duration(phase.seconds)}"
            if progress._live is None:
                body.add_row(Text(label, style="dim"))
            else:
                body.add_row(Spinner("dots", text=Text(label), style="cyan"))
        return Frame(body, title=Text(f"Lightning Ray · {progress._title}"), title_align="left")


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """`values` as a row of bars, from the lowest of them to the highest."""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    """`4.2 s`, `12 s`, `4m12s`, `1h03m`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
