"""Processes that are told what to do, line by line: a peer at work, a load, an upstream."""

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peer_environment import FOLDER, ROOT

ANSWERS_WITHIN_S = 300.0


class Helper:
    """One process; a context manager. It waits without using a processor between requests.

    It says one line when it is ready, {"ready": ...}, and ends when its standard input does.
    """

    def __init__(
        self, name: str, command: Sequence[str], answers_within_s: float = ANSWERS_WITHIN_S
    ):
        """What it prints beside its answers goes to `.bench/NAME.log`."""
        self._answers_within_s = answers_within_s
        self._name = name
        self._command = list(command)
        self._log = FOLDER / f"{name}.log"
        self.ready: Any = None
        """What it said when it was ready."""

    def __enter__(self) -> Self:
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                cwd=ROOT,
            )
        self.ready = self._answer()["ready"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        if self._process.poll() is not None:
            return
        self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(15)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer. Raises RuntimeError when there is none."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        return self._answer()

    def rate(self, do: str, **request: Any) -> float:
        """Units per second that it reached. Raises RuntimeError when it failed."""
        answer = self.ask(do=do, **request)
        return float(answer["units"]) / float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        # An answer is one line, written at once.
        if not select.select([stdout], [], [], self._answers_within_s)[0]:
            self._process.kill()
            raise RuntimeError(
                f"{self._name} gave no answer for {self._answers_within_s:g} s: {self._log}"
            )
        line = stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-15:])
            raise RuntimeError(f"{self._name} ended before it answered ({self._log}):\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Peer(Helper):
    """A script of `benchmarks/peers`, run by the peer's own interpreter; ready with its version."""

    def __init__(
        self,
        python: Path,
        script: str,
        *arguments: str,
        answers_within_s: float = ANSWERS_WITHIN_S,
    ):
        command = [str(python), str(ROOT / "benchmarks" / "peers" / script), *arguments]
        super().__init__(Path(script).stem, command, answers_within_s)


def our_helper(module: str, *arguments: str) -> Helper:
    """A module of `benchmarks` as a helper, run by this interpreter."""
    return Helper(module, [sys.executable, "-m", f"benchmarks.{module}", *arguments])
