"""How vLLM's own processes start: forked from one that has imported vLLM already.

On a processor vLLM runs its core in one process and its worker in another, which the core starts.
In an actor it would have each begin anew, and an engine's start would consist of importing the same
three times, one after the other. Here one process imports, at the same time as the actor, and the
others are forked from it; it has no threads and has computed nothing.

Written against vLLM 0.32. Only on a processor: what a GPU's driver makes of a fork is not tried.
"""

import contextlib
import importlib.util
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing import context, forkserver
from pathlib import Path
from typing import Any

PRELOADED = "lightning_ray.inference.forks_preload"
NOT_NEEDED = ("sklearn",)
"""What transformers imports where it is there, to generate by itself."""
_LIBRARIES = (
    # OpenMP as torch has it, and the allocator that comes with vLLM; package, name, and where.
    ("torch", "libgomp", ("torch/lib", "torch.libs")),
    ("vllm", "libtcmalloc", ("vllm/libs",)),
)


def prepare() -> None:
    """Starts the process that is forked later, and does not wait for it.

    To be called before vLLM is imported, by a thread that lives as long as this process: the other
    ends with it.
    """
    multiprocessing.set_forkserver_preload([PRELOADED])
    with _libraries_first():
        forkserver.ensure_running()


def take_over() -> None:
    """From now on vLLM starts its processes so."""
    from vllm.utils import system_utils
    from vllm.v1.engine import coordinator, utils
    from vllm.v1.executor import multiproc_executor

    for module in (system_utils, coordinator, utils, multiproc_executor):
        # What each calls by itself to find out how; it would not hear of another way in an actor.
        module.get_mp_context = _context  # type: ignore[assignment]


class _Process(context.ForkServerProcess):
    """With the environment of who starts it at that time, as if it had been started by it."""

    _environment: dict[str, str]

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        _share()
        super().run()


class _Context(context.ForkServerContext):
    Process = _Process  # type: ignore[assignment]


def _share() -> None:
    """Has what this process starts be forked from where it was forked itself.

    It knows where that is, and yet Python (3.11) would begin another, which has imported nothing.
    """
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid is None and server._forkserver_address is not None:
        server.ensure_running = lambda: None


_CONTEXT = _Context()


def _context() -> _Context:
    return _CONTEXT


@contextlib.contextmanager
def _libraries_first() -> Iterator[None]:
    """What is started meanwhile loads the libraries first that vLLM wants there on a processor.

    vLLM sets the same for its workers, but for those that are forked that is too late.
    """
    before = os.environ.get("LD_PRELOAD")
    wanted = [path for path in (before or "").split(":") if path]
    for package, name, places in _LIBRARIES:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None or any(name in path for path in wanted):
            continue
        site = Path(found.origin).parent.parent
        wanted += [str(path) for place in places for path in site.glob(f"{place}/{name}*.so*")][:1]
    os.environ["LD_PRELOAD"] = ":".join(wanted)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LD_PRELOAD"]
        else:
            os.environ["LD_PRELOAD"] = before
