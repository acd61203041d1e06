"""Has Python keep, compiled, what the commands import; run by the environment's own Python.

The packages are installed without, because most of what they hold is never imported. Where nobody
may write compiled files later (PYTHONDONTWRITEBYTECODE=1, as in many containers, or an environment
that belongs to somebody else) every process of every run would compile for half a minute.
"""

import contextlib
import importlib
import io
import pkgutil
import sys
from collections.abc import Iterator

sys.dont_write_bytecode = False

import lightning_ray  # noqa: E402
from lightning_ray.cluster import quiet_environment  # noqa: E402

# What other programs than ours import, Ray's and vLLM's own processes among them.
ELSEWHERE = (
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
    "vllm.entrypoints.launchers.api_server",
    "ray.serve",
    "ray._private.workers.default_worker",
    "ray.dashboard.agent",
    "ray.dashboard.dashboard",
    "mlflow.server",
    "pytest",
)
# Not to be imported by anybody but the process that it makes of its importer.
LEFT_OUT = ("lightning_ray.inference.forks_preload",)


def modules() -> Iterator[str]:
    for module in pkgutil.walk_packages(lightning_ray.__path__, "lightning_ray.", _told):
        if module.name not in LEFT_OUT:
            yield module.name
    yield from ELSEWHERE


def _told(name: str) -> None:
    """A package that does not import is named by `main`, which tries it too."""


def main() -> None:
    quiet_environment()
    failed = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for name in modules():
            try:
                importlib.import_module(name)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a package may raise anything; it is told
                failed[name] = error
    # Whoever needs it will be told; compiled files less are no reason to stop a setup.
    for name, error in failed.items():
        print(f"not compiled: {name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
