"""What a user can get wrong ends in one line and status 2, with no Ray started."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# One process for all commands, for importing is what takes long. It is handed one command a line.
SCRIPT = """
import contextlib, io, json, sys
from lightning_ray.cli import run
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(json.loads(line))
    ray = sys.modules.get("ray")
    started = ray is not None and ray.is_initialized()
    print(json.dumps([status, out.getvalue(), err.getvalue(), started]), flush=True)
"""

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Runs a command line; returns its status and the one line that it printed."""
    outputs = tmp_path_factory.mktemp("outputs")
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run(*arguments: str, calculator: bool = False) -> tuple[int, str]:
            words = list(arguments)
            if calculator:
                words[1:1] = ["experiment=calculator", f"output_dir={outputs}"]
                # Should a mistake pass unseen, this one ends the command all the same.
                words += ["policy.model=/nowhere"] * ("policy.model" not in str(words))
            stdin.write(json.dumps(words) + "\n")
            stdin.flush()
            status, out, err, started = json.loads(stdout.readline())
            assert not started, "Ray was started"
            assert list(outputs.iterdir()) == [], "a run's folder was made"
            lines = (out + err).splitlines()
            assert len(lines) == 1 and "Traceback" not in lines[0]
            return status, lines[0]

        yield run
        stdin.close()
        process.wait(timeout=30)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"question": ', "not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"id": "t1", "question": "?", "answer": 1}', "already that of line 1"),
    ],
)
def test_a_broken_line_of_a_task_file(
    typed: Command, tmp_path: Path, broken: str, reason: str
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    good = '{"id": "t1", "question": "What is 1 plus 1?", "answer": 2}'
    tasks.write_text(f"{good}\n\n{broken}\n")
    status, line = typed("train", f"training.tasks={tasks}", calculator=True)
    assert status == 2 and line.startswith(f"error: {tasks}:3: ") and reason in line


def test_a_task_file_that_is_not_there(typed: Command) -> None:
    status, line = typed("train", "training.tasks=/nowhere.jsonl", calculator=True)
    assert (status, line) == (
        2,
        "error: /nowhere.jsonl: cannot read the task file: No such file or directory",
    )


def test_a_held_out_task_that_is_trained_on(typed: Command, tmp_path: Path) -> None:
    # The same task under another id, its fields in another order.
    trained = {"id": "t1", "question": "What is 1 plus 1?", "answer": {"value": 2, "unit": 1}}
    heldout = {"answer": {"unit": 1, "value": 2}, "question": "What is 1 plus 1?", "id": "h1"}
    for name, tasks in (("train", [trained]), ("heldout", [{**heldout, "answer": 3}, heldout])):
        lines = [json.dumps({**task, "id": f"{name}-{n}"}) for n, task in enumerate(tasks)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    status, line = typed(
        "train",
        f"training.tasks={tmp_path}/train.jsonl",
        f"evaluation.tasks={tmp_path}/heldout.jsonl",
        calculator=True,
    )
    assert status == 2
    assert f"held-out task heldout-1 of {tmp_path}/heldout.jsonl is training task train-0" in line


def test_a_held_out_task_may_be_left_to_the_checks_of_each_step(
    typed: Command, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text('{"id": "t1", "question": "What IS  1 plus 1?"}')
    (tmp_path / "heldout.jsonl").write_text('{"id": "h1", "question": "what is 1 plus 1?"}')
    files = [f"training.tasks={tmp_path}/train.jsonl", f"evaluation.tasks={tmp_path}/heldout.jsonl"]
    status, line = typed("train", *files, calculator=True)
    assert status == 2 and "is training task t1" in line and "hygiene.leakage=drop" in line
    # It comes as far as the next mistake.
    status, line = typed("train", *files, "hygiene.leakage=drop", calculator=True)
    assert status == 2 and "policy.model=/nowhere" in line


def test_a_model_folder_without_one_of_its_files(typed: Command, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    status, line = typed("train", f"policy.model={tmp_path}", calculator=True)
    assert (status, line) == (
        2,
        f"error: model folder {tmp_path} lacks tokenizer_config.json; copy it there or name "
        "another model",
    )


def test_a_model_that_is_nowhere(typed: Command) -> None:
    status, line = typed("train", calculator=True)
    assert status == 2 and "policy.model=/nowhere: no such folder" in line


def test_a_port_in_use(typed: Command) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, line = typed("train", f"gateway.port={port}", calculator=True)
    assert status == 2 and line.startswith(f"error: gateway.port={port}: cannot listen on")


def test_an_agent_that_is_not_installed(typed: Command) -> None:
    status, line = typed("train", "agent.command=[no-such-agent]", calculator=True)
    assert status == 2 and "agent.command" in line and "no-such-agent" in line


def test_a_setting_that_does_not_exist(typed: Command) -> None:
    status, line = typed("train", "algorithm.group_siz=4", calculator=True)
    assert status == 2 and "algorithm.group_siz" in line


def test_a_run_to_resume_that_is_not_there(typed: Command, tmp_path: Path) -> None:
    status, line = typed("train", "resume=yesterday", f"output_dir={tmp_path}")
    assert status == 2 and f"resume=yesterday: no such run in {tmp_path}" in line


def test_an_unknown_command(typed: Command) -> None:
    assert typed("trian") == (2, "error: no command 'trian'; try `lightning-ray help`")


def test_the_version_is_printed(typed: Command) -> None:
    status, line = typed("version")
    assert status == 0 and line[0].isdigit()


@pytest.mark.parametrize("words", [[], ["train", "experiment=calculator", "--help"]])
def test_help_says_how_to_train(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from lightning_ray.cli import main; main()", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("usage: lightning-ray COMMAND") and done.stderr == ""
    assert "train experiment=NAME" in done.stdout
