"""Graders: the user's own function that turns what an agent did into numbers.

Invariant: what `grade` returns is finite floats, "reward" among them. A grader that fails raises; a
failure never becomes a reward of zero.
"""

import hashlib
import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

from lightning_ray.agents.result import AgentResult
from lightning_ray.agents.task import Task
from lightning_ray.errors import LightningRayError, UserError

Grader = Callable[[dict[str, Any], AgentResult, pa.Table], float | Mapping[str, float]]
"""(task's data with its "id", how the agent ended, spans of the attempt) -> reward or scores.

The table has the schema `lightning_ray.spans.schema.SPAN_SCHEMA`, in the order of `sequence`.
"""


class GraderError(LightningRayError):
    """A grader raised, or gave something that is no reward; the message says where."""


def load_grader(spec: str) -> Grader:
    """Import the function that `spec` names.

    Args:
        spec: `path/to/file.py:function` or `package.module:function`.

    Raises:
        UserError: the spec is malformed, or its file, module or function does not load.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name.isidentifier():
        raise UserError(
            f"agent.grader: {spec!r} must be path/to/file.py:function or package.module:function"
        )
    try:
        module = _load_file(spec, Path(source)) if source.endswith(".py") else _load_module(source)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"agent.grader: {source} does not import: {_describe(error)}; correct it"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"agent.grader: {source} has no function {name!r}; define it")
    loaded: Grader = function
    return loaded


def _load_module(name: str) -> ModuleType:
    return importlib.import_module(name)


def _load_file(spec: str, path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"agent.grader: no file {path} (from {spec!r}); correct the path")
    # A name of its own, so that two files called grader.py do not meet in sys.modules.
    name = f"_lightning_ray_grader_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UserError(f"agent.grader: {path} is not a Python file; name one")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def grade(grader: Grader, task: Task, result: AgentResult, spans: pa.Table) -> dict[str, float]:
    """Scores of one attempt, "reward" among them.

    Args:
        spans: The attempt's spans, in the order of `sequence`.

    Raises:
        GraderError: the grader raised, or its answer is not a finite number or a mapping from
            names to finite numbers with "reward" among them.
    """
    try:
        answer: object = grader({**task.data, "id": task.id}, result, spans)
        scores = dict(answer) if isinstance(answer, Mapping) else {"reward": answer}
    except (Exception, SystemExit) as error:
        raise GraderError(f"grader failed on task {task.id!r}: {_describe(error)}") from error
    if "reward" not in scores:
        raise GraderError(
            f"grader gave no 'reward' for task {task.id!r}, only {sorted(map(str, scores))}"
        )
    return {_name(name, task): _number(name, value, task) for name, value in scores.items()}


def _name(name: object, task: Task) -> str:
    if not isinstance(name, str):
        raise GraderError(f"grader named a score {name!r} for task {task.id!r}: use a string")
    return name


def _number(name: object, value: object, task: Task) -> float:
    """A finite float, from any real number (a bool counts, and so do numpy's)."""
    if not isinstance(value, Real) and not _is_numpy_scalar(value):
        raise GraderError(
            f"grader gave {value!r} ({type(value).__name__}) as {name!r} for task {task.id!r}: "
            "give a number"
        )
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        raise GraderError(
            f"grader gave {number} as {name!r} for task {task.id!r}: give a finite number"
        )
    return number


def _is_numpy_scalar(value: object) -> bool:
    """numpy.bool_ and the like are no `Real`; told without importing numpy."""
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return kind in ("b", "i", "u", "f") and getattr(value, "shape", None) == ()


def _describe(error: BaseException) -> str:
    """The error with the last file and line of the user's code that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    outside = [f for f in frames if not f.filename.startswith("<frozen importlib")]
    where = f" ({outside[-1].filename}:{outside[-1].lineno})" if outside else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}:{error.lineno})"
        return f"SyntaxError: {error.msg}{where}"
    return f"{type(error).__name__}: {error}{where}"
