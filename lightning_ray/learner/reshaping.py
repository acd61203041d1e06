"""A checkpoint of some ranks, loaded by another number of them.

With ZeRO every rank saves the slices it owns. DeepSpeed's own converter puts them together, one
file a parameter (its "universal" checkpoint), from which any number of ranks take their slices. It
is done when such a checkpoint is loaded and not whenever one is saved: most are never loaded, and
those that are mostly by as many ranks as saved them.
"""

import argparse
import contextlib
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_ray.errors import UserError


def load_engine(engine: Any, folder: Path, tag: str, saved_ranks: int) -> None:
    """Load weights and optimiser of `folder`, which `saved_ranks` ranks saved, into any number.

    A collective. Raises UserError on every rank when they cannot be read.
    """
    import torch

    split = engine.zero_optimization() and saved_ranks != torch.distributed.get_world_size()
    if not split:  # as many ranks; or no ZeRO, and all of them saved the same
        loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
    else:
        with _put_together(folder, tag) as whole:
            engine._config.load_universal_checkpoint = True
            try:
                loaded, _ = engine.load_checkpoint(str(whole), tag=tag)
            finally:
                engine._config.load_universal_checkpoint = False
    if loaded is None:
        raise UserError(f"the checkpoint {folder} cannot be read; name another one")


@contextlib.contextmanager
def _put_together(folder: Path, tag: str) -> Iterator[Path]:
    """A converted checkpoint in a folder beside `folder`, which rank 0 makes and removes."""
    import torch

    first = torch.distributed.get_rank() == 0
    work = folder.with_name(f".{folder.name}.reshaped")
    failure: list[str | None] = [None]
    if first:
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir()
            _convert(folder / tag, work / tag)
        # What a damaged or foreign file raises inside the converter; every rank must be told.
        except (
            *(OSError, EOFError, RuntimeError, ValueError),
            *(LookupError, AssertionError, pickle.UnpicklingError),
        ) as error:
            failure[0] = f"{type(error).__name__}: {error}"
    torch.distributed.broadcast_object_list(failure, src=0)
    try:
        if failure[0] is not None:
            raise UserError(
                f"the checkpoint {folder} cannot be put together for another number of ranks "
                f"({failure[0]}); load it with as many as saved it"
            )
        yield work
        torch.distributed.barrier()  # every rank has read it
    finally:
        if first:
            shutil.rmtree(work, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    asked = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # What a model with tensor parallelism would say of its parameters; ours has none to say.
        inject_missing_state=True,
    )
    # It tells its progress to a terminal.
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        ds_to_universal.main(asked)
