import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.tracking.panel import Progress, sparkline

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"

LIVE_PROGRAM = """
import sys, time
from lightning_ray.tracking.panel import Progress
with Progress(3, title="calculator") as progress:
    with progress.phase("starting the engine", slow=True):
        time.sleep(0.6)
    with progress.phase("generate"):
        print("a line from elsewhere")
    progress.update(staleness=0, queue=12)
    progress.step_done(1, {"reward": 0.4375, "format": 0.9, "tokens_per_second": 312})
    time.sleep(SECONDS)
"""


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_without_a_terminal_a_step_is_one_plain_line() -> None:
    stream = io.StringIO()
    with Progress(4, stream=stream) as progress:
        with progress.phase("generate"):
            pass
        with progress.phase("learn"):
            pass
        progress.update(staleness=1, queue=12)
        progress.step_done(
            1, {"loss": 0.5, "exact": 0.25, "reward": 0.4375, "tokens_per_second": 1312.4}
        )
    (line,) = lines(stream)
    assert re.fullmatch(
        r"step 1/4  reward 0\.438  exact 0\.250  loss 0\.5000  tok/s 1,312"
        r"  \d\.\d s \(generate 0\.0, learn 0\.0\)  staleness 1  queue 12  eta \d\.\d s",
        line,
    ), line
    assert "\x1b" not in line


def test_a_slow_phase_is_announced_when_it_starts_and_timed_when_it_ends() -> None:
    stream = io.StringIO()
    with Progress(1, mode="plain", stream=stream) as progress:
        with progress.phase("starting the engine", slow=True) as phase:
            assert lines(stream) == ["starting the engine ..."]
            time.sleep(0.05)
        with progress.phase("generate"):
            pass
    assert phase.seconds >= 0.05
    assert lines(stream)[1:] == ["starting the engine 0.1 s"]


def test_a_slow_phase_that_raises_is_not_reported_as_done() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress(1, mode="plain", stream=stream) as progress:
        with progress.phase("starting the engine", slow=True):
            raise RuntimeError("no")
    assert lines(stream)[-1] == "starting the engine stopped after 0.0 s"


def test_phases_of_one_step_do_not_count_for_the_next() -> None:
    stream = io.StringIO()
    with Progress(2, mode="plain", stream=stream) as progress:
        with progress.phase("publish"):
            pass
        progress.step_done(1, {})
        progress.step_done(2, {})
    assert "publish" in lines(stream)[0] and "publish" not in lines(stream)[1]


def test_phases_and_fields_may_come_from_several_threads() -> None:
    stream = io.StringIO()
    with Progress(1, mode="plain", stream=stream) as progress:

        def work(name: str) -> None:
            for count in range(50):
                with progress.phase(name):
                    progress.update(**{name: count})

        threads = [threading.Thread(target=work, args=(f"w{at}",)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        progress.step_done(1, {})
    for at in range(4):
        assert f"w{at} 49" in lines(stream)[0]


def test_the_time_left_follows_the_pace_and_ends_at_zero() -> None:
    progress = Progress(10, mode="plain", stream=io.StringIO(), first_step=7)
    assert progress.eta_seconds is None
    with progress:
        time.sleep(0.1)
        progress.step_done(8, {})
        left = progress.eta_seconds
        assert left is not None and 0.2 <= left < 2
        progress.step_done(10, {})
    assert progress.eta_seconds == 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_a_sparkline_has_a_bar_a_value_and_the_highest_at_the_highest(values: list[float]) -> None:
    bars = sparkline(values)
    assert len(bars) == len(values)
    assert bars[values.index(max(values))] == max(bars)


def on_a_terminal(seconds: float, interrupt_when: str | None = None) -> tuple[str, int]:
    """Run the live program on a terminal of its own; what it wrote, and its exit status."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE_PROGRAM.replace("SECONDS", str(seconds))],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"},
        close_fds=True,
    )
    os.close(theirs)
    written = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 0.1)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux ends a terminal whose last user is gone with EIO.
            break
        if not part:
            break
        written += part
        if interrupt_when and interrupt_when.encode() in written:
            process.send_signal(signal.SIGINT)
            interrupt_when = None
    os.close(ours)
    return written.decode(), process.wait(timeout=10)


def test_on_a_terminal_there_is_a_panel_and_the_terminal_is_given_back() -> None:
    written, status = on_a_terminal(seconds=0.5)
    assert status == 0
    for shown in ("Lightning Ray · calculator", "starting the engine", "a line from elsewhere"):
        assert shown in written
    final = written.rsplit("Lightning Ray · calculator", 1)[1]
    for shown in ("0.438", "312", "staleness", "12", "generate"):
        assert shown in final
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)


def test_ctrl_c_gives_the_terminal_back() -> None:
    written, status = on_a_terminal(seconds=20, interrupt_when="staleness")
    assert status in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt" in written
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)
