"""One rank of the learner, in this process: the real DeepSpeed engine on a tiny model."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_support import (
    HAS_GPU,
    NUM_GPUS,
    VOCABULARY,
    load_plain,
    plain_loss,
    tiny_model,
    to_table,
)
from transformers import AutoModelForCausalLM

from lightning_ray.algorithms import LossConfig
from lightning_ray.errors import UserError
from lightning_ray.learner import LearnerConfig
from lightning_ray.learner.checkpoint import STATE_FILE
from lightning_ray.learner.worker import LearnerWorker
from lightning_ray.trajectories import with_advantages

PLAIN = LearnerConfig(
    dtype="fp32", learning_rate=0.5, adam_epsilon=1.0, max_grad_norm=0.0, num_threads=1
)
"""An epsilon of 1 makes Adam's first step nearly linear in the gradient: its size is compared."""

LOSS = LossConfig(epsilon_low=0.9, epsilon_high=5.0)

KINDS = [(dtype, stage) for dtype in ("fp32", "bf16") for stage in range(4)]
KINDS.remove(("bf16", 0))
SOME_KINDS = [
    kind
    if kind in (("fp32", 0), ("fp32", 1), ("bf16", 2), ("fp32", 3))
    else pytest.param(*kind, marks=pytest.mark.slow)
    for kind in KINDS
]


def start(model_dir: Path, config: LearnerConfig = PLAIN, **changes: object) -> LearnerWorker:
    config = dataclasses.replace(config, num_gpus=NUM_GPUS, **changes)
    worker = LearnerWorker(config, str(model_dir), rank=0)
    worker.setup(*worker.address())
    return worker


def samples(advantage: float = 1.0, count: int = 6) -> pa.Table:
    """`count` answers to one prompt, the first half good, the second half bad."""
    random = np.random.default_rng(3)
    prompt = random.integers(0, 256, 12).tolist()
    rows = []
    for index in range(count):
        answer = random.integers(0, 256, 5).tolist()
        credit = advantage if index < count // 2 else -advantage
        rows.append(
            {
                "token_ids": prompt + answer,
                "trainable": [False] * 12 + [True] * 5,
                "advantages": [0.0] * 12 + [credit] * 5,
            }
        )
    return to_table(rows)


def on_policy(worker: LearnerWorker, batch: pa.Table) -> pa.Table:
    """The batch with the worker's own logprobs as the recorded ones."""
    logprobs = [
        [0.0] * (len(row["token_ids"]) - len(mine)) + mine.tolist()
        for row, mine in zip(batch.to_pylist(), worker.logprobs(batch), strict=True)
    ]
    index = batch.schema.get_field_index("logprobs")
    return batch.set_column(
        index, batch.schema.field(index), pa.array(logprobs, pa.list_(pa.float32()))
    )


