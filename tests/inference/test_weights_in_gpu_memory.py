"""What an engine's worker does with weights in a GPU's memory, the GPU itself left out."""

import json
from contextlib import contextmanager
from dataclasses import astuple, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from lightning_ray.errors import InfrastructureError
from lightning_ray.inference import worker_extension
from lightning_ray.policies.adapters import SETTINGS, peft_name
from lightning_ray.policies.adapters import WEIGHTS as WEIGHTS_FILE
from lightning_ray.policies.gpu_memory import GpuWeights
from lightning_ray.policies.handover import Checksum, Way, shortest_way

SENT = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4)}
WEIGHTS = GpuWeights("GPU-1", bytes(range(64)), 300, [("a.weight", "float32", [2, 3], 0)], "node/0")


class Worker(worker_extension.ReplaceWeights):
    """A worker of vLLM's without the worker; `loaded` is what it was given last."""

    def __init__(self):
        self.loaded = {}
        self.read = []
        model = SimpleNamespace(dtype=torch.float32, head_dtype=torch.float32)
        self.vllm_config = SimpleNamespace(model_config=model)

    def reload_weights(self, weights_iterator):
        self.loaded = dict(weights_iterator)

    def get_model(self):
        return torch.nn.Linear(1, 1)

    def _of_folder(self, folder):
        self.read.append(folder)
        return iter({"folder": torch.ones(1), "a.weight": torch.zeros(2, 2)}.items())


def digest_of(tensors):
    checksum = Checksum()
    for name, tensor in tensors.items():
        checksum.add(name, tensor)
    return checksum.hexdigest()


@pytest.fixture
def shared(monkeypatch):
    """What the GPU's memory holds; None where it cannot be opened."""
    held = {"tensors": SENT, "open": 0}

    @contextmanager
    def opened(weights):
        if held["tensors"] is None:
            raise InfrastructureError("refused")
        layout = [tuple(one) for one in weights.layout]
        assert replace(weights, layout=layout) == WEIGHTS
        held["open"] += 1
        yield iter(held["tensors"].items())
        held["open"] -= 1

    monkeypatch.setattr(worker_extension, "opened", opened)
    monkeypatch.setattr(worker_extension, "FOLDER_S", 0.2)
    return held


def as_received():
    """As vLLM's core hands an argument on to a worker."""
    sent = MsgpackEncoder().encode([astuple(WEIGHTS)])
    (found,) = MsgpackDecoder().decode(sent)
    return found


def test_weights_are_read_where_they_are_and_checked(shared):
    worker = Worker()
    worker.replace_weights("nowhere", "", digest_of(SENT), "", 0.0, as_received())
    assert worker.loaded.keys() == SENT.keys() and worker.read == []
    assert shared["open"] == 0
    with pytest.raises(InfrastructureError, match="did not arrive as they were sent"):
        worker.replace_weights("nowhere", "", digest_of({}), "", 0.0, as_received())


def test_additions_are_put_into_the_base(shared):
    shared["tensors"] = {
        "a.weight.lora_A": torch.ones(1, 2),
        "a.weight.lora_B": torch.full((2, 1), 3.0),
    }
    worker = Worker()
    digest = digest_of(shared["tensors"])
    worker.replace_weights("v1", "", digest, "base", 0.5, as_received())
    assert worker.read == ["base"]
    assert torch.equal(worker.loaded["a.weight"], torch.full((2, 2), 1.5))


def test_what_cannot_be_opened_is_read_from_the_folder(shared, tmp_path):
    shared["tensors"] = None
    worker = Worker()
    with pytest.raises(InfrastructureError, match="was not written within"):
        worker.replace_weights(str(tmp_path / "v1"), "", "", "", 0.0, as_received())
    (tmp_path / "v1").mkdir()
    # Of additions the digest is not that of the folder, which has the whole model.
    worker.replace_weights(str(tmp_path / "v1"), "", "other", "base", 0.5, as_received())
    assert worker.read == [str(tmp_path / "v1")] and "folder" in worker.loaded


def test_of_an_adapters_folder_what_is_read_is_checked_and_added(shared, tmp_path):
    shared["tensors"] = None
    base, folder = tmp_path / "base", tmp_path / "v1"
    base.mkdir()
    folder.mkdir()
    sent = {
        "a.weight.lora_A": torch.ones(1, 2),
        "a.weight.lora_B": torch.full((2, 1), 3.0),
    }
    save_file({peft_name(name): value for name, value in sent.items()}, folder / WEIGHTS_FILE)
    settings = {"r": 2, "lora_alpha": 1.0, "base_model_name_or_path": str(base)}
    (folder / SETTINGS).write_text(json.dumps(settings))
    for gpu, handed in ((), ("", 0.0)), ((), (str(base), 0.5)), (as_received(), (str(base), 0.5)):
        worker = Worker()
        worker.replace_weights(str(folder), "", digest_of(sent), *handed, gpu)
        assert worker.read == [str(base)]
        assert torch.equal(worker.loaded["a.weight"], torch.full((2, 2), 1.5))
    with pytest.raises(InfrastructureError, match="did not arrive as they were sent"):
        Worker().replace_weights(str(folder), "", digest_of({}))


@pytest.mark.parametrize(
    ("nodes", "gpu", "gpus", "way"),
    [
        ({"n"}, "n/0", {"n/0"}, Way.gpu_memory),
        ({"n"}, "n/0", {"n/0", "n/1"}, Way.shared_memory),
        ({"n"}, "n/0", {"n/1"}, Way.shared_memory),
        ({"n"}, "n/0", {""}, Way.shared_memory),
        ({"n"}, "", {""}, Way.shared_memory),
        ({"n", "m"}, "n/0", {"n/0", "m/0"}, Way.object_store),
        (set(), "n/0", set(), Way.object_store),
    ],
)
def test_the_shortest_way_reaches_every_engine(nodes, gpu, gpus, way):
    assert shortest_way("n", nodes, gpu, gpus) is way
