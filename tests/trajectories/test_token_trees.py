"""Rebuilding what each call saw, and which call continues which."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ray.spans.schema import SPAN_SCHEMA
from lightning_ray.trajectories import rebuild_trees


def call(span_id: str, tokens: list[int], sampled: int, **changes: object) -> dict[str, object]:
    """A stored model call that samples its last `sampled` tokens."""
    row: dict[str, object] = {
        "span_id": span_id,
        "kind": "model_call",
        "name": "chat",
        "run_id": "run",
        "rollout_id": "r0",
        "attempt_id": "r0/0",
        "sequence": 0,
        "start_ns": 0,
        "end_ns": 1,
        "status": "ok",
        "policy": "main",
        "version": 3,
        "token_ids": tokens,
        "logprobs": [-0.5] * sampled,
    }
    return row | changes


def table(rows: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(
        [{"sequence": index} | row for index, row in enumerate(rows)], schema=SPAN_SCHEMA
    )


def only_tree(rows: list[dict[str, object]]):
    trees, inexact = rebuild_trees(table(rows))
    assert not inexact
    (tree,) = trees
    return tree


def test_a_call_takes_the_prefix_of_the_call_it_continues():
    tree = only_tree(
        [
            call("a", [1, 2, 3, 4], 2),
            call("b", [9, 8, 7], 1, continues="a", prefix_tokens=4, sequence=1),
        ]
    )
    assert tree.calls[1].tokens.tolist() == [1, 2, 3, 4, 9, 8, 7]
    assert tree.parents == (None, 0)
    assert tree.leaves() == [1] and tree.path(1) == [0, 1]


def test_a_rewritten_context_is_a_branch_of_its_own():
    # It shares two tokens in storage, but the answer "3 4" is not in what it saw.
    tree = only_tree(
        [
            call("a", [1, 2, 3, 4], 2),
            call("b", [5, 6], 1, continues="a", prefix_tokens=2, sequence=1),
        ]
    )
    assert tree.parents == (None, None)
    assert tree.leaves() == [0, 1]


def test_a_continuation_that_storage_did_not_notice_is_still_one():
    tree = only_tree([call("a", [1, 2, 3], 1), call("b", [1, 2, 3, 4, 5], 1, sequence=1)])
    assert tree.parents == (None, 0)


def test_repeated_identical_prompts_are_kept_apart():
    rows = [call("a", [1, 2, 3], 1), call("b", [1, 2, 3], 1, sequence=1)]
    tree = only_tree(rows)
    assert tree.parents == (None, None)


def test_of_equal_calls_the_one_that_storage_names_is_continued():
    rows = [
        call("a", [1, 2, 3], 1),
        call("b", [1, 2, 3], 1, sequence=1),
        call("c", [4, 5], 1, continues="a", prefix_tokens=3, sequence=2),
    ]
    assert only_tree(rows).parents == (None, None, 0)


def test_a_parent_may_arrive_after_its_child():
    rows = [
        call("b", [4, 5], 1, continues="a", prefix_tokens=3, sequence=0),
        call("a", [1, 2, 3], 1, sequence=1),
    ]
    tree = only_tree(rows)
    assert tree.calls[0].tokens.tolist() == [1, 2, 3, 4, 5]
    assert tree.parents == (1, None)


def test_what_does_not_add_up_is_reported_and_has_no_tree():
    broken = {
        "missing parent": [call("b", [4], 1, continues="a", prefix_tokens=1)],
        "prefix too long": [
            call("a", [1, 2], 1),
            call("b", [4], 1, continues="a", prefix_tokens=3, sequence=1),
        ],
        "prefix without parent": [call("a", [1, 2], 1, prefix_tokens=2)],
        "circle": [
            call("a", [1, 2], 1, continues="b", prefix_tokens=1),
            call("b", [1, 2], 1, continues="a", prefix_tokens=1, sequence=1),
        ],
        "no tokens": [call("a", [], 0) | {"token_ids": None, "logprobs": None}],
        "more logprobs than tokens": [call("a", [1], 2)],
    }
    for name, rows in broken.items():
        healthy = call("x", [1, 2], 1, attempt_id="r1/0", rollout_id="r1")
        trees, inexact = rebuild_trees(table([*rows, healthy]))
        assert [tree.attempt_id for tree in trees] == ["r1/0"], name
        assert set(inexact) == {"r0/0"}, name


def test_a_call_that_failed_before_its_first_token_spoils_nothing():
    failed = call("f", [], 0, status="error", sequence=1) | {"token_ids": None, "logprobs": None}
    tree = only_tree([call("a", [1, 2], 1), failed])
    assert [call.span_id for call in tree.calls] == ["a"]


def test_no_model_calls_give_no_trees():
    rows = [call("a", [1], 1) | {"kind": "reward", "token_ids": None, "logprobs": None}]
    assert rebuild_trees(table(rows)) == ([], {})
    assert rebuild_trees(SPAN_SCHEMA.empty_table()) == ([], {})


@st.composite
def stored_attempts(draw: st.DrawFn) -> tuple[list[dict[str, object]], dict[str, list[int]]]:
    """Calls stored against random earlier calls by their longest common prefix or less."""
    rows: list[dict[str, object]] = []
    full: dict[str, list[int]] = {}
    tokens = st.lists(st.integers(0, 2), min_size=0, max_size=4)
    for index in range(draw(st.integers(1, 6))):
        span_id = f"s{index}"
        changes: dict[str, object] = {"sequence": index}
        seen: list[int] = []
        if full and draw(st.booleans()):
            parent = draw(st.sampled_from(sorted(full)))
            prefix = draw(st.integers(0, len(full[parent])))
            changes |= {"continues": parent, "prefix_tokens": prefix}
            seen = full[parent][:prefix]
        added, sampled = draw(tokens), draw(tokens)
        full[span_id] = seen + added + sampled
        rows.append(call(span_id, added + sampled, len(sampled), **changes))
    return draw(st.permutations(rows)), full


@settings(max_examples=200, deadline=None)
@given(stored_attempts())
def test_rebuilt_tokens_and_edges_are_exact(attempt):
    rows, full = attempt
    tree = only_tree(rows)
    assert {call.span_id: call.tokens.tolist() for call in tree.calls} == full
    for call_, parent in zip(tree.calls, tree.parents, strict=True):
        prompt = call_.tokens[: call_.prompt_length].tolist()
        fitting = [
            len(other.tokens)
            for other in tree.calls
            if len(other.logprobs)
            and other is not call_
            and prompt[: len(other.tokens)] == other.tokens.tolist()
        ]
        assert (parent is None) == (not fitting)
        if parent is not None:
            assert len(tree.calls[parent].tokens) == max(fitting)
    covered = np.concatenate([tree.path(leaf) for leaf in tree.leaves()])
    assert set(covered.tolist()) == set(range(len(tree.calls)))
