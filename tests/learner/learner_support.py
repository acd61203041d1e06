"""Random trees of sequences, a tiny model, and the plain computation to compare with."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_ray.trajectories import SEQUENCE_SCHEMA

VOCABULARY = 256

HAS_GPU = torch.cuda.is_available()
NUM_GPUS = 1.0 if HAS_GPU else 0.0
"""What a learner in this process is given: where there is a GPU, the tests run on it."""
DEVICES = ["cpu", "cuda"] if HAS_GPU else ["cpu"]


def tiny_model(folder: Path) -> Path:
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def load_plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def to_table(rows: list[dict[str, object]]) -> pa.Table:
    """Rows with `token_ids`, `trainable`, and where they matter `advantages` and `logprobs`."""
    filled = []
    for index, row in enumerate(rows):
        size = len(row["token_ids"])
        filled.append(
            {
                "group_id": "g",
                "rollout_id": f"r{index}",
                "attempt_id": f"r{index}/0",
                "policy": "main",
                "logprobs": [-5.0 if t else 0.0 for t in row["trainable"]],
                "versions": [2 if t else -1 for t in row["trainable"]],
                "calls": [0 if t else -1 for t in row["trainable"]],
                "advantages": [1.0 if t else 0.0 for t in row["trainable"]],
            }
            | row
        )
        assert len(row["trainable"]) == size
    return pa.Table.from_pylist(filled, schema=SEQUENCE_SCHEMA)


@st.composite
def token_trees(draw: st.DrawFn, vocabulary: int = 3, largest: int = 8) -> pa.Table:
    """Sequences that share prefixes in every way: equal, nested, branching, unrelated."""
    tokens = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=6)
    rows: list[dict[str, object]] = []
    known: list[list[int]] = [[]]
    for index in range(draw(st.integers(1, largest))):
        origin = draw(st.sampled_from(known))
        sequence = origin[: draw(st.integers(0, len(origin)))] + draw(tokens)
        known.append(sequence)
        trainable = draw(st.lists(st.booleans(), min_size=len(sequence), max_size=len(sequence)))
        advantage = draw(st.floats(-2, 2, width=16))
        attempt = draw(st.integers(0, 2))
        rows.append(
            {
                "token_ids": sequence,
                "trainable": trainable,
                "attempt_id": f"a{attempt}",
                "logprobs": [-draw(st.floats(0.5, 9, width=16)) if t else 0.0 for t in trainable],
                "advantages": [advantage + index if t else 0.0 for t in trainable],
            }
        )
    return to_table(rows)


def plain_loss(
    model: torch.nn.Module, batch: pa.Table, aggregation: str, low: float, high: float
) -> tuple[torch.Tensor, list[np.ndarray]]:
    """The batch loss with every sequence in a row of its own, one token at a time.

    Returns it with the logprobs of the trainable tokens of each row (those at position 0 left out).
    """
    rows = batch.to_pylist()
    learnt = {
        index: [place for place, t in enumerate(row["trainable"]) if t and place > 0]
        for index, row in enumerate(rows)
    }
    per_attempt: dict[str, int] = {}
    for index, row in enumerate(rows):
        per_attempt[row["attempt_id"]] = per_attempt.get(row["attempt_id"], 0) + len(learnt[index])
    attempts = sum(1 for count in per_attempt.values() if count)
    device = next(model.parameters()).device
    loss = torch.zeros((), device=device)
    logprobs: list[np.ndarray] = []
    for index, row in enumerate(rows):
        logits = model(input_ids=torch.tensor([row["token_ids"]], device=device)).logits[0].float()
        table = logits.log_softmax(dim=-1)
        mine = []
        for place in learnt[index]:
            new = table[place - 1, row["token_ids"][place]]
            ratio = (new - row["logprobs"][place]).exp()
            advantage = row["advantages"][place]
            clipped = ratio.clamp(1 - low, 1 + high)
            weight = (
                1 / sum(per_attempt.values())
                if aggregation == "token_mean"
                else 1 / (attempts * per_attempt[row["attempt_id"]])
            )
            loss = loss - weight * torch.minimum(ratio * advantage, clipped * advantage)
            mine.append(new.item())
        logprobs.append(np.array(mine, np.float32))
    return loss, logprobs