def weights(worker: LearnerWorker) -> dict[str, torch.Tensor]:
    from lightning_ray.learner.publishing import whole_weights

    return whole_weights(worker.engine.module.model, torch.float32, True)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    # A head that shares the embedding has a second name in a state, and none among parameters.
    return max((one[name] - other[name]).abs().max().item() for name in one.keys() & other.keys())


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("tokens_per_row", "max_grad_norm"), [(512, 0.0), (16, 0.0), (16, 0.05)])
def test_a_step_equals_plain_adamw_on_the_whole_batch(
    model_dir, zero_stage, tokens_per_row, max_grad_norm
):
    worker = start(
        model_dir,
        zero_stage=zero_stage,
        tokens_per_row=tokens_per_row,
        max_grad_norm=max_grad_norm,
    )
    batch = on_policy(worker, samples())
    report = worker.step(batch, LOSS)
    model = load_plain(model_dir)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, eps=1.0, weight_decay=0.0)
    loss, _ = plain_loss(model, batch, "token_mean", 0.9, 5.0)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf).item()
    optimizer.step()
    expected = dict(model.named_parameters())
    moved = largest_difference(expected, before)
    assert moved > 1e-3
    assert largest_difference(weights(worker), expected) <= 1e-5 * max(1.0, moved)
    assert report.skipped is None and report.step == 1
    assert report.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert report.grad_norm == pytest.approx(norm, rel=1e-4)
    assert report.sampled_tokens == 30 and report.total_tokens == 6 * 17
    assert report.rows == (1 if tokens_per_row == 512 else 6)
    # Shared: the prompt once and four tokens of each answer. Unshared: all but the last token.
    assert report.computed_tokens == (12 + 6 * 4 if tokens_per_row == 512 else 6 * 16)
    assert report.logprob_abs_difference < 1e-5 and report.ratio_max < 1.0001
    assert (report.min_version, report.max_version) == (2, 2)
    np.testing.assert_allclose(
        np.concatenate(worker.logprobs(batch)),
        np.concatenate(plain_loss(model, batch, "token_mean", 0.9, 5.0)[1]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("tokens_per_row", "aggregation"), [(512, "token_mean"), (16, "sequence_mean")]
)
def test_a_step_of_cross_entropy_equals_pytorchs_on_the_unshared_sequences(
    model_dir, tokens_per_row, aggregation
):
    worker = start(model_dir, tokens_per_row=tokens_per_row)
    # Samples of unequal length and weight: a mean of means would not do.
    rows = samples().to_pylist()
    for index, row in enumerate(rows):
        length = 13 + index % 4
        for name in ("token_ids", "trainable", "logprobs", "versions", "calls"):
            row[name] = row[name][:length]
        row["advantages"] = [0.0] * 12 + [1.0 + index % 2] * (length - 12)
    batch = pa.Table.from_pylist(rows, schema=samples().schema)
    report = worker.step(batch, LossConfig(kind="cross_entropy", aggregation=aggregation))
    model = load_plain(model_dir)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, eps=1.0, weight_decay=0.0)
    losses, weights_of = [], []
    for index, row in enumerate(rows):
        ids = torch.tensor([row["token_ids"]])
        logits = model(input_ids=ids).logits[0, 11:-1]
        each = torch.nn.functional.cross_entropy(logits, ids[0, 12:], reduction="none")
        losses.append(each)
        share = 1.0 if aggregation == "token_mean" else 1.0 / len(each)
        weights_of.append(torch.full_like(each, share * (1.0 + index % 2)))
    weight = torch.cat(weights_of)
    loss = (weight * torch.cat(losses)).sum() / weight.sum()
    loss.backward()
    optimizer.step()
    expected = dict(model.named_parameters())
    moved = largest_difference(expected, before)
    assert moved > 1e-3
    assert largest_difference(weights(worker), expected) <= 1e-5 * max(1.0, moved)
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    assert (report.rows == 1) == (tokens_per_row == 512) and report.clip_fraction == 0


