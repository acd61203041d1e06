"""Packed rows against a trie built one token at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_support import to_table, token_trees

from lightning_ray.algorithms import LossConfig, token_weights
from lightning_ray.learner.packing import Row, empty_row, pack, share_of_rank


def prefixes_of(row: Row) -> list[tuple[int, ...]]:
    """For each node the tokens from its root to itself, following the ancestor relation."""
    size = len(row.input_ids)
    return [
        tuple(int(row.input_ids[j]) for j in range(i + 1) if i < row.subtree_end[j])
        for i in range(size)
    ]


@settings(max_examples=200, deadline=None)
@given(token_trees(), st.integers(1, 40))
def test_every_distinct_prefix_is_a_node_once_and_ancestors_are_prefixes(batch, tokens_per_row):
    packed = pack(batch, tokens_per_row)
    for row in packed.rows:
        prefixes = prefixes_of(row)
        assert len(set(prefixes)) == len(prefixes)
        assert [len(prefix) - 1 for prefix in prefixes] == row.position_ids.tolist()
        for i, prefix in enumerate(prefixes):
            for j, other in enumerate(prefixes):
                is_ancestor = j <= i < row.subtree_end[j]
                assert is_ancestor == (prefix[: len(other)] == other)
    if tokens_per_row >= 40 and packed.distinct_tokens <= 40:
        assert len(packed.rows) <= 1


@settings(max_examples=200, deadline=None)
@given(token_trees(), st.integers(1, 40), st.sampled_from(["token_mean", "sequence_mean"]))
def test_every_trainable_token_is_learnt_once_from_what_came_before_it(
    batch, tokens_per_row, aggregation
):
    packed = pack(batch, tokens_per_row, LossConfig(aggregation=aggregation))
    expected = {}
    number = unlearnable = 0
    attempts = []
    for row in batch.to_pylist():
        for place, trainable in enumerate(row["trainable"]):
            if not trainable:
                continue
            if place == 0:
                unlearnable += 1
            else:
                before, token = tuple(row["token_ids"][:place]), row["token_ids"][place]
                numbers = (row["logprobs"][place], row["advantages"][place])
                expected[number] = (before, token, *numbers)
                attempts.append(int(row["attempt_id"][1:]))
            number += 1
    found = {}
    weights = {}
    for row in packed.rows:
        prefixes = prefixes_of(row)
        pairs = list(zip(row.logit_predictor.tolist(), row.logit_target.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        assert set(row.entry.tolist()) == set(range(len(pairs)))
        assert (np.diff(row.sequence) >= 0).all() and (np.diff(row.sequence) <= 1).all()
        assert row.sequence[0] == 0
        for n, token in enumerate(row.token.tolist()):
            predictor, target = pairs[row.entry[n]]
            assert token not in found
            if n and row.sequence[n] == row.sequence[n - 1]:
                # In the order of their positions, each behind the one before.
                before = prefixes[pairs[row.entry[n - 1]][0]]
                assert len(before) < len(prefixes[predictor])
                assert prefixes[predictor][: len(before)] == before
            found[token] = (
                prefixes[predictor],
                target,
                row.old_logprobs[n],
                row.advantages[n],
            )
            weights[token] = row.weights[n]
    assert found == expected
    assert (packed.trainable_tokens, packed.unlearnable_tokens) == (number, unlearnable)
    np.testing.assert_allclose(
        [weights[token] for token in sorted(weights)],
        token_weights(np.array(attempts, np.int64), aggregation),
        rtol=1e-6,
    )


@settings(max_examples=100, deadline=None)
@given(token_trees(), st.integers(1, 40))
def test_rows_keep_to_their_budget_unless_one_sequence_is_longer(batch, tokens_per_row):
    packed = pack(batch, tokens_per_row)
    longest = max(map(len, batch["token_ids"].to_pylist()))
    assert packed.total_tokens == sum(map(len, batch["token_ids"].to_pylist()))
    for row in packed.rows:
        assert len(row.input_ids) <= max(tokens_per_row, longest)
        if len(row.input_ids) > tokens_per_row:
            assert row.subtree_end[0] == len(row.input_ids)
            assert (np.diff(row.position_ids) == 1).all()  # a single path


def test_a_shared_prompt_is_computed_once():
    prompt = list(range(50))
    rows = [
        {"token_ids": [*prompt, 60 + i, 70, 71], "trainable": [False] * 50 + [True] * 3}
        for i in range(8)
    ]
    packed = pack(to_table(rows), 512)
    # The last token of an answer predicts nothing: 50 shared, then two of each answer.
    assert packed.distinct_tokens == 50 + 8 * 2
    assert packed.total_tokens == 8 * 53


def test_equal_samples_share_a_logprob_but_not_their_credit():
    row = {"token_ids": [1, 2, 3], "trainable": [False, False, True]}
    better = row | {"advantages": [0.0, 0.0, 2.0]}
    (packed,) = pack(to_table([row, better]), 512).rows
    assert packed.logit_target.tolist() == [3]
    assert packed.entry.tolist() == [0, 0]
    assert sorted(packed.advantages.tolist()) == [1.0, 2.0]


def test_a_batch_without_anything_to_learn_has_no_rows():
    rows = [
        {"token_ids": [1, 2], "trainable": [False, False]},
        {"token_ids": [1], "trainable": [True]},
    ]
    packed = pack(to_table(rows), 512)
    assert packed.rows == [] and packed.unlearnable_tokens == 1
    assert pack(to_table(rows).slice(0, 0), 512).rows == []


def test_columns_that_disagree_are_refused():
    batch = to_table([{"token_ids": [1, 2], "trainable": [False, True]}])
    other = to_table([{"token_ids": [1], "trainable": [True]}])
    index = batch.schema.get_field_index("trainable")
    broken = batch.set_column(index, "trainable", other["trainable"])
    with pytest.raises(ValueError, match="trainable"):
        pack(broken, 512)


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 4))
def test_ranks_share_all_rows_in_equally_many_passes(sizes, num_ranks):
    rows = []
    for index, size in enumerate(sizes):
        tokens = [index % 3] * (size + 1)
        rows += pack(
            to_table([{"token_ids": tokens, "trainable": [False] * size + [True]}]), 1
        ).rows
    shares = [share_of_rank(rows, rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(share) for share in shares}) == 1
    kept = [row for share in shares for row in share if len(row.entry)]
    assert sorted(map(id, kept)) == sorted(map(id, rows))
    assert len(empty_row().entry) == 0


def test_rows_of_unrelated_samples_are_full() -> None:
    random = np.random.default_rng(5)
    rows = []
    for length in random.integers(20, 200, 300).tolist():
        tokens = random.integers(0, 40_000, length).tolist()
        rows.append({"token_ids": tokens, "trainable": [False] * (length - 8) + [True] * 8})
    packed = pack(to_table(rows), 512)
    assert packed.distinct_tokens / (len(packed.rows) * 512) > 0.95


def test_rows_of_groups_that_share_a_prompt_are_full() -> None:
    random = np.random.default_rng(6)
    system = random.integers(0, 40_000, 60).tolist()
    rows = []
    for _ in range(160):
        prompt = system + random.integers(0, 40_000, int(random.integers(10, 40))).tolist()
        for _ in range(8):
            answer = random.integers(0, 40_000, int(random.integers(5, 30))).tolist()
            trainable = [False] * len(prompt) + [True] * len(answer)
            rows.append({"token_ids": prompt + answer, "trainable": trainable})
    packed = pack(to_table(rows), 512)
    assert packed.distinct_tokens / (len(packed.rows) * 512) > 0.95
    # Each row has the shared beginning once more; beside that nothing is computed twice.
    unshared = sum(len(row["token_ids"]) - 1 for row in rows)
    assert packed.distinct_tokens < 0.6 * unshared
