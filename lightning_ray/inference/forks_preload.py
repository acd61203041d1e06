"""Imported by the process that vLLM's own are forked from (`forks.py`), and by nobody else."""

from lightning_ray.inference import lifeline

# First of all: the actor may be killed while this goes on. Of those that are forked here each ties
# itself to this process, when vLLM loads its plugins.
lifeline.end_with_parent()

from lightning_ray.importing import importing  # noqa: E402
from lightning_ray.inference import forks  # noqa: E402

with importing(forks.NOT_NEEDED):
    import ray  # noqa: F401 (each would import it with Ray's own main module)
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.utils.system_utils import set_process_title

    from lightning_ray.inference import worker_extension  # noqa: F401

forks.take_over()
# Here too: where titles are kept is found by the environment, which is replaced in those forked.
set_process_title("Forks")
