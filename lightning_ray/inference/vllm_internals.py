"""Everything that depends on vLLM's internals, so that a new version of vLLM is one file's work.

Written against vLLM 0.32. Imported inside the engine's actor only.
"""

import asyncio
import hashlib
import logging
import os
from argparse import Namespace
from collections import OrderedDict
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import astuple
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestState

from lightning_ray.cluster.processor import multiplies_bfloat16
from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.inference.attribution import (
    App,
    Attribution,
    AttributionMiddleware,
    current_attribution,
)
from lightning_ray.inference.config import InferenceConfig
from lightning_ray.inference.gate import WeightGate
from lightning_ray.inference.recorder import (
    REMEMBERED_ATTEMPTS,
    CallRecorder,
    Choice,
    OpenCall,
)
from lightning_ray.inference.sampling import settled
from lightning_ray.policies.handover import Handed
from lightning_ray.spans import SpanStatus

log = logging.getLogger(__name__)

RESUME_S = 30.0
"""How long an engine may take to go on after a change of weights, seconds."""
SAMPLED = ("temperature", "top_p", "top_k", "max_tokens", "seed")
"""What a run may set of a call."""


class RecordingLLM(AsyncLLM):
    """vLLM's engine client, with the one method that every protocol's handler calls wrapped.

    Before the first call, `attach` says who records and what guards the weights.
    """

    _recorder: CallRecorder
    _gate: WeightGate
    _policy: str
    _wait_s: float
    _winding_up: set[asyncio.Task[None]]
    _numbers: OrderedDict[str, int]
    """How many calls each of the latest attempts has made."""

    def attach(self, recorder: CallRecorder, gate: WeightGate, policy: str, wait_s: float) -> None:
        """Must be called once, before the engine serves anybody."""
        self._recorder = recorder
        self._gate = gate
        self._policy = policy
        self._wait_s = wait_s
        self._winding_up = set()
        self._numbers = OrderedDict()

    async def generate(  # type: ignore[override]
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As AsyncLLM.generate; the call is recorded before its last output is yielded."""
        # Before the gate: nothing may go wrong between entering it and the `try` that leaves it.
        attribution = current_attribution.get()
        asked = {} if attribution is None else self._set_sampling(sampling_params, attribution)
        facts = _sampling_facts(sampling_params)
        version = await self._gate.enter(self._wait_s)
        outputs = super().generate(prompt, sampling_params, request_id, **options)
        call = None
        if attribution is not None:
            call = OpenCall(attribution, self._policy, version, facts, asked)
            if sampling_params.logprobs is None:
                # The sampled token's own logprob; a reply that did not ask for it stays as it is.
                sampling_params.logprobs = 0
        deltas = sampling_params.output_kind == RequestOutputKind.DELTA
        states: list[RequestState] = []
        try:
            async for output in outputs:
                if any(one.finish_reason == "abort" for one in output.outputs):
                    # Nobody who asks here aborts so: a change of weights has failed.
                    raise InfrastructureError("the engine's weights could not be replaced")
                if call is not None:
                    # Kept, for vLLM forgets them before it tells that a caller went away.
                    states = states or self._states(request_id)
                    call.prompt_ids = output.prompt_token_ids
                    for completion in output.outputs:
                        _take(call.choice(completion.index), completion, deltas)
                    if output.finished:
                        finished, call = call, None
                        await self._recorder.record(finished, SpanStatus.OK)
                yield output
        except EngineDeadError:
            # vLLM would answer that its engine is dead, as if that were an answer. Whoever waits
            # here sees a connection that breaks, and another engine takes this one's place.
            log.error("vLLM's engine died; its actor ends with it")
            os._exit(1)
        finally:
            if call is not None:
                _note_versions(call, states)
            # The caller may have been cancelled, and whatever it awaits is then cancelled too, so
            # what remains to be done is done by a task of its own.
            self._spawn(self._wind_up(outputs, call))

    async def _wind_up(
        self, outputs: AsyncGenerator[RequestOutput, None], abandoned: OpenCall | None
    ) -> None:
        """Stops the generation if it still runs, records what it got to, and frees the gate."""
        try:
            await outputs.aclose()
            if abandoned is not None:
                await self._recorder.record(abandoned, SpanStatus.ABORTED)
        except InfrastructureError as error:
            log.error("an abandoned call could not be recorded: %s", error)
        finally:
            self._gate.leave()

    def _states(self, request_id: str) -> list[RequestState]:
        """What vLLM keeps of a request's choices while they are sampled."""
        processor = self.output_processor
        names = processor.external_req_ids.get(request_id, ())
        return [one for name in names if (one := processor.request_states.get(name)) is not None]

    def _set_sampling(self, params: SamplingParams, by: Attribution) -> dict[str, Any]:
        """Sets what the run sets; returns what the agent had asked for there.

        Raises ValueError for what vLLM cannot draw so, such as several greedy samples.
        """
        if not by.sampling:
            return {}
        number = self._numbers.pop(by.attempt_id, 0)
        self._numbers[by.attempt_id] = number + 1
        while len(self._numbers) > REMEMBERED_ATTEMPTS:
            self._numbers.popitem(last=False)
        asked = {name: getattr(params, name) for name in SAMPLED}
        changed = settled(asked, by.sampling, by.attempt_id, number)
        for name, value in changed.items():
            setattr(params, name, value)
        # It is worked out once, from what the agent had asked for.
        vars(params).pop("sampling_type", None)
        params._verify_args()
        if params.temperature == 0:
            params.top_p, params.top_k, params.min_p = 1.0, 0, 0.0
            params._verify_greedy_sampling()
        return {name: asked[name] for name in changed}

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._winding_up.add(task)
        task.add_done_callback(self._winding_up.discard)


def _note_versions(call: OpenCall, states: Sequence[RequestState]) -> None:
    """Which versions sampled a call that ends before vLLM says so itself."""
    for state in states:
        choice = call.choices.get(state.request_index)
        if choice is not None and not choice.spans:
            choice.spans = [(int(version), first) for version, first in state.weight_version_starts]


def _take(choice: Choice, completion: CompletionOutput, deltas: bool) -> None:
    if not deltas:
        choice.token_ids.clear()
        choice.logprobs.clear()
    ids = list(completion.token_ids)
    choice.token_ids.extend(ids)
    for token, candidates in zip(ids, completion.logprobs or (), strict=True):
        choice.logprobs.append(candidates[token].logprob)
    if completion.finish_reason is not None:
        choice.finish_reason = completion.finish_reason
    if completion.weight_versions:
        choice.spans = [(int(one.version), one.start) for one in completion.weight_versions]


def _sampling_facts(params: SamplingParams) -> dict[str, Any]:
    """What a learner or a reader needs to know of how the tokens were drawn."""
    facts = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "max_tokens": params.max_tokens,
        "seed": params.seed,
        "n": params.n,
    }
    return {name: value for name, value in facts.items() if value is not None}


