import json
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ray.errors import UserError
from lightning_ray.policies import models
from lightning_ray.policies.models import check_model_folder, embedded_model, resolve_model

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What has the files of a model; nothing is loaded here."""
    path = tmp_path / "model"
    path.mkdir()
    for name in FILES:
        (path / name).write_text("{}")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own, in which nothing was converted yet, and a package to convert from."""
    (tmp_path / "smollm2.gguf").write_bytes(b"")
    monkeypatch.setattr(models, "_embedded_gguf", lambda: tmp_path / "smollm2.gguf")
    monkeypatch.setenv("LIGHTNING_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(name: str) -> str:
    with pytest.raises(UserError) as raised:
        resolve_model(name)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_a_whole_folder_is_taken_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_model("./model") == folder and resolve_model("model") == folder


@pytest.mark.parametrize("missing", FILES)
def test_the_file_that_a_model_folder_lacks_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    message = refused(str(folder))
    assert message.startswith(f"model folder {folder} lacks ") and missing in message


def test_every_shard_of_an_index_must_be_there(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": dict(zip("abc", [*shards, shards[0]], strict=True))})
    )
    (folder / shards[0]).write_text("")
    assert f"lacks {shards[1]}" in refused(str(folder))
    (folder / shards[1]).write_text("")
    check_model_folder(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(folder: Path, content: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    assert refused(str(folder)).startswith(f"{index} lists no weights")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe"])
def test_a_broken_configuration_is_named(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert refused(str(folder)).startswith(f"{folder / 'config.json'} is not JSON")


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_a_name_that_is_no_folder_and_no_hub_id_is_refused(name: str) -> None:
    assert refused(name) == (
        f"policy.model={name}: no such folder; name a model folder or an id ORG/NAME"
    )


def test_a_converted_model_is_used_again_and_a_broken_one_named(cache: Path, folder: Path) -> None:
    target = cache / "models" / models.EMBEDDED_FOLDER
    shutil.copytree(folder, target)
    assert embedded_model() == target
    (target / "model.safetensors").unlink()
    message = refused("embedded")
    assert "lacks weights (model.safetensors)" in message
    assert f"delete {target} and it is converted again" in message


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 1 MiB, or where none can be mounted a disk that says so of itself."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**20, 0, 2**20))
    yield path
    if mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_cache_without_space_is_one_line_and_left_empty(
    cache: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_RAY_CACHE", str(small_disk))
    assert refused("embedded") == (
        f"no space for the model cache: {small_disk}/models has 1 MB free and 300 MB are needed; "
        "free some, or set LIGHTNING_RAY_CACHE"
    )
    assert list((small_disk / "models").iterdir()) == []


def test_a_disk_that_fills_up_while_converting_leaves_nothing_behind(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(gguf: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_convert_gguf", fill_up)
    assert "no space for the model cache" in refused("embedded")
    assert list((cache / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_RAY_CACHE", str(tmp_path / "file"))
    message = refused("embedded")
    assert message.startswith(f"cannot write the model cache {tmp_path}/file/models: Not a dir")
    assert "LIGHTNING_RAY_CACHE" in message


def test_two_conversions_at_once_end_with_one_whole_model(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = cache / "models" / models.EMBEDDED_FOLDER

    def overtaken(gguf: Path, work: Path) -> None:
        shutil.copytree(folder, target)
        shutil.copytree(folder, work, dirs_exist_ok=True)
        (work / "config.json").write_text('{"second": true}')

    monkeypatch.setattr(models, "_convert_gguf", overtaken)
    assert embedded_model() == target
    assert (target / "config.json").read_text() == "{}"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.slow
def test_an_empty_cache_gets_a_model_that_the_environment_can_read_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads the file is a dependency of nothing else: a cache that is full hides its lack."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("LIGHTNING_RAY_CACHE", str(tmp_path))
    folder = embedded_model()
    assert folder == tmp_path / "models" / models.EMBEDDED_FOLDER
    check_model_folder(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 130_000_000
    assert AutoTokenizer.from_pretrained(folder)("12 plus 30")["input_ids"]


def test_an_embedded_model_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed; run `make setup`"):
        models._embedded_gguf()
