"""Calls the function that is an agent: `python call.py SPEC TASK_FILE RESULT_FILE`.

SPEC is `path/to/file.py:function` or `package.module:function`. The function gets the task as a
dictionary; what it returns becomes the result file: text as it is, None as nothing, anything else
as JSON. It may be a coroutine function. What it raises ends this process with a traceback and
status 1. A class is made without arguments, and its `run` is called without any: so are agents for
Agent Lightning 1.0, which read their task from the environment.

Standard library only, and nothing newer than Python 3.9: the agent's interpreter is not ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
from types import ModuleType
from typing import Any, Callable  # noqa: UP035


def load(spec: str) -> tuple[Callable[..., Any], str]:
    """The function, and the path that `sys.argv` is to begin with."""
    source, _, name = spec.rpartition(":")
    if source.endswith(".py"):
        path = os.path.abspath(source)
        sys.path.insert(0, os.path.dirname(path))
        module = _file_module(path)
    else:
        # As with `python -m`: the folder that the agent runs in.
        sys.path.insert(0, os.getcwd())
        module = importlib.import_module(source)
        path = getattr(module, "__file__", None) or source
    function = getattr(module, name, None)
    if not callable(function):
        sys.exit(f"agent.callable: {source} has no function {name!r}; define it")
    return function, path


def _file_module(path: str) -> ModuleType:
    name = os.path.basename(path)[: -len(".py")]
    if name in sys.modules:
        name = f"_agent_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def answer(function: Callable[..., Any], task: dict[str, Any]) -> Any:
    """What the function or the class says, waited for where it is a coroutine function."""
    if inspect.isclass(function):
        made: Any = function()
        said = made.run()
    else:
        said = function(task)
    if not inspect.isawaitable(said):
        return said
    import asyncio

    async def waited() -> Any:
        return await said

    return asyncio.run(waited())


def text(said: Any, spec: str) -> str:
    """The result file's text."""
    if said is None:
        return ""
    if isinstance(said, str):
        return said
    try:
        return json.dumps(said, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        sys.exit(f"agent.callable: {spec} returned what is no JSON ({error}); give text or JSON")


def main() -> None:
    """Call it."""
    spec, task_file, result_file = sys.argv[1:]
    # The agent's imports are not to be answered from the folder of this file.
    own = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.realpath(p or os.getcwd()) != own]
    with open(task_file, encoding="ascii") as file:
        task = json.load(file)
    function, path = load(spec)
    sys.argv[:] = [path]
    said = text(answer(function, task), spec)
    with open(result_file, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(said)


if __name__ == "__main__":
    main()
