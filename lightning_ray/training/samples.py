"""The page of sample trajectories: of the last checkpointed step that had anything to learn."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from tokenizers import Tokenizer

from lightning_ray.rollouts import RolloutRecord
from lightning_ray.tracking import AttemptInfo, render_trajectory_page


def write_samples(
    path: Path, records: Sequence[RolloutRecord], sequences: pa.Table, model: Path
) -> None:
    """Writes the sequences (SEQUENCE_SCHEMA) with their tasks, results and rewards as one page.

    `model` is the folder whose tokenizer.json gives the tokens' text; a model without one is left
    without a page.
    """
    file = model / "tokenizer.json"
    if not file.is_file():
        return
    tokenizer = Tokenizer.from_file(str(file))

    def decode(token_id: int) -> str:
        return tokenizer.decode([token_id], skip_special_tokens=False)

    info = {
        record.attempt_id: AttemptInfo(
            task=json.dumps(record.spec.task, ensure_ascii=False),
            result=record.outcome.result,
            rewards=record.outcome.rewards,
        )
        for record in records
        if record.attempts and record.outcome is not None
    }
    path.write_text(render_trajectory_page(sequences, decode, info), encoding="utf-8")
