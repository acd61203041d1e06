"""A training run of ours as a user would start it: the command, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peer_environment import ROOT

RUN_WITHIN_S = 3600.0


def train(folder: Path, *overrides: str) -> tuple[Path, dict[str, Any]]:
    """Trains the default experiment in `folder`; returns the run's folder, and its summary.

    Raises RuntimeError with the end of what it printed when it fails.
    """
    program = str(Path(sys.executable).with_name("lightning-ray"))
    command = [program, "train", "experiment=calculator", *overrides, f"output_dir={folder}"]
    with (folder / "train.log").open("w") as log:
        done = subprocess.run(
            command, stdout=log, stderr=log, cwd=ROOT, timeout=RUN_WITHIN_S, check=False
        )
    if done.returncode:
        tail = "\n".join((folder / "train.log").read_text().splitlines()[-15:])
        raise RuntimeError(f"our run failed:\n{tail}")
    (path,) = folder.glob("*/summary.json")
    return path.parent, json.loads(path.read_text())
