"""What a benchmark shows: a table at the terminal, and two files under `benchmarks/results`.

`NAME.json` is a list of {claim, ours, peer, ratio, unit}, `peer` null where there is none. `ratio`
is better when larger; for a cost it is the cost itself, and better when smaller. `NAME.facts.json`
says of which machine these numbers are, and holds every single measurement behind them.
"""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peer_environment import ROOT

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Claim:
    """One thing that is measured."""

    name: str
    unit: str
    """Of `ours` and of the peer's."""
    target: float | None
    """The ratio to reach, for a cost the most that it may be; None where nothing is promised."""
    cost: bool = False


@dataclass(frozen=True)
class Result:
    """One line of NAME.json."""

    claim: str
    ours: float
    peer: float | None
    ratio: float
    unit: str


def compared(claim: Claim, ours: Sequence[float], peer: Sequence[float]) -> Result:
    """Medians of both, and ours over the peer's."""
    mine, theirs = statistics.median(ours), statistics.median(peer)
    return Result(claim.name, mine, theirs, mine / theirs, claim.unit)


def cost(claim: Claim, ours: Sequence[float], peer: Sequence[float]) -> Result:
    """Medians of a cost that the peer has too; the ratio is our own cost."""
    mine = statistics.median(ours)
    return Result(claim.name, mine, statistics.median(peer), mine, claim.unit)


def alone(claim: Claim, ours: float, ratio: float | None = None) -> Result:
    """A number of ours without a peer; `ratio` is the number itself where there is no other."""
    return Result(claim.name, ours, None, ours if ratio is None else ratio, claim.unit)


def table(claims: Sequence[Claim], results: Sequence[Result]) -> str:
    """The results as text, in the order of the claims."""
    by_name = {one.claim: one for one in results}
    lines = [("claim", "ours", "peer", "ratio", "target", "", "unit")]
    for claim in claims:
        one = by_name.get(claim.name)
        if one is None:
            continue
        peer = "" if one.peer is None else number(one.peer)
        lines.append(
            (
                claim.name,
                number(one.ours),
                peer,
                number(one.ratio),
                _target(claim),
                _verdict(claim, one),
                one.unit,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [line[column].rjust(widths[column]) for column in range(1, 5)]
        cells += [line[5].ljust(widths[5]), line[6]]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def number(value: float) -> str:
    """A number as a person reads it: a few digits that count, thousands apart."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 10 else f"{value:.1f}"


def _target(claim: Claim) -> str:
    if claim.target is None:
        return ""
    return f"{'<=' if claim.cost else '>='} {claim.target:g}"


def _verdict(claim: Claim, one: Result) -> str:
    if claim.target is None:
        return ""
    met = one.ratio <= claim.target if claim.cost else one.ratio >= claim.target
    return "met" if met else "not met"


def machine(folder: Path, packages: Sequence[str]) -> dict[str, Any]:
    """Of which machine the numbers are; `folder` is where the store writes."""
    memory = psutil.virtual_memory().total
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "filesystem": _filesystem(folder),
        "fsync_ms": round(_fsync_ms(folder), 3),
        "load_average_before": [round(one, 2) for one in os.getloadavg()],
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _filesystem(folder: Path) -> str:
    inside = [
        part
        for part in psutil.disk_partitions(all=True)
        if folder.resolve().is_relative_to(part.mountpoint)
    ]
    return max(inside, key=lambda part: len(part.mountpoint)).fstype if inside else "unknown"


def _fsync_ms(folder: Path) -> float:
    """Median time of a 64 KiB write with fsync where the store writes."""
    import time

    took = []
    path = folder / "fsync.probe"
    with path.open("wb", buffering=0) as file:
        for _ in range(20):
            begin = time.perf_counter()
            file.write(b"x" * 65536)
            os.fsync(file.fileno())
            took.append(time.perf_counter() - begin)
    path.unlink()
    return statistics.median(took) * 1000


def write(name: str, results: Sequence[Result], facts: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes both files; returns their paths."""
    RESULTS.mkdir(exist_ok=True)
    numbers, about = RESULTS / f"{name}.json", RESULTS / f"{name}.facts.json"
    numbers.write_text(json.dumps([_rounded(one) for one in results], indent=2) + "\n")
    about.write_text(json.dumps(facts, indent=2) + "\n")
    return numbers, about


def _rounded(one: Result) -> dict[str, Any]:
    return {
        key: float(f"{value:.6g}") if isinstance(value, float) else value
        for key, value in asdict(one).items()
    }
