"""One engine: a Ray actor that runs vLLM and serves its own HTTP handlers from the actor's loop."""

import asyncio
import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from lightning_ray.errors import InfrastructureError
from lightning_ray.importing import importing
from lightning_ray.inference import forks
from lightning_ray.inference.arriving import Arriving
from lightning_ray.inference.config import InferenceConfig
from lightning_ray.inference.gate import WeightGate
from lightning_ray.inference.meters import EngineMeters
from lightning_ray.inference.recorder import CallRecorder
from lightning_ray.policies.adapters import read_adapter
from lightning_ray.policies.gpu_memory import place
from lightning_ray.policies.handover import Handed
from lightning_ray.spans import SpanClient

if TYPE_CHECKING:
    import uvicorn

    from lightning_ray.inference.vllm_internals import RecordingLLM

log = logging.getLogger(__name__)

COUNT_EVERY_S = 1.0
"""How often the calls inside are counted for the metrics, seconds."""


@dataclass(frozen=True)
class EngineState:
    """What an engine says of itself."""

    url: str
    version: int
    calls_inside: int
    calls: int
    """Calls recorded since the engine started."""
    sampled_tokens: int
    """Tokens sampled in recorded calls since the engine started."""
    node: str
    """The node it is on, as Ray calls it."""
    gpu: str
    """Its node and GPU, see `gpu_memory.place`; "" without one."""


class InferenceEngine:
    """The actor's class. `start` must return before anything else is asked."""

    def __init__(
        self,
        config: InferenceConfig,
        model_dir: str,
        policy: str,
        names: list[str],
        version: int,
        key: str,
        spans: SpanClient,
        port: int = 0,
    ):
        """Nothing heavy happens here.

        `model_dir` holds version `version` of `policy`; `names` are the model names that agents may
        ask for; `key` is what a caller must know; `port` 0 is any free one.
        """
        self._port = port
        self._config = config
        self._model_dir = model_dir
        self._policy = policy
        self._names = names
        self._key = key
        self._arriving = Arriving()
        self._meters = EngineMeters(policy)
        self._recorder = CallRecorder(spans.append, self._meters.call)
        self._gate = WeightGate(version)
        self._engine: RecordingLLM | None = None
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._counting: asyncio.Task[None] | None = None
        self._url = ""

    async def start(self) -> str:
        """Loads the model and serves it; returns the engine's base URL (no path)."""
        on_processor = self._config.num_gpus == 0
        if on_processor:
            # It imports vLLM while this process does.
            forks.prepare()
        with importing(forks.NOT_NEEDED):
            from lightning_ray.inference import vllm_internals as vllm

        if on_processor:
            forks.take_over()
        await self._written(self._model_dir)
        adapter = read_adapter(Path(self._model_dir))
        model_dir = self._model_dir if adapter is None else str(adapter.base)
        arguments = vllm.server_arguments(model_dir, self._names, self._config)
        self._engine = vllm.make_engine(arguments)
        limit = self._config.update_timeout_s
        self._engine.attach(self._recorder, self._gate, self._policy, limit)
        if adapter is None:
            await vllm.name_version(self._engine, self._gate.version)
        else:
            # vLLM has loaded the model that the adapter belongs to.
            await vllm.load_weights(self._engine, self._model_dir, self._gate.version, limit)
        self._counting = asyncio.create_task(self._count())
        app = await vllm.make_app(self._engine, arguments, self._key)
        self._url = await self._serve(app)
        return self._url

    async def update_weights(
        self,
        folder: str,
        version: int,
        drain: bool = False,
        handed: Handed | None = None,
        by_store: bool = False,
    ) -> float:
        """Takes on the weights in `folder` as `version`; returns the seconds that calls waited.

        `handed` says where else they are, and what they are; `by_store` not to take them from the
        learner's memory.

        Calls inside stand still and then go on with the new version, or, to `drain`, finish on the
        one they began with first; those that come meanwhile wait. Taking on the version that
        already answers is harmless, so that a caller may repeat itself.
        """
        engine = self._running()
        if version == self._gate.version and not self._gate.broken:
            return 0.0
        from lightning_ray.inference import vllm_internals as vllm

        limit = self._config.update_timeout_s
        file = ""
        in_gpu = handed is not None and handed.gpu is not None and handed.gpu.place == place()
        if handed is not None and not in_gpu:
            # Before calls have to wait.
            file = await asyncio.to_thread(self._arriving.file, handed, by_store=by_store)
        if not file and not in_gpu:
            await self._written(folder)
        begun = time.monotonic()
        async with self._gate.change(version, limit, drain):
            await vllm.load_weights(engine, folder, version, limit, file, handed, in_gpu)
        return time.monotonic() - begun

    async def _written(self, folder: str) -> None:
        """Waits for a version that is being written just now; for what is not, nobody waits."""
        path = Path(folder)
        partial = path.with_name(f".{path.name}.partial")
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                while not path.is_dir() and partial.is_dir():
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            raise InfrastructureError(
                f"{folder} was not there within {self._config.start_timeout_s:g} s"
            ) from error

    async def state(self) -> EngineState:
        """The engine's address, version and counters."""
        return EngineState(
            self._url,
            self._gate.version,
            self._gate.calls,
            self._recorder.calls,
            self._recorder.sampled_tokens,
            str(ray.get_runtime_context().get_node_id()),
            place(),
        )

    async def gone(self) -> None:
        """Returns when vLLM's own processes have died; Ray tells who asked when this one has."""
        while self._engine is None or not self._engine.errored:
            await asyncio.sleep(COUNT_EVERY_S)

    async def weight_digest(self) -> str:
        """What `vllm_internals.weight_digest` says of the weights in use."""
        from lightning_ray.inference import vllm_internals as vllm

        return await vllm.weight_digest(self._running())

    async def _count(self) -> None:
        while True:
            self._meters.inside(self._gate.calls, self._gate.waiting)
            await asyncio.sleep(COUNT_EVERY_S)

    async def stop(self) -> None:
        """Stops serving and ends vLLM's own processes."""
        if self._counting is not None:
            self._counting.cancel()
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await asyncio.wait([self._serving], timeout=5)
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)

    async def _serve(self, app: Any) -> str:
        import uvicorn

        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._config.host, self._port))
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=75,
            # Ray's worker already runs the loop.
            loop="none",
        )
        self._server = uvicorn.Server(config)
        # The loop is the actor's: a signal handler of ours would replace Ray's.
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._serving = asyncio.create_task(self._server._serve([listener]))
        port = listener.getsockname()[1]
        host = self._config.host
        if host in ("0.0.0.0", "::"):
            # Listening everywhere is no address to call: say the one that other nodes reach.
            host = ray.util.get_node_ip_address()
        async with asyncio.timeout(30):
            while not self._server.started:
                if self._serving.done():
                    raise InfrastructureError("the engine's HTTP server ended while starting")
                await asyncio.sleep(0.01)
        return f"http://{host}:{port}"

    def _running(self) -> "RecordingLLM":
        if self._engine is None:
            raise InfrastructureError("the engine has not been started")
        return self._engine
