"""The settings of an agent: the schema of the configuration group `agent`."""

from dataclasses import dataclass, field

from omegaconf import MISSING


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
class AgentConfig:
    """How to launch an agent and judge what it did."""

    name: str = MISSING
    """What spans and reports call it."""
    command: list[str] = MISSING
    """Its argument vector, never given to a shell. `{field}` takes a field of the task, `{{` and
    `}}` are braces. A first word `python` or `python3` is the interpreter that runs us; name
    another by its path."""
    cwd: str | None = None
    """Folder to run it in; None is the one we run in."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables to set."""
    inherit_env: list[str] = field(default_factory=_inherited)
    """Variables to take from our own environment where they are set; all others are kept away."""
    timeout_s: float = 60.0
    """Seconds that one attempt may take."""
    warm_start: bool = True
    """Fork Python agents from a process that has imported their libraries."""
    max_output_bytes: int = 1 << 20
    """How much of stdout, and of stderr, is kept; the rest is read and dropped."""
    grader_timeout_s: float = 60.0
    """Seconds that the grader may take for one attempt."""
    grader: str = MISSING
    """`path/to/file.py:function` or `package.module:function`."""
