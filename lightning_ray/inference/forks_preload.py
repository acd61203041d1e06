"""Imported by the process that vLLM's own are forked from (`forks.py`), and by nobody else."""

from lightning_ray.inference import lifeline

# First of all: the actor may be killed while this goes on. Of those that are forked here each ties
# itself to this process, when vLLM loads its plugins.
lifeline.end_with_parent()

import setproctitle  # noqa: E402

# It finds where titles are kept by the environment as the kernel left it, which changes later.
setproctitle.setproctitle("VLLM::Forks")

import ray  # noqa: E402, F401 (each would import it with Ray's own main module)
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.worker.cpu_model_runner  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

from lightning_ray.inference import forks, worker_extension  # noqa: E402, F401

forks.take_over()
