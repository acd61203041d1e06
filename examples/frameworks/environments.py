"""Makes the environment of each example, from its pinned files alone, once.

    python examples/frameworks/environments.py               # all of them
    python examples/frameworks/environments.py openai node   # those
    python examples/frameworks/environments.py --lock openai # resolve its requirements anew

Example NAME gets .frameworks/NAME: a virtual environment from NAME/requirements.lock, or what
`npm ci` makes of NAME/package-lock.json. An example without either needs none. An environment is
made anew when its pinned file or this interpreter's version has changed.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
ENVIRONMENTS = EXAMPLES.parents[1] / ".frameworks"
LIMIT_S = 1200
"""Longest that one command may take."""
LOCK_HEAD = (
    "# Made by environments.py --lock {name} for Python {python} on Linux; do not edit.\n"
    "# Installed with --no-deps: it is whole.\n"
)


class MistakeError(Exception):
    """What the user is told, without a traceback."""


def main(arguments: list[str] | None = None) -> int:
    """Makes what is missing; 1 when something could not be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="examples; all when left out")
    parser.add_argument("--lock", action="store_true", help="resolve and write requirements.lock")
    asked = parser.parse_args(arguments)
    try:
        for name in asked.names or known():
            if asked.lock:
                lock(name)
            elif _pinned(name) or not (EXAMPLES / name).is_dir():
                make(name)
    except MistakeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def known() -> list[str]:
    """The examples that need an environment of their own."""
    files = (*EXAMPLES.glob("*/requirements.txt"), *EXAMPLES.glob("*/package-lock.json"))
    return sorted({path.parent.name for path in files})


def make(name: str) -> None:
    """The environment of one example. Raises MistakeError when it cannot be made."""
    pinned = _pinned(name)
    if pinned is None:
        raise MistakeError(f"no pinned environment {name!r}; there are: {', '.join(known())}")
    folder = ENVIRONMENTS / name
    ready = folder / ".ready"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(f"{python}\n".encode() + pinned.read_bytes()).hexdigest()
    if ready.is_file() and ready.read_text() == digest:
        print(f"{name}: {folder} is up to date")
        return
    print(f"{name}: making {folder} from {pinned.name} (once)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if pinned.name == "package-lock.json":
        folder.mkdir(parents=True)
        for file in ("package.json", "package-lock.json"):
            shutil.copy(pinned.with_name(file), folder)
        quiet = ["--no-audit", "--no-fund", "--loglevel=error", "--fetch-retries=1"]
        _run(name, ["npm", "ci", *quiet], folder)
        # Node looks for a script's modules beside the script.
        link = pinned.with_name("node_modules")
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(folder / "node_modules", link.parent))
    else:
        _run(name, [sys.executable, "-m", "venv", str(folder)])
        _pip(name, folder, "--no-deps", "-r", str(pinned))
    ready.write_text(digest)


def lock(name: str) -> None:
    """Resolves an example's requirements in an environment of their own, and writes its lock."""
    requirements = EXAMPLES / name / "requirements.txt"
    if not requirements.is_file():
        raise MistakeError(f"{name}: no {requirements}; a package-lock.json is npm's to write")
    folder = ENVIRONMENTS / f"{name}.lock"
    print(f"{name}: resolving {requirements.name} in {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _run(name, [sys.executable, "-m", "venv", str(folder)])
    _pip(name, folder, "-r", str(requirements))
    frozen = _run(name, [str(folder / "bin/python"), "-m", "pip", "freeze"])
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    head = LOCK_HEAD.format(name=name, python=python)
    (EXAMPLES / name / "requirements.lock").write_text(head + frozen)
    shutil.rmtree(folder)


def _pinned(name: str) -> Path | None:
    for file in ("requirements.lock", "package-lock.json"):
        if (EXAMPLES / name / file).is_file():
            return EXAMPLES / name / file
    return None


def _pip(name: str, folder: Path, *arguments: str) -> None:
    quiet = ["install", "-q", "--disable-pip-version-check", "--no-input", "--retries", "2"]
    _run(name, [str(folder / "bin/python"), "-m", "pip", *quiet, *arguments])


def _run(name: str, command: list[str], cwd: Path | None = None) -> str:
    """What a command prints. Raises MistakeError with its last line when it fails."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except FileNotFoundError:
        raise MistakeError(f"{name}: {command[0]} is not installed; install it") from None
    except subprocess.TimeoutExpired:
        raise MistakeError(
            f"{name}: {' '.join(command[:4])} took longer than {LIMIT_S} s; is the package index "
            "reachable?"
        ) from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise MistakeError(
            f"the environment of {name} could not be made: {lines[-1].strip()}; a package index "
            "must be reachable once"
        )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