@pytest.mark.parametrize(("dtype", "zero_stage"), [("fp32", 1), ("bf16", 1)])
def test_cross_entropy_falls_as_samples_are_learnt(model_dir, dtype, zero_stage):
    config = LearnerConfig(dtype=dtype, zero_stage=zero_stage, learning_rate=3e-3, num_threads=1)
    worker = start(model_dir, config)
    batch = with_advantages(
        samples(count=4), dict.fromkeys(samples(count=4)["attempt_id"].to_pylist(), 1.0)
    )
    losses = [worker.step(batch, LossConfig(kind="cross_entropy")).loss for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    mean = float(np.mean(np.concatenate(worker.logprobs(batch))))
    assert -mean < losses[0]


def test_a_loss_of_ones_own_is_used_in_place_of_the_named_one(model_dir):
    worker = start(model_dir, tokens_per_row=16)
    batch = on_policy(worker, samples())
    old = np.concatenate(worker.logprobs(batch))
    credit = np.concatenate([[row["advantages"][-1]] * 5 for row in batch.to_pylist()])
    before = worker.logprobs(batch)
    report = worker.step(batch, LOSS, lambda new, old, advantages: -advantages * new)
    # The named loss of an on-policy batch is minus its mean advantage; this one has logprobs in it.
    assert report.loss == pytest.approx(-(credit * old).mean(), rel=1e-4)
    change = [float((b - a).mean()) for a, b in zip(before, worker.logprobs(batch), strict=True)]
    assert min(change[:3]) > max(change[3:])


@pytest.mark.parametrize(("dtype", "zero_stage"), KINDS)
def test_good_answers_become_likelier_and_bad_ones_less(model_dir, dtype, zero_stage):
    config = LearnerConfig(dtype=dtype, zero_stage=zero_stage, learning_rate=3e-3, num_threads=1)
    worker = start(model_dir, config)
    batch = on_policy(worker, samples())
    before = worker.logprobs(batch)
    losses = [worker.step(on_policy(worker, batch), LossConfig()).loss for _ in range(3)]
    after = worker.logprobs(batch)
    change = [float((b - a).mean()) for a, b in zip(before, after, strict=True)]
    assert min(change[:3]) > 0.1 and max(change[3:]) < -0.1
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(("dtype", "zero_stage"), SOME_KINDS)
@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 3e38])
def test_what_is_not_finite_never_reaches_the_weights(model_dir, dtype, zero_stage, poison):
    worker = start(model_dir, dtype=dtype, zero_stage=zero_stage, tokens_per_row=20)
    healthy = on_policy(worker, samples())
    before = weights(worker)
    sick = healthy.slice(0, 5).to_pylist()
    # Huge but finite credit overflows only in the gradient; the others in the loss itself.
    sick[2]["advantages"] = [0.0] * 12 + [poison] * 5
    report = worker.step(pa.Table.from_pylist(sick, schema=healthy.schema), LOSS)
    assert report.skipped is not None and "not finite" in report.skipped
    assert report.grad_norm == math.inf
    assert largest_difference(weights(worker), before) == 0
    # Nothing of it is left in the gradients or the optimiser either.
    fresh = start(model_dir, dtype=dtype, zero_stage=zero_stage, tokens_per_row=20)
    worker.step(healthy, LOSS)
    fresh.step(healthy, LOSS)
    assert largest_difference(weights(worker), before) > 0
    assert largest_difference(weights(worker), weights(fresh)) == 0


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_a_batch_of_another_tokenizer_is_skipped_and_says_so(model_dir, token):
    worker = start(model_dir)
    before = weights(worker)
    batch = to_table([{"token_ids": [1, token, 3], "trainable": [False, True, True]}])
    report = worker.step(batch, LOSS)
    assert (
        report.skipped is not None and f"token {token}, the model knows 0 to 255" in report.skipped
    )
    assert report.rows == 0 and largest_difference(weights(worker), before) == 0


def test_a_batch_with_nothing_to_learn_changes_nothing(model_dir):
    worker = start(model_dir)
    before = weights(worker)
    batch = to_table([{"token_ids": [1, 2, 3], "trainable": [True, False, False]}])
    report = worker.step(batch, LOSS)
    assert report.skipped == "nothing to learn from in the batch"
    assert report.unlearnable_tokens == 1 and report.rows == 0
    assert largest_difference(weights(worker), before) == 0
    (logprobs,) = worker.logprobs(batch)
    assert np.isnan(logprobs).tolist() == [True]
    assert worker.logprobs(batch.slice(0, 0)) == []
    assert worker.step(batch.slice(0, 0), LOSS).max_version == -1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_published_folder_is_a_model_with_the_present_weights(model_dir, tmp_path, dtype):
    worker = start(model_dir, dtype=dtype)
    worker.step(on_policy(worker, samples()), LOSS)
    worker.publish(str(tmp_path / "v1"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "v1")
    published = dict(loaded.named_parameters())
    assert largest_difference(weights(worker), published) == 0
    assert loaded.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "v1" / name).read_text() == (model_dir / name).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["v1"]
    with pytest.raises(FileExistsError, match="never overwritten"):
        worker.publish(str(tmp_path / "v1"))


