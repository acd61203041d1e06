"""What is typed after `finetune`: words that Hydra never sees, and mistakes that are one line."""

from pathlib import Path

import pytest

from lightning_ray.cli import run
from lightning_ray.errors import UserError
from lightning_ray.jobs.finetune import _compose

SQL = "SELECT attempt_id FROM spans WHERE name = 'exact' AND value >= 1, {x: [1]}"


def test_sql_reaches_the_configuration_as_it_was_typed() -> None:
    config = _compose(["experiment=calculator", "from=a, b", f"sql={SQL}", "seed=3"])
    assert config.samples.runs == ["a", "b"] and config.samples.sql == SQL
    assert config.finetuning.seed == config.learner.seed == 3
    assert config.agent.name == "calculator" and config.learner.learning_rate == 2e-5
    config = _compose(["from=a", "min_reward=-0.5", "where=reward = 1"])
    assert (config.samples.min_reward, config.samples.where) == (-0.5, "reward = 1")
    # Without held-out tasks no agent is needed.
    assert config.agent.name == "" and config.evaluation.tasks is None
    with pytest.raises(UserError, match="min_reward=high: must be a number"):
        _compose(["from=a", "min_reward=high"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["finetune", "min_reward=1"], "from= is needed"),
        (["finetune", "from=x"], "say which attempts are learnt from"),
        (["finetune", "from=nowhere", "min_reward=1"], "from=nowhere: no such run in"),
        (["finetune", "from=x", "min_reward=1", "finetuning.epochs=0"], "finetuning.epochs=0"),
        (["finetune", "from=x", "min_reward=1", "finetuning.epoch=1"], "finetuning.epoch"),
        (["finetune", "from=x", "min_reward=1", "evaluation.tasks=t.jsonl"], "an agent is needed"),
        (["finetune", "resume=nowhere"], "resume=nowhere: no such run in"),
        (
            ["train", "experiment=calculator", "algorithm.name=nowhere_at_all:Own"],
            "algorithm.name=nowhere_at_all:Own: no module nowhere_at_all, neither installed nor in",
        ),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(words, says, tmp_path: Path, capsys) -> None:
    status = run([*words, f"output_dir={tmp_path}"])
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("error: ") and says in printed.err
    assert list(tmp_path.iterdir()) == []
