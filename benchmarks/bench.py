"""One run of a benchmark: its parts in turn, each side beside the other, then a table and files."""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import report
from benchmarks.peer import Helper
from benchmarks.peer_environment import FOLDER
from benchmarks.report import Claim, Result
from lightning_ray.cluster import ClusterConfig, Connection
from lightning_ray.errors import LightningRayError, UserError

T = TypeVar("T")


class Bench:
    """What the parts of a run share: a fresh folder for every measurement, Ray, the results."""

    def __init__(self, rounds: int, work: Path, stack: ExitStack, object_store_mib: int):
        self.rounds = rounds
        self.results: list[Result] = []
        self.facts: dict[str, Any] = {}
        self.packages: dict[str, str] = {}
        """Versions of what is no package of ours."""
        self._work = work
        self._stack = stack
        self._object_store_mib = object_store_mib
        self._connected = False
        self._helpers: dict[str, Helper] = {}
        self._begin = time.monotonic()

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"{time.monotonic() - self._begin:5.0f} s  {text}", flush=True)

    def need_ray(self) -> None:
        """Starts Ray if it is not up yet."""
        if not self._connected:
            self.say("starting Ray")
            config = ClusterConfig(object_store_mib=self._object_store_mib)
            self._stack.enter_context(Connection(config))
            self._connected = True

    def helper(self, key: str, make: Callable[[], Helper]) -> Helper:
        """A process beside ours, started when it is first asked for, ended with the run."""
        if key not in self._helpers:
            self._helpers[key] = self._stack.enter_context(make())
        return self._helpers[key]

    def end_helpers(self) -> None:
        """Ends all processes beside ours, for the memory that they hold."""
        while self._helpers:
            _, helper = self._helpers.popitem()
            helper.__exit__(None, None, None)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder of its own; removed afterwards."""
        folder = Path(tempfile.mkdtemp(dir=self._work))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def in_folder(self, measure: Callable[[Path], T]) -> Callable[[], T]:
        """A measurement that gets a folder of its own each time."""

        def measured() -> T:
            with self.folder() as folder:
                return measure(folder)

        return measured

    def alternate(
        self,
        name: str,
        unit: str,
        measures: Mapping[str, Callable[[], T]],
        shown: Callable[[T], float] = float,  # type: ignore[assignment]
    ) -> dict[str, list[T]]:
        """Measures all of them once a round, whoever was first in one round last in the next.

        Args:
            shown: The number of a measurement that a person who watches sees.
        """
        measured: dict[str, list[T]] = {key: [] for key in measures}
        for turn in range(self.rounds):
            order = list(measures) if turn % 2 == 0 else list(measures)[::-1]
            for key in order:
                measured[key].append(measures[key]())
            said = ", ".join(f"{key} {report.number(shown(measured[key][-1]))}" for key in order)
            self.say(f"{name} {turn + 1}/{self.rounds}: {said} {unit}")
        self.facts[name] = measured
        return measured


@dataclass(frozen=True)
class Benchmark:
    """What `make bench-NAME` measures."""

    name: str
    about: str
    """One line of help."""
    claims: Sequence[Claim]
    """In the order of the table."""
    parts: Mapping[str, Callable[[Bench], None]]
    """What can be measured by itself."""
    packages: Sequence[str]
    """Whose versions the facts name."""
    room: int
    """Bytes of disk that it needs."""
    object_store_mib: int

    def run(self, only: Sequence[str], rounds: int) -> None:
        """Measures, prints the table, and writes the results of a whole run."""
        parts = [name for name in self.parts if not only or name in only]
        work = FOLDER / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        if shutil.disk_usage(work).free < self.room:
            raise UserError(f"{work} has less than {self.room / 1e9:g} GB free; make room there")
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            facts = report.machine(work, self.packages)
            bench = Bench(rounds, work, stack, self.object_store_mib)
            for name in parts:
                self.parts[name](bench)
            facts["packages"] |= bench.packages
            facts["rounds"] = rounds
            facts["measurements"] = bench.facts
        self._tell(bench, facts, bool(only))

    def _tell(self, bench: Bench, facts: dict[str, Any], partial: bool) -> None:
        print()
        print(report.table(self.claims, bench.results))
        print(
            f"\nmedians of {bench.rounds} rounds, {facts['cores']} cores, {facts['filesystem']}, "
            f"fsync {facts['fsync_ms']:g} ms"
        )
        if partial:
            print("no file was written: that takes a run with every claim")
            return
        order = [claim.name for claim in self.claims]
        bench.results.sort(key=lambda one: order.index(one.claim))
        for path in report.write(self.name, bench.results, facts):
            print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)

    def main(self) -> int:
        """The command."""
        parser = argparse.ArgumentParser(prog=f"make bench-{self.name}", description=self.about)
        known = list(self.parts)
        parser.add_argument("--only", nargs="+", choices=known, default=[], metavar="PART")
        parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
        arguments = parser.parse_args()
        if arguments.rounds < 1:
            parser.error("--rounds: at least 1")
        try:
            self.run(arguments.only, arguments.rounds)
        except LightningRayError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
