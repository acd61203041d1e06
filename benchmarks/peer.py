"""A peer at work: a process of its own interpreter that is told what to measure, line by line."""

import json
import select
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.peer_environment import FOLDER, ROOT

ANSWERS_WITHIN_S = 300.0


class Peer:
    """The process; a context manager. It waits without using a processor between requests."""

    def __init__(self, python: Path, script: str):
        """`script` is a path in `benchmarks/peers`; what it prints goes to `.bench/SCRIPT.log`."""
        self._command = [str(python), str(ROOT / "benchmarks" / "peers" / script)]
        self._log = FOLDER / f"{Path(script).stem}.log"
        self.version = ""

    def __enter__(self) -> "Peer":
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )
        self.version = self._answer()["ready"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(15)

    def rate(self, do: str, **request: Any) -> float:
        """Units per second that the peer reached. Raises RuntimeError when it failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        answer = self._answer()
        return float(answer["units"]) / float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        # An answer is one line, written at once.
        if not select.select([stdout], [], [], ANSWERS_WITHIN_S)[0]:
            self._process.kill()
            raise RuntimeError(f"the peer gave no answer for {ANSWERS_WITHIN_S:g} s: {self._log}")
        line = stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-15:])
            raise RuntimeError(f"the peer ended before it answered ({self._log}):\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer
