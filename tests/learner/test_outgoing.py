"""Weights on their way out: whole in memory at once, and on disk soon after."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_support import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_ray.errors import InfrastructureError
from lightning_ray.learner import outgoing as outgoing_module
from lightning_ray.learner.outgoing import MemoryFile, Outgoing, checkpoint_tensors
from lightning_ray.policies.handover import Checksum, Way

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Some tensors of any types and shapes, none of them empty of elements by chance alone."""
    found = {}
    for name in draw(
        st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True)
    ):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        seed = draw(st.integers(0, 2**31))
        values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
        found[name] = values.to(draw(st.sampled_from(TYPES)))
    return found


def digest(found: dict[str, torch.Tensor]) -> str:
    checksum = Checksum()
    for name, tensor in found.items():
        checksum.add(name, tensor)
    return checksum.hexdigest()


def read(path: str) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def memory() -> Iterator[MemoryFile]:
    yield MemoryFile()


@given(tensors(), tensors())
def test_a_file_in_memory_is_read_as_any_other_and_written_again(
    memory: MemoryFile, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> None:
    for written in (first, second):
        assert memory.write(written) == digest(written)
        found = read(memory.path)
        assert found.keys() == written.keys()
        for name, tensor in written.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert len(memory.bytes()) == memory.nbytes == os.stat(memory.path).st_size


@given(tensors(), st.data())
def test_a_checksum_is_of_what_is_there_and_not_of_its_order(
    found: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    assert digest(dict(reversed(found.items()))) == digest(found)
    name = data.draw(st.sampled_from(sorted(found)))
    tensor = found[name]
    assert digest({**found, name: tensor.unsqueeze(0)}) != digest(found)
    assert digest({n + "x": t for n, t in found.items()}) != digest(found)
    if tensor.numel():
        damaged = tensor.clone().flatten().view(torch.uint8)
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        damaged = damaged.view(tensor.dtype).view(tensor.shape)
        assert digest({**found, name: damaged}) != digest(found)


@given(tensors(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_tensors_change_their_type_as_they_are_written(
    memory: MemoryFile, given_ones: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    wanted = {name: tensor.to(dtype) for name, tensor in given_ones.items()}
    assert memory.write(given_ones, dtype) == digest(wanted)
    found = read(memory.path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor)


@given(st.sampled_from([8, 32, 50, 500]), st.data())
def test_a_checksum_finds_neighbours_that_changed_places(size: int, data: st.DataObject) -> None:
    values = torch.arange(size, dtype=torch.float32)
    place = 2 * data.draw(st.integers(0, size // 2 - 2))
    swapped = values.clone()
    swapped[place : place + 2], swapped[place + 2 : place + 4] = (
        values[place + 2 : place + 4],
        values[place : place + 2],
    )
    assert digest({"w": values}) != digest({"w": swapped})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


@pytest.mark.parametrize("way", [Way.shared_memory, Way.disk])
def test_a_version_is_handed_over_and_then_lies_on_disk(
    model: Path, tmp_path: Path, way: Way
) -> None:
    outgoing = Outgoing(model, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for number in (1, 2):
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.add_(0.1)
        target = tmp_path / "versions" / str(number)
        weights = checkpoint_tensors(loaded, dict(loaded.state_dict()))
        handed = outgoing.hand_over(target, weights, way)
        assert handed.digest == digest(weights) and handed.folder == str(target)
        if way is Way.shared_memory:
            assert digest(read(handed.memory)) == handed.digest
        outgoing.settle(30.0)
        # What training does to the model from now on is none of the version's business.
        assert digest(load_file(target / "model.safetensors")) == handed.digest
        again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        for name, value in loaded.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        assert (target / "tokenizer.json").is_file() is (model / "tokenizer.json").is_file()
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("told", [True, False])
def test_a_version_is_written_once_engines_have_it_or_nobody_says_so_for_long(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    monkeypatch.setattr(outgoing_module, "UNDISTURBED_S", 60.0 if told else 1.5)
    outgoing = Outgoing(model, torch.float32)
    for number in (1, 2):
        target = tmp_path / "versions" / str(number)
        outgoing.hand_over(target, {"w": torch.full((3,), float(number))}, Way.shared_memory)
        time.sleep(0.2)
        assert not target.is_dir()
        if told:
            outgoing.taken()
        deadline = time.monotonic() + 10.0
        while not target.is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert target.is_dir()
        outgoing.settle(10.0)
        assert load_file(target / "model.safetensors")["w"].tolist() == [number] * 3


def test_who_settles_waits_for_nobody_to_say_that_engines_have_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing_module, "UNDISTURBED_S", 60.0)
    outgoing = Outgoing(model, torch.float32)
    outgoing.hand_over(tmp_path / "versions" / "1", {"w": torch.ones(3)}, Way.shared_memory)
    outgoing.settle(10.0)
    assert (tmp_path / "versions" / "1").is_dir()


def test_a_version_that_cannot_be_written_is_said_when_it_is_settled(
    model: Path, tmp_path: Path
) -> None:
    outgoing = Outgoing(model, torch.float32)
    (model / "config.json").unlink()
    target = tmp_path / "versions" / "1"
    handed = outgoing.hand_over(target, {"w": torch.ones(3)}, Way.shared_memory)
    assert digest(read(handed.memory)) == handed.digest
    with pytest.raises(
        InfrastructureError, match=r"versions/1 could not be written: .*config.json"
    ):
        outgoing.settle(30.0)
    assert not target.exists()
    outgoing.settle(0.0)


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tied")
    settings = json.loads((folder / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    found = checkpoint_tensors(loaded, dict(loaded.state_dict()))
    assert ("lm_head.weight" in found) is not settings["tie_word_embeddings"]
    assert len({value.data_ptr() for value in found.values()}) == len(found)
