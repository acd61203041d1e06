"""Folders that exist whole or not at all.

Invariant: a folder appears under its name only after everything in it is on disk, by one rename; a
process killed while writing leaves a hidden `.NAME.partial` beside it, which the next try clears.
A folder that exists is never written to again.
"""

import json
import os
import shutil
from pathlib import Path

# Weights are written anew; everything else that makes a folder a model is copied from the base.
WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot"}
)


def partial_folder(path: Path) -> Path:
    """An empty folder beside `path` in which to prepare it.

    Raises:
        FileExistsError: `path` exists; what is published or saved is never overwritten.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists and is never overwritten")
    partial = path.with_name(f".{path.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit_folder(partial: Path, path: Path) -> None:
    """Make sure that `partial` is on disk, then give it its name.

    Whoever may read the folder may read its files: safetensors writes some for its user alone.
    """
    readable = partial.stat().st_mode & 0o666
    for folder, _, names in os.walk(partial):
        for name in names:
            Path(folder, name).chmod(readable)
            _sync(Path(folder, name))
        _sync(Path(folder))
    partial.rename(path)
    _sync(path.parent)


def copy_companions(base: Path, target: Path, dtype: str) -> None:
    """Copy the files of a model folder that are not weights; `target` has weights of type `dtype`.

    That is the configuration, the tokenizer, its chat template, the generation settings, the
    licence. Names differ from model to model, so what is left out is named instead. They replace
    what is there: the base's own files say what its author meant.
    """
    for source in sorted(base.iterdir()):
        is_weight = source.suffix in WEIGHT_SUFFIXES or source.name.endswith(".index.json")
        if source.is_file() and not is_weight:
            shutil.copyfile(source, target / source.name)
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)  # the older name of the same setting
    (target / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse(path: str) -> None:
    """Refuses a folder that exists, on every rank alike, before anything is written.

    Raises:
        FileExistsError: it exists.
    """
    import torch

    if Path(path).exists():
        raise FileExistsError(f"{path} exists and is never overwritten")
    torch.distributed.barrier()
