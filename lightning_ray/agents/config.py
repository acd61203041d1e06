"""The settings of an agent: the schema of the configuration group `agent`."""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class TaskBy(StrEnum):
    """How an agent gets its task."""

    arguments = "arguments"
    """By the places in its command alone."""
    stdin = "stdin"
    """As one JSON object on standard input."""
    file = "file"
    """As a JSON file, whose path is `{task_file}` in its command and LIGHTNING_RAY_TASK_FILE."""


class ResultBy(StrEnum):
    """Where an agent leaves its result."""

    stdout = "stdout"
    """What it prints."""
    file = "file"
    """A file, whose path is `{result_file}` in its command and LIGHTNING_RAY_RESULT_FILE."""


def _inherited() -> list[str]:
    return [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
    ]


@dataclass
class ServiceConfig:
    """An agent that is already running and gets its tasks by HTTP."""

    url: str = ""
    """Where each task is sent, as JSON; empty where the agent is no service."""
    method: str = "POST"
    """POST, PUT or PATCH."""
    timeout_s: float | None = None
    """Seconds that one answer may take, where that is less than `agent.timeout_s`."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers to send along, for example to say who is asking."""


@dataclass
class AgentConfig:
    """How to launch an agent and judge what it did."""

    name: str = MISSING
    """What spans and reports call it."""
    command: list[str] = field(default_factory=list)
    """Its argument vector, never given to a shell. `{field}` takes a field of the task, `{{` and
    `}}` are braces. A first word `python` or `python3` is the interpreter that runs us; name
    another by its path."""
    callable: str | None = None
    """In place of a command, a Python function that is called with the task, in a process of its
    own: `path/to/file.py:function` or `package.module:function`."""
    python: str | None = None
    """The interpreter that the callable runs in; None is the one that runs us."""
    service: ServiceConfig = field(default_factory=ServiceConfig)
    """In place of a command, a service that is already running."""
    cwd: str | None = None
    """Folder to run it in; None is the one we run in."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables to set."""
    env_names: dict[str, str] = field(default_factory=dict)
    """Variables of the attempt under other names as well: NEW_NAME: OPENAI_BASE_URL, say."""
    task_env: dict[str, str] = field(default_factory=dict)
    """Variables to set from the task, with places as in the command: QUESTION: "{question}"."""
    inherit_env: list[str] = field(default_factory=_inherited)
    """Variables to take from our own environment where they are set; all others are kept away."""
    timeout_s: float = 60.0
    """Seconds that one attempt may take."""
    max_memory_mb: int | None = None
    """Most memory that the processes of one attempt may hold together, 10^6 bytes; None is as much
    as there is."""
    max_processes: int | None = None
    """Most processes that one attempt may have at a time; None is as many as it likes."""
    task_by: TaskBy = TaskBy.arguments
    """How it gets its task beside the places in its command: `stdin` or `file`, as JSON."""
    result_by: ResultBy = ResultBy.stdout
    """Where it leaves its result: on `stdout` or in a `file`."""
    graded_exit_codes: list[int] = field(default_factory=lambda: [0])
    """Exit codes with which an attempt is graded; with any other it has failed."""
    warm_start: bool = True
    """Fork Python agents from a process that has imported their libraries."""
    max_output_bytes: int = 1 << 20
    """How much of stdout, of stderr and of a result file is kept; the rest is dropped."""
    grader_timeout_s: float = 60.0
    """Seconds that the grader may take for one attempt."""
    grader: str = MISSING
    """`path/to/file.py:function` or `package.module:function`."""
