"""What vLLM's own model runner held of each request: a second record, taken in another process.

vLLM gives a custom logits processor each request's prompt ids and its running list of sampled ids,
in the worker that computes them. That is below everything of ours: below the protocols' handlers,
the engine client that `RecordingLLM` wraps, and the recorder. This one changes no logit; it writes
one line per request when the request leaves the batch.
"""

import json
from pathlib import Path
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

FILE = "engine_witness"
"""The key of vLLM's `additional_config` that says where to write."""


class EngineWitness(LogitsProcessor):
    """Named in `inference.extra.logits_processors`."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool):
        self._file = Path(vllm_config.additional_config[FILE])
        self._held: dict[int, tuple[list[int], list[int], bool]] = {}

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Any) -> Any:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._left(index)
        for index, params, prompt, sampled in batch_update.added:
            # A new request may take the place of one that left in the same step.
            self._left(index)
            streamed = params.output_kind == RequestOutputKind.DELTA
            self._held[index] = (prompt or [], sampled, streamed)
        for one, other, direction in batch_update.moved:
            if direction == MoveDirectionality.SWAP:
                here, there = self._held.pop(one, None), self._held.pop(other, None)
                if here is not None:
                    self._held[other] = here
                if there is not None:
                    self._held[one] = there
            elif (moved := self._held.pop(one, None)) is not None:
                self._left(other)
                self._held[other] = moved

    def _left(self, index: int) -> None:
        request = self._held.pop(index, None)
        if request is None:
            return
        prompt, sampled, streamed = request
        line = {
            "prompt": [int(token) for token in prompt],
            "sampled": [int(token) for token in sampled],
            "streamed": streamed,
        }
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