def test_no_weight_is_rounded_to_the_type_of_the_base(tmp_path):
    """An engine with rounded weights would sample from another policy than the learner's."""
    base = tiny_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    worker = start(base, dtype="fp32", learning_rate=1e-3)
    worker.step(on_policy(worker, samples()), LOSS)
    worker.publish(str(tmp_path / "v1"))
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "v1")
    assert published.dtype == torch.float32
    assert largest_difference(weights(worker), dict(published.named_parameters())) == 0


@pytest.mark.skipif(HAS_GPU, reason="a process that has begun with a GPU stays with it")
@pytest.mark.parametrize(("has_it", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_auto_computes_in_bfloat16_where_the_processor_does(
    model_dir, tmp_path, monkeypatch, has_it, dtype
):
    monkeypatch.setattr(
        "lightning_ray.learner.deepspeed_settings.multiplies_bfloat16", lambda: has_it
    )
    worker = start(model_dir, dtype="auto")
    assert next(iter(worker.engine.module.parameters())).dtype == (
        torch.bfloat16 if has_it else torch.float32
    )
    worker.save_checkpoint(str(tmp_path / "saved"), {})
    assert start(model_dir, dtype=dtype).load_checkpoint(str(tmp_path / "saved")) == {}
    other = "fp32" if has_it else "bf16"
    with pytest.raises(UserError, match=f"with learner.dtype={dtype}; set that, it is {other}"):
        start(model_dir, dtype=other).load_checkpoint(str(tmp_path / "saved"))


@pytest.mark.parametrize(("dtype", "zero_stage"), KINDS)
def test_a_resumed_learner_takes_the_same_next_step(model_dir, tmp_path, dtype, zero_stage):
    config = LearnerConfig(dtype=dtype, zero_stage=zero_stage, learning_rate=1e-2, num_threads=1)
    worker = start(model_dir, config)
    batch = on_policy(worker, samples())
    worker.step(batch, LOSS)
    worker.save_checkpoint(str(tmp_path / "step-1"), {"cursor": 5})
    at_save = weights(worker)
    expected_draw = torch.rand(3)
    report = worker.step(batch, LOSS)
    resumed = start(model_dir, config)
    assert resumed.load_checkpoint(str(tmp_path / "step-1")) == {"cursor": 5}
    assert largest_difference(weights(resumed), at_save) == 0
    assert torch.equal(torch.rand(3), expected_draw)
    again = resumed.step(batch, LOSS)
    assert again.step == report.step == 2
    assert largest_difference(weights(resumed), weights(worker)) == 0
    assert largest_difference(weights(resumed), at_save) > 0


def test_a_save_that_was_cut_short_leaves_the_earlier_checkpoint_and_can_be_repeated(
    model_dir, tmp_path
):
    worker = start(model_dir)
    worker.save_checkpoint(str(tmp_path / "step-1"), {"step": 1})
    # What a killed process leaves behind.
    partial = tmp_path / ".step-2.partial"
    partial.mkdir()
    (partial / "half").write_text("torn")
    with pytest.raises(UserError, match="no learner checkpoint"):
        worker.load_checkpoint(str(tmp_path / "step-2"))
    assert start(model_dir).load_checkpoint(str(tmp_path / "step-1")) == {"step": 1}
    worker.save_checkpoint(str(tmp_path / "step-2"), {"step": 2})
    assert json.loads((tmp_path / "step-2" / STATE_FILE).read_text())["state"] == {"step": 2}
    assert not (tmp_path / "step-2" / "half").exists()
    with pytest.raises(FileExistsError, match="never overwritten"):
        worker.save_checkpoint(str(tmp_path / "step-2"), {})


def test_activation_checkpointing_changes_nothing_but_memory(model_dir):
    batch = samples()
    plain, frugal = start(model_dir), start(model_dir, activation_checkpointing=True)
    one, other = plain.step(batch, LOSS), frugal.step(batch, LOSS)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    assert largest_difference(weights(plain), weights(frugal)) < 1e-5