def server_arguments(model_dir: str, names: list[str], config: InferenceConfig) -> Namespace:
    """vLLM's own server arguments for this configuration.

    `names` are the model names that agents may ask for. The model's generation defaults are not
    applied: what an agent does not set is what its API documents (temperature 1).
    """
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args([])
    arguments.model = model_dir
    arguments.served_model_name = names
    arguments.max_model_len = config.max_model_len
    arguments.max_num_seqs = config.max_num_seqs
    arguments.dtype = _dtype(config)
    arguments.enforce_eager = config.enforce_eager
    arguments.generation_config = "vllm"
    arguments.seed = config.seed
    arguments.gpu_memory_utilization = config.gpu_memory_utilization
    arguments.chat_template = config.chat_template
    arguments.enable_log_requests = False
    arguments.disable_log_stats = True
    arguments.disable_uvicorn_access_log = True
    arguments.disable_fastapi_docs = True
    if config.tool_call_parser is not None:
        arguments.tool_call_parser = config.tool_call_parser
        arguments.enable_auto_tool_choice = True
    for name, value in config.extra.items():
        if not hasattr(arguments, name):
            raise UserError(f"inference.extra.{name}: vLLM has no such argument; correct the name")
        setattr(arguments, name, value)
    if arguments.worker_extension_cls:
        raise UserError("inference.extra.worker_extension_cls: that place is taken; remove it")
    arguments.worker_extension_cls = "lightning_ray.inference.worker_extension.ReplaceWeights"
    return arguments


def _dtype(config: InferenceConfig) -> str:
    """The type to compute in on this machine, which is the engine's."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if config.num_gpus > 0 or multiplies_bfloat16() else "float32"


def make_engine(arguments: Namespace) -> RecordingLLM:
    """Loads the model; blocks for as long as that takes."""
    return RecordingLLM.from_engine_args(AsyncEngineArgs.from_cli_args(arguments))


async def make_app(engine: RecordingLLM, arguments: Namespace, key: str) -> App:
    """vLLM's own HTTP application over `engine`, answering those who know `key`."""
    tasks = await engine.get_supported_tasks()
    app = build_app(arguments, tasks, engine.model_config)
    await init_app_state(engine, app.state, arguments, tasks)
    return AttributionMiddleware(app, key)


async def name_version(engine: RecordingLLM, version: int) -> None:
    """Has the engine say of every token from now on that `version` sampled it."""
    await engine.engine_core.set_weight_version_async(str(version))


async def load_weights(
    engine: RecordingLLM,
    folder: str,
    version: int,
    timeout_s: float,
    file: str = "",
    handed: Handed | None = None,
    in_gpu: bool = False,
) -> None:
    """Replaces the weights by those of `version` in `folder`, or in `file` if there is one.

    `in_gpu` says to read what was handed over in the GPU's memory.

    They must be what was `handed` over, if that is known.

    Calls inside stand still meanwhile and go on with the new weights: their keys and values, and
    whatever is kept of other prompts, are dropped with the old ones and computed anew. When it
    fails, the calls inside are ended, for the weights may be neither the old nor the new ones.
    """
    whole = False
    try:
        async with asyncio.timeout(timeout_s):
            # `pause_generation` less 20 ms of sleep in which the last outputs arrive: here each
            # says which version it is of.
            await engine.renderer.clear_mm_cache_async()
            await engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
            # A bare load_weights would leave what a CPU computes with, packed at the start.
            what: tuple[Any, ...] = ()
            if handed is not None:
                what = (handed.digest, handed.base, handed.scale)
            if in_gpu and handed is not None and handed.gpu is not None:
                what = (*what, astuple(handed.gpu))
            await engine.collective_rpc(
                "replace_weights", timeout=timeout_s, args=(folder, file, *what)
            )
            await name_version(engine, version)
        whole = True
    finally:
        try:
            if not whole:
                async with asyncio.timeout(RESUME_S):
                    await engine.pause_generation(mode="abort", clear_cache=True)
        finally:
            async with asyncio.timeout(RESUME_S):
                await engine.resume_generation()


async def weight_digest(engine: RecordingLLM) -> str:
    """SHA-256 over what vLLM says of every weight tensor, in hexadecimal digits.

    A CPU packs linear layers away from their parameters, which then count as empty; embeddings and
    norms remain, and whatever hands over weights replaces all of them.
    """
    per_worker = await engine.compute_weight_checksums()
    lines = sorted(f"{name} {digest}" for worker in per_worker for name, digest in worker.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
