"""What stands in `examples/frameworks`: pinned, whole, and without a word of ours."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from frameworks_support import FOLDER
from test_frameworks import EXAMPLES

from lightning_ray.agents import AgentResult, load_grader, load_tasks
from lightning_ray.agents.result import AgentEnd

PINNED = sorted(FOLDER.glob("*/requirements.txt"))
PIN = re.compile(r"([A-Za-z0-9._-]+)(\[[\w,]+\])?==(\S+)")


@pytest.fixture
def environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, with folders of its own."""
    spec = importlib.util.spec_from_file_location("environments", FOLDER / "environments.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "EXAMPLES", tmp_path / "examples")
    monkeypatch.setattr(module, "ENVIRONMENTS", tmp_path / "environments")
    return module


def write_lock(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "examples/tried"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").write_text("")
    (folder / "requirements.lock").write_text(text)


def test_every_example_is_tested() -> None:
    tested = {(example.name, example.file) for example in EXAMPLES}
    agents = [*FOLDER.glob("*/*.py"), *FOLDER.glob("*/*.mjs"), *FOLDER.glob("*/*.sh")]
    there = {(path.parent.name, path.name) for path in agents}
    assert there - {("mcp", "server.py")} == tested


@pytest.mark.parametrize("requirements", PINNED, ids=lambda path: path.parent.name)
def test_requirements_are_pinned_and_their_lock_holds_them(requirements: Path) -> None:
    lock = requirements.with_name("requirements.lock").read_text()
    lines = [line for line in lock.splitlines() if not line.startswith("#")]
    locked = {}
    for line in lines:
        pin = PIN.fullmatch(line)
        assert pin is not None, f"no plain pin, which another machine could not install: {line}"
        locked[pin[1].lower()] = pin[3]
    for line in requirements.read_text().splitlines():
        pin = PIN.fullmatch(line)
        assert pin is not None and locked[pin[1].lower()] == pin[3], line


def test_the_lock_of_node_names_no_host() -> None:
    lock = json.loads((FOLDER / "node/package-lock.json").read_text())
    wanted = json.loads((FOLDER / "node/package.json").read_text())["dependencies"]
    packages = lock["packages"]
    assert not any("resolved" in package for package in packages.values())
    assert packages["node_modules/openai"]["version"] == wanted["openai"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.id)
def test_an_example_knows_nothing_of_us(example) -> None:
    text = (FOLDER / example.name / example.file).read_text().lower()
    assert "lightning" not in text and "localhost" not in text and "127.0.0.1" not in text


def test_the_grader_looks_at_the_last_number() -> None:
    grade = load_grader(f"{FOLDER / 'grader.py'}:grade")
    task = load_tasks(FOLDER / "tasks.jsonl")[0].data

    def reward(printed: str) -> float:
        result = AgentResult(AgentEnd.EXITED, 0, None, printed, "", 1.0, False, False)
        return grade(task, result, None)["reward"]

    assert [reward(text) for text in ("12 + 30 = 42.", "it is 43", "no idea")] == [1.0, 0.1, 0.0]


def test_an_environment_is_made_once_and_anew_for_another_lock(
    environments: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lock(tmp_path, "# empty\n")
    assert environments.main(["tried"]) == 0
    python = tmp_path / "environments/tried/bin/python"
    assert python.exists() and "making" in capsys.readouterr().out
    assert environments.main([]) == 0
    assert "up to date" in capsys.readouterr().out
    write_lock(tmp_path, "# empty still\n")
    assert environments.main(["tried"]) == 0
    assert "making" in capsys.readouterr().out


def test_an_index_that_cannot_be_reached_is_one_clear_line(
    environments: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    write_lock(tmp_path, "openai==3.57.0\n")
    assert environments.main(["tried"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the environment of tried could not be made" in line
    assert "a package index must be reachable once" in line
    assert environments.main(["nobody"]) == 1
    assert "there are: tried" in capsys.readouterr().err
    assert not (tmp_path / "environments/tried/.ready").exists()


def test_a_program_that_is_missing_is_said(
    environments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder = tmp_path / "examples/script"
    folder.mkdir(parents=True)
    for file in ("package.json", "package-lock.json"):
        (folder / file).write_text("{}")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert environments.main(["script"]) == 1
    assert "npm is not installed" in capsys.readouterr().err
