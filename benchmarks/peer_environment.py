"""The environment that a peer runs in: its own, pinned, made once under `.bench/`.

Nothing of it is ever imported by our interpreter, and nothing of ours is installed into it.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lightning_ray.errors import UserError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".bench"
"""Everything that benchmarks leave behind, apart from their results; ignored by git."""
REQUIREMENTS = ROOT / "benchmarks" / "requirements"


def peer_python(name: str, say: Callable[[str], None]) -> Path:
    """The interpreter of the environment that `requirements/NAME.txt` describes; made if missing.

    It is made anew when the requirements have changed. Raises UserError when pip cannot make it.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    folder = FOLDER / name
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if ready.exists() and ready.read_text() == digest and python.exists():
        return python
    say(f"making the environment of {name} in {folder} (once; a minute or two)")
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)], name)
    # What is pinned and nothing else: the list is whole, so nothing has to be resolved.
    install = ["-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
    # A peer that asks for a newer Python than ours was tried with this one before it was pinned.
    install.append("--ignore-requires-python")
    _run([str(python), *install, "-r", str(requirements)], name)
    ready.write_text(digest)
    return python


def _run(command: list[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise UserError(
            f"the environment of {name} could not be made: {lines[-1]}; a package index must be "
            "reachable once"
        )
