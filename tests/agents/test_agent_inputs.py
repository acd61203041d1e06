"""Task files, commands, environments and the configuration schema."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_ray.agents import AgentConfig, Task, attempt_environment, load_tasks
from lightning_ray.agents.command import PythonScript, fill_command, python_script
from lightning_ray.agents.environment import (
    check_names,
    env_file,
    merged_environment,
    named_variables,
)
from lightning_ray.errors import UserError

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(text, json_values), min_size=1, max_size=5), st.booleans())
def test_a_task_file_is_read_back_as_written(tmp_path_factory, objects, ascii_only):
    path = tmp_path_factory.mktemp("tasks") / "some.jsonl"
    objects = [{k: v for k, v in each.items() if k != "id"} for each in objects]
    objects[0]["id"] = "first"
    lines = [json.dumps(each, ensure_ascii=ascii_only) for each in objects]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    tasks = load_tasks(path)
    assert [task.data for task in tasks] == objects
    assert tasks[0].id == "first"
    assert [task.id for task in tasks[1:]] == [f"some:{2 * n + 1}" for n in range(1, len(tasks))]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'{"id": "a"}\n{"id": "b"\n', 2, "not JSON"),
        (b'{"id": "a"}\n\n[1]\n', 3, "must be a JSON object.*not list"),
        (b'{"id": "a"}\n{"id": "a"}\n', 2, "id 'a' is already that of line 1"),
        (b'{"id": null}\n', 1, "id must be a string or an integer"),
        (b'{"id": ""}\n', 1, "id must be a string or an integer"),
        (b'{"x": 1}\n{"x": "\xff"}\n', 2, "not UTF-8"),
        (b"\n \n", 1, "the task file is empty"),
        (b"[" * 100_000, 1, "not JSON"),
    ],
)
def test_a_broken_task_file_is_refused_with_its_line(tmp_path, content, line, message):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tasks(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_task_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot read the task file: No such file"):
        load_tasks(tmp_path / "none.jsonl")


@given(text, text)
def test_a_field_fills_its_place_and_nothing_else(before, value):
    template = before.replace("{", "{{").replace("}", "}}") + "{question}{{}}"
    filled = fill_command(["program", template], Task("1", {"question": value}))
    assert filled == ["program", f"{before}{value}{{}}"]


def test_values_that_are_no_strings_are_written_as_json():
    task = Task("7", {"n": 3, "list": [1, "é"], "none": None, "id": 7})
    assert fill_command(["x", "{n}|{list}|{none}|{id}"], task) == ["x", '3|[1, "é"]|null|7']


def test_a_bare_python_is_the_one_that_runs_us():
    assert fill_command(["python3", "a.py"], Task("1", {})) == [sys.executable, "a.py"]
    assert fill_command(["/usr/bin/python3", "a.py"], Task("1", {}))[0] == "/usr/bin/python3"
    assert fill_command(["{p}", "a.py"], Task("1", {"p": "python"}))[0] == "python"


@pytest.mark.parametrize(
    ("template", "value", "message"),
    [
        ("{other}", "", "task 'id' has no field 'other' .it has: id, question"),
        ("{question", "", "lone '{'.*write '{{'"),
        ("question}", "", "lone '}'"),
        ("{question}", "a\0b", "NUL"),
    ],
)
def test_a_command_that_cannot_be_filled_is_refused(template, value, message):
    with pytest.raises(UserError, match=message):
        fill_command(["x", template], Task("id", {"question": value}))


@pytest.mark.parametrize(
    ("command", "script"),
    [
        (["python", "a.py", "-u"], PythonScript((), "a.py")),
        (["python3", "-u", "a/b.py"], PythonScript(("-u",), "a/b.py")),
        (["/opt/venv/bin/python3.11", "a.py"], PythonScript((), "a.py")),
        (["python", "-m", "a"], None),
        (["python", "-c", "a.py"], None),
        (["python", "{file}.py"], None),
        (["python", "folder"], None),
        (["python"], None),
        (["pythonic", "a.py"], None),
        (["node", "a.py"], None),
    ],
)
def test_which_commands_can_start_warm(command, script):
    assert python_script(command) == script


@pytest.mark.parametrize(
    "url", ["http://h:1/a", "http://h:1/a/", "http://h:1/a/v1", "http://h:1/a/v1/"]
)
def test_both_families_of_clients_get_their_base_url(url):
    env = attempt_environment(url, "key", {"X": "1"})
    assert env == {
        "OPENAI_BASE_URL": "http://h:1/a/v1",
        "OPENAI_API_BASE": "http://h:1/a/v1",
        "OPENAI_API_KEY": "key",
        "ANTHROPIC_BASE_URL": "http://h:1/a",
        "ANTHROPIC_API_KEY": "key",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:1/a",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://h:1/a/v1/traces",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "LIGHTNING_RAY_REWARD_URL": "http://h:1/a/v1/rewards",
        "X": "1",
    }


def test_an_agent_that_exports_elsewhere_goes_on_doing_so():
    attempt = attempt_environment("http://h:1/a", "key")
    assert merged_environment({"PATH": "/bin"}, attempt) == {"PATH": "/bin", **attempt}
    elsewhere = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OPENAI_API_KEY": "own"}
    merged = merged_environment(elsewhere, attempt)
    assert {n: v for n, v in merged.items() if n.startswith("OTEL_")} == {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"
    }
    assert merged["OPENAI_API_KEY"] == "key" and "LIGHTNING_RAY_REWARD_URL" in merged


OWN = attempt_environment("http://h:1/a", "key")


@given(st.dictionaries(st.from_regex(r"[A-Z_]{1,8}", fullmatch=True), st.sampled_from(sorted(OWN))))
def test_a_variable_of_the_attempt_has_another_name_as_well(names):
    named = named_variables(names, OWN)
    assert named == {name: OWN[source] for name, source in names.items()}


def test_a_name_for_a_variable_that_is_not_there_is_refused():
    with pytest.raises(
        UserError, match=r"agent.env_names.AGL_KEY: an attempt sets no variable 'X'; "
    ):
        named_variables({"AGL_KEY": "X"}, OWN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": {"": "1"}}, "agent.env: '' is no name"),
        ({"env_names": {"A=B": "OPENAI_API_KEY"}}, "agent.env_names: 'A=B' is no name"),
        ({"task_env": {"A\0": "x"}}, "agent.task_env: .* is no name"),
        ({"task_env": {"A": "x"}, "env_names": {"A": "OPENAI_API_KEY"}}, "task_env.A: agent.env_n"),
    ],
)
def test_names_that_no_variable_can_have_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_names(AgentConfig(**settings))


value = st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"]))


@given(st.dictionaries(st.from_regex(r"[A-Z_]{1,8}", fullmatch=True), value))
def test_a_file_of_variables_has_one_a_line(variables):
    lines = env_file(variables).split("\n")
    assert lines.pop() == ""
    assert dict(line.split("=", 1) for line in lines) == variables


def test_a_variable_of_two_lines_is_in_no_file():
    with pytest.raises(UserError, match=r"env_file.* cannot hold TEXT, which has a line break"):
        env_file({"TEXT": "a\nb"})


def test_a_base_url_must_be_one():
    with pytest.raises(UserError, match="is not http"):
        attempt_environment("127.0.0.1:80/x", "key")


def test_the_schema_is_one_for_hydra():
    schema = OmegaConf.structured(AgentConfig)
    given = {"name": "a", "command": ["python", "a.py"], "grader": "g:f", "env": {"A": "1"}}
    config = OmegaConf.to_object(OmegaConf.merge(schema, given))
    assert isinstance(config, AgentConfig)
    assert (config.command, config.cwd, config.timeout_s) == (["python", "a.py"], None, 60.0)
    assert OmegaConf.is_missing(schema, "name")
    for wrong in ({"comand": []}, {"timeout_s": "soon"}, {"command": "python a.py"}):
        with pytest.raises(OmegaConfBaseException):
            OmegaConf.merge(schema, wrong)


def test_the_room_does_not_know_the_learning_side():
    script = (
        "import sys, lightning_ray.agents\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'ray', 'vllm', 'mlflow')])"
    )
    printed = subprocess.check_output(
        [sys.executable, "-c", script], text=True, cwd=Path(__file__).parents[2]
    )
    assert printed == "[]\n"
