"""What attempts, roles and calls are worth, and which tokens get it."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_token_trees import call, table

from lightning_ray.errors import UserError
from lightning_ray.spans import SpanKind, span
from lightning_ray.spans.rewards import rewards
from lightning_ray.trajectories import (
    CallPlaces,
    CreditConfig,
    build_sequences,
    by_token,
    check_credit,
    cut_sequences,
    members,
    require_rewards,
    step_rewards,
    tokens_per_call,
    with_advantages,
)
from lightning_ray.trajectories.batch import list_arrays
from lightning_ray.trajectories.credit import returns, worth

NUMBER = st.floats(-5, 5)


@given(
    st.integers(1, 8),
    NUMBER,
    st.dictionaries(st.integers(0, 12), NUMBER, max_size=5),
    st.floats(0.1, 1.0),
)
def test_a_return_is_the_sum_of_what_follows_discounted(
    calls: int, final: float, steps: dict[int, float], discount: float
) -> None:
    found = returns(CreditConfig(discount=discount), calls, final, steps)
    for k in range(calls):
        wanted = discount ** (calls - 1 - k) * final
        for step, value in steps.items():
            at = min(step, calls - 1)
            wanted += discount ** (at - k) * value if at >= k else 0.0
        assert found[k] == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_an_attempt_is_worth_the_weighted_sum_of_its_rewards() -> None:
    config = CreditConfig(
        {"reward": 1.0, "brief": 0.5, "unused": 0.0}, roles={"solver": {"right": 2.0}}
    )
    given = {"reward": 1.0, "brief": -1.0, "right": 0.25}
    assert worth(config, given) == 0.5
    assert worth(config, given, "solver") == 0.5
    assert worth(config, given, "planner") == 0.5
    assert worth(config, {"reward": 1.0}) is None and worth(config, {"brief": 1}, "solver") is None
    assert CreditConfig().is_plain and not config.is_plain and not config.by_call


def test_members_are_an_attempt_a_roles_part_of_it_or_a_call() -> None:
    asked = CallPlaces(3, (0, 1, 2), ("planner", "solver", "planner"))
    lengths = {0: 5, 2: 7, 1: 3}
    given = {"reward": 1.0, "right": 0.5}

    def of(config: CreditConfig, steps: dict[int, float] | None = None) -> list[tuple]:
        found = members(config, "a", "g", given, steps or {}, asked, lengths)
        assert found is not None
        return [(one.group, one.calls, one.worth, one.length) for one in found]

    assert of(CreditConfig()) == [("g", (0, 1, 2), 1.0, 15)]
    per_role = CreditConfig(roles={"solver": {"right": 1.0}})
    assert of(per_role) == [("g", (0, 2), 1.0, 12), ("g solver", (1,), 0.5, 3)]
    by_step = CreditConfig(steps={"progress": 1.0})
    assert of(by_step, {1: 0.5}) == [
        ("g", (0,), 1.5, 5),
        ("g", (1,), 1.5, 3),
        ("g", (2,), 1.0, 7),
    ]
    both = CreditConfig(roles={"solver": {"right": 1.0}}, discount=0.5)
    assert of(both) == [
        ("g", (0,), 0.25, 5),
        ("g", (2,), 1.0, 7),
        ("g solver", (1,), 0.25, 3),
    ]
    # A call without tokens in between is a step as well.
    asked = CallPlaces(4, (0, 2, 3), ("planner", "solver", "planner"))
    assert [worth for _, _, worth, _ in of(by_step, {1: 0.5, 2: 0.25})] == [1.75, 1.25, 1.0]
    # Whoever has nothing to learn from is no member, and what is missing is missing for all.
    assert members(CreditConfig(), "a", "g", {}, {}, asked, lengths) is None


def test_a_weight_for_a_reward_that_nobody_gave_is_refused() -> None:
    given = [{"reward": 1.0}, {"reward": 0.0, "brief": 1.0}]
    require_rewards(CreditConfig({"reward": 1.0, "brief": 1.0, "other": 0.0}), given)
    require_rewards(CreditConfig({"brevity": 1.0}), [])
    with pytest.raises(UserError, match=r"credit.rewards.brevity: .* there are: brief, reward"):
        require_rewards(CreditConfig({"brevity": 1.0}), given)
    with pytest.raises(UserError, match=r"credit.roles.planner.plan"):
        require_rewards(CreditConfig(roles={"planner": {"plan": 1.0}}), given)


def test_calls_without_tokens_have_their_place_among_the_others() -> None:
    rows = [
        call("a", [1, 2], 1),
        call("u", None, 0, policy="upstream", version=None, sequence=1),
        call("b", [3, 4], 1, sequence=2),
    ]
    asked = build_sequences(table(rows), {"r0/0": "g0"}, "main")[1].asked["r0/0"]
    assert (asked.total, asked.places) == (3, (0, 2))


def test_rewards_at_steps_are_weighed_and_the_last_of_a_name_holds() -> None:
    def reward(name: str, value: float, step: int | None, sequence: int) -> dict:
        place = {"run_id": "run", "rollout_id": "r0", "attempt_id": "r0/0"}
        made = span(SpanKind.REWARD, name, value=value, step=step, source="grader", **place)
        return {**made, "sequence": sequence}

    rows = [
        reward("progress", 1.0, 0, 1),
        reward("progress", 3.0, 0, 2),
        reward("cost", 2.0, 0, 3),
        reward("progress", 1.0, 2, 4),
        reward("reward", 1.0, None, 5),
        reward("other", 9.0, 1, 6),
    ]
    config = CreditConfig(steps={"progress": 1.0, "cost": -0.5})
    assert step_rewards(config, rewards(table(rows))) == {"r0/0": {0: 2.0, 2: 1.0}}


def conversation() -> pa.Table:
    """Three calls in one path, of 2, 1 and 2 sampled tokens, and a branch of 1."""
    rows = [
        call("a", [1, 2, 3, 4], 2, version=7),
        call("b", [5, 6], 1, continues="a", prefix_tokens=4, sequence=1),
        call("c", [7, 8, 9], 2, continues="b", prefix_tokens=6, sequence=2),
        call("d", [10, 11], 1, continues="a", prefix_tokens=4, sequence=3),
    ]
    return build_sequences(table(rows), {"r0/0": "g0"}, "main")[0]


def test_credit_of_calls_comes_to_their_tokens() -> None:
    sequences = conversation()
    assert tokens_per_call(sequences) == {"r0/0": {0: 2, 1: 1, 2: 2, 3: 1}}
    given = by_token(sequences, {"r0/0": {0: 1.0, 1: 2.0, 3: 4.0}})
    first, second = with_advantages(sequences, given).to_pylist()
    assert first["advantages"] == [0, 0, 1, 1, 0, 2, 0, 0, 0]
    assert second["advantages"] == [0, 0, 0, 0, 0, 4]


@given(st.integers(1, 12))
def test_a_sequence_loses_whole_calls_from_its_end(most: int) -> None:
    whole = with_advantages(conversation(), {"r0/0": 0.5})
    kept, cut = cut_sequences(whole, most)
    assert all(len(row["token_ids"]) <= most for row in kept.to_pylist())
    learnt = sum(sum(row["trainable"]) for row in kept.to_pylist())
    assert learnt + cut.tokens == 6
    for row in kept.to_pylist():
        lengths = {
            len(row[name]) for name in ("token_ids", "trainable", "logprobs", "calls", "advantages")
        }
        assert lengths == {len(row["token_ids"])}
        original = next(
            one
            for one in whole.to_pylist()
            if one["token_ids"][: len(row["token_ids"])] == row["token_ids"]
        )
        for name in ("trainable", "logprobs", "versions", "calls", "advantages"):
            assert row[name] == original[name][: len(row[name])]
        # It ends with a call, whole.
        last = row["calls"][-1]
        assert last >= 0 and row["calls"].count(last) == original["calls"].count(last)
    assert kept.schema == whole.schema


def test_what_is_cut_is_counted() -> None:
    whole = conversation()
    assert cut_sequences(whole, 0)[1].calls == 0 and cut_sequences(whole, 9)[0] is whole
    kept, cut = cut_sequences(whole, 8)
    # The last call has two tokens, up to the ninth: it goes whole.
    assert [len(row) for row in kept["token_ids"].to_pylist()] == [6, 6]
    assert (cut.sequences, cut.calls, cut.tokens) == (1, 1, 2)
    nothing, cut = cut_sequences(whole, 3)
    assert nothing.num_rows == 0 and (cut.sequences, cut.calls, cut.tokens) == (2, 4, 6)
    offsets, calls = list_arrays(kept["calls"])
    assert len(calls) == offsets[-1] and np.count_nonzero(calls >= 0) == 4


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (CreditConfig({"reward": float("inf")}), "credit.rewards.reward"),
        (CreditConfig(roles={"a": {"x": float("nan")}}), "credit.roles.a.x"),
        (CreditConfig({"reward": 0.0}), "every weight is 0"),
        (CreditConfig(discount=0.0), "credit.discount"),
        (CreditConfig(discount=1.5), "credit.discount"),
    ],
)
def test_credit_that_cannot_be_is_refused(config: CreditConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_credit(config)
