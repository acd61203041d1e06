"""Imported by the process that vLLM's own are forked from (`forks.py`), and by nobody else."""

from lightning_ray.inference import lifeline

# First of all: the actor may be killed while this goes on. Of those that are forked here each ties
# itself to this process, when vLLM loads its plugins.
lifeline.end_with_parent()

import ray  # noqa: E402, F401 (each would import it with Ray's own main module)
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.worker.cpu_model_runner  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401
from vllm.utils.system_utils import set_process_title  # noqa: E402

from lightning_ray.inference import forks, worker_extension  # noqa: E402, F401

forks.take_over()
# Here too: where titles are kept is found by the environment, which is replaced in those forked.
set_process_title("Forks")
