"""What is sent for a job: its command survives the shell, and no secret stands in it."""

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray import cli
from lightning_ray.cluster.config import ClusterConfig, check_submission
from lightning_ray.cluster.submission import at_home, make_submission, shell_command
from lightning_ray.errors import UserError
from lightning_ray.jobs.submit import job_words

WORDS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20)


@given(st.lists(WORDS.filter(lambda word: "~" not in word), max_size=5))
def test_words_pass_through_the_shell_unchanged(words: list[str]) -> None:
    assert shlex.split(shell_command(["lightning-ray", *words])) == [
        "exec",
        "lightning-ray",
        *words,
    ]


@given(st.lists(WORDS | st.sampled_from(["~/x", "a.b=~/it's $HOME", "~/", "x~/y"]), max_size=5))
@settings(max_examples=30)
def test_home_is_the_clusters_and_nothing_else_is_expanded(words: list[str]) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", shell_command(["printf", "%s\\0", "first", *words])],
        env={"HOME": "/over there", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        timeout=30,
        check=True,
    )
    expected = ["first", *(at_home(word, "/over there") for word in words), ""]
    assert done.stdout.decode().split("\0") == expected


def test_typed_settings_come_after_the_clusters_and_ours_stay_here() -> None:
    config = ClusterConfig(settings=["output_dir=/data", "inference.host=0.0.0.0", "nothing.x=1"])
    typed = ["resume=yesterday", "output_dir=/mine"]
    assert job_words("train", typed, config, ["cluster=ray", "cluster.log_to_driver=true"]) == [
        "train",
        "output_dir=/data",
        "inference.host=0.0.0.0",
        *typed,
        "cluster=ray",
        "cluster.address=auto",
        "cluster.log_to_driver=true",
    ]
    assert job_words("version", [], config) == ["version"]


def test_settings_stay_before_somebody_elses_command_line() -> None:
    typed = ["experiment=mine", "--", "python", "agent.py", "output_dir=x"]
    assert job_words("train", typed, ClusterConfig()) == [
        *("train", "experiment=mine", "cluster=ray", "cluster.address=auto"),
        *typed[1:],
    ]


def test_experiments_of_ones_own_go_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    mine = """
# @package _global_
agent: {name: mine, command: [python, agent.py], grader: "grader.py:grade"}
training: {tasks: tasks.jsonl}
"""
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(mine)
    (tmp_path / "tasks.jsonl").write_text('{"question": "?"}\n')
    monkeypatch.chdir(tmp_path)
    typed = [f"hydra.searchpath=[file://{tmp_path}/conf]", "experiment=mine"]
    # Composed here, in full, and then nobody answers.
    assert cli.run(["submit", "train", *typed, "cluster.address=127.0.0.1:1"]) == 2
    assert "no Ray job server answers there" in capsys.readouterr().err
    words = job_words("train", typed, ClusterConfig())
    assert "hydra.searchpath=[file://conf]" in words


def test_values_of_named_variables_are_in_the_environment_alone() -> None:
    config = ClusterConfig(env_vars=["A_KEY"], job_stop_timeout_s=7)
    sent = make_submission(config, ["train"], {"A_KEY": "opensesame", "OTHER": "x"})
    assert sent.runtime_env["env_vars"] == {"A_KEY": "opensesame", "RAY_JOB_STOP_WAIT_TIME_S": "7"}
    assert "opensesame" not in sent.entrypoint + sent.job
    with pytest.raises(UserError, match="A_KEY is not set here"):
        make_submission(config, ["train"], {})


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("+agent.env.OPENAI_API_KEY=abc", "agent.env.OPENAI_API_KEY"),
        ("+agent.env={OPENAI_API_KEY:abc}", "agent.env"),
        ("tracking.uri=postgresql://me:abc@host/db", "tracking.uri"),
    ],
)
def test_a_secret_in_the_command_is_refused(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["submit", "train", "experiment=calculator", word]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "cluster.env_vars" in printed and "${oc.env:NAME}" in printed
    assert "abc" not in printed


def test_the_name_of_a_variable_is_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["+serving.keys={web:WEB_KEY}", "+agent.env.API_KEY='${oc.env:WEB_KEY}'"]
    at = ["cluster=kuberay", "cluster.env_vars=[WEB_KEY]"]
    assert cli.run(["submit", "version", *typed, *at]) == 0
    assert "web:WEB_KEY" in capsys.readouterr().out
    assert cli.run(["submit", "version", typed[0], at[0]]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "no command 'trian' to submit"),
        (["submit", "train"], "no command 'submit' to submit"),
        (["../x"], "no command '../x'"),
        (["train", "experiment=calculator", "training.step=3"], "training.step"),
        (["train", "experiment=calculator", "training.tasks=none.jsonl"], "none.jsonl"),
        (["train", "experiment=calculator", "output_dir=here"], "begins with / or ~/"),
        (["train", "experiment=calculator", "cluster.working_dir=/none"], "no such folder"),
        (["version", "cluster=local"], "cluster.address=local"),
        (["version", "cluster.address=ray://host:10001"], "that is no job server"),
        (["version", "cluster.address=ftp://host"], "no http:// address"),
        (["version", "cluster.job=Mine!"], "cluster.job=Mine!"),
        (["version", "cluster.env_vars=[A=1]"], "cluster.env_vars"),
        (["version", "cluster=kuberay", "cluster.working_dir=."], "pods cannot reach"),
        (["status"], "one JOB"),
        (["logs", "a", "b"], "one JOB"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_sent(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(["submit", *words]) == 2
    printed = capsys.readouterr().err
    assert said in printed and len(printed.splitlines()) == 1


def test_a_job_server_is_no_address_to_train_on(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("cluster=kuberay", "cluster.address=http://127.0.0.1:8265"):
        assert cli.run(["train", "experiment=calculator", word]) == 2
        assert "lightning-ray submit" in capsys.readouterr().err


def test_every_command_that_has_a_module_can_be_submitted() -> None:
    # `submit` finds a command's module by its name.
    for name, command in cli.COMMANDS.items():
        assert command.job == name.replace("-", "_")


def test_a_group_without_processors_is_refused() -> None:
    config = ClusterConfig()
    config.head.cpus = 0
    with pytest.raises(UserError, match=r"cluster\.head"):
        check_submission(config)
