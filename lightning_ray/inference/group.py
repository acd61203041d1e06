"""The group of engines: starting them, handing them new weights, stopping them."""

import secrets
from collections.abc import Sequence

import ray
from ray.actor import ActorHandle

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.inference.config import InferenceConfig
from lightning_ray.inference.engine import EngineState, InferenceEngine
from lightning_ray.inference.lifeline import LIFELINE, SPIN
from lightning_ray.spans import SpanClient


class InferenceGroup:
    """`config.num_engines` engines that answer for one policy."""

    def __init__(
        self,
        config: InferenceConfig,
        model_dir: str,
        policy: str,
        names: Sequence[str],
        version: int,
        spans: SpanClient,
    ):
        """Starts the actors; `wait_ready` waits for them, so that others can start meanwhile."""
        self.key = secrets.token_urlsafe(24)
        self._config = config
        actor = ray.remote(InferenceEngine).options(
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            label_selector=config.node_labels or None,
            max_concurrency=1000,
            runtime_env={"env_vars": engine_environment(config)},
        )
        self._engines: list[ActorHandle] = [
            actor.remote(config, model_dir, policy, list(names), version, self.key, spans)
            for _ in range(config.num_engines)
        ]
        self._starting = [engine.start.remote() for engine in self._engines]
        self.urls: list[str] = []

    def wait_ready(self) -> list[str]:
        """The engines' base URLs, once every engine answers.

        Raises InfrastructureError when one does not, UserError when a setting is to blame.
        """
        limit = self._config.start_timeout_s
        try:
            self.urls = ray.get(self._starting, timeout=limit)
        except ray.exceptions.GetTimeoutError as error:
            raise InfrastructureError(f"the vLLM engine did not start in {limit:g} s") from error
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError) and isinstance(
                error.cause, UserError
            ):
                raise error.cause from error
            raise InfrastructureError(f"the vLLM engine did not start: {_cause(error)}") from error
        return self.urls

    def update_weights(self, folder: str, version: int, drain: bool = False) -> float:
        """Hands version `version`, a model folder, to every engine.

        To `drain` is to let calls finish on the version they began with. Returns the longest time
        that an engine's calls waited, seconds. Raises InfrastructureError when an engine did not
        take it on.
        """
        # For calls to drain, for the change, and for the engine to go on after one that failed.
        limit = 2 * self._config.update_timeout_s + 60.0
        pending = [engine.update_weights.remote(folder, version, drain) for engine in self._engines]
        try:
            return max(ray.get(pending, timeout=limit))
        except ray.exceptions.GetTimeoutError as error:
            raise InfrastructureError(
                f"an engine did not take on version {version} in {limit:g} s"
            ) from error
        except ray.exceptions.RayError as error:
            raise InfrastructureError(
                f"an engine did not take on version {version}: {_cause(error)}"
            ) from error

    def states(self, timeout_s: float = 10.0) -> list[EngineState]:
        """What every engine says of itself."""
        return ray.get([engine.state.remote() for engine in self._engines], timeout=timeout_s)

    def weight_digests(self, timeout_s: float = 60.0) -> list[str]:
        """A digest of every engine's weights; equal weights have equal digests.

        Raises InfrastructureError when an engine does not say.
        """
        asking = [engine.weight_digest.remote() for engine in self._engines]
        try:
            digests: list[str] = ray.get(asking, timeout=timeout_s)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
            raise InfrastructureError(
                f"an engine did not give the digest of its weights: {_cause(error)}"
            ) from error
        return digests

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the engines and vLLM's own processes."""
        stopping = [engine.stop.remote() for engine in self._engines]
        ray.wait(stopping, num_returns=len(stopping), timeout=timeout_s)
        for engine in self._engines:
            ray.kill(engine)


def engine_environment(config: InferenceConfig) -> dict[str, str]:
    """Environment of an engine's process, which vLLM reads while it is imported."""
    found = {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(config.kv_cache_gib))),
        # The threads are not bound to cores: with engine and learner on one machine, each may use
        # all of them while the other waits.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(config.num_threads),
        "VLLM_NO_USAGE_STATS": "1",
        LIFELINE: "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.num_gpus == 0:
        # Whatever spins there takes a core from what computes.
        found[SPIN] = "0.0005"
    return found


def _cause(error: BaseException) -> str:
    """The last line of what an actor reported, which names the error itself."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
