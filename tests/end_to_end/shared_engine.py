"""An engine that the tests of several files ask in turn."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import ray

from lightning_ray.inference import Attribution, InferenceGroup, attribution_headers
from lightning_ray.learner import LearnerGroup
from lightning_ray.spans import SpanClient
from lightning_ray.trajectories import build_sequences

CHAT = "/v1/chat/completions"


@dataclass
class SharedEngine:
    """The engine, the store that it records in, and which version it has."""

    group: InferenceGroup
    store: SpanClient
    base: Path
    version: int = 0

    def take_on(self, folder: Path) -> None:
        """The weights of a folder, as the next version."""
        self.group.update_weights(str(folder), self.version + 1)
        self.version += 1


@dataclass
class Stack:
    """An engine and a learner of one model, and asking them."""

    shared: SharedEngine
    learner: LearnerGroup

    @property
    def engines(self) -> InferenceGroup:
        return self.shared.group

    @property
    def store(self) -> SpanClient:
        return self.shared.store

    def headers(self, rollout: str) -> dict[str, str]:
        attribution = Attribution("run", rollout, f"{rollout}/1", "gpt-4o-mini", "")
        return attribution_headers(self.engines.key, attribution)

    def post(self, rollout: str, path: str = CHAT, **body: object) -> httpx.Response:
        url = self.engines.urls[0] + path
        return httpx.post(url, headers=self.headers(rollout), json=body, timeout=120)

    def spans(self, *rollouts: str) -> list[dict]:
        return self.store.get([f"{rollout}/1" for rollout in rollouts]).to_pylist()

    def sample(self, prefix: str, count: int) -> pa.Table:
        """Asks `count` questions at temperature 1; returns their training sequences."""
        with ThreadPoolExecutor(16) as pool:
            replies = list(
                pool.map(lambda i: self.post(f"{prefix}{i}", **question(100 + i)), range(count))
            )
        assert all(reply.status_code == 200 for reply in replies)
        attempts = {f"{prefix}{i}/1": f"g{i}" for i in range(count)}
        sequences, report = build_sequences(self.store.get(list(attempts)), attempts, "policy")
        assert report.inexact == {} and report.calls == count
        return sequences

    def difference(self, sequences: pa.Table, learner: LearnerGroup | None = None) -> float:
        """Mean absolute difference between a learner's logprobs and the recorded ones."""
        learner = learner or self.learner
        found = np.concatenate(learner.logprobs(ray.put(sequences), 300))
        trainable = np.concatenate([np.array(row) for row in sequences["trainable"].to_pylist()])
        recorded = np.concatenate([np.array(row) for row in sequences["logprobs"].to_pylist()])
        return float(np.abs(found - recorded[trainable]).mean())


def question(number: int) -> dict[str, object]:
    """A short answer is asked for."""
    return {
        "model": "gpt-4o-mini",
        "max_tokens": 20,
        "messages": [
            {"role": "system", "content": "Turn each question into a calculator expression."},
            {"role": "user", "content": "What is 12 plus 30?"},
            {"role": "assistant", "content": "calc(12 + 30)"},
            {"role": "user", "content": f"What is {number} plus 41?"},
        ],
    }
