"""An algorithm of the user's own: the examples of the page work, and mistakes are one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from own_algorithm_support import examples

from lightning_ray.algorithms import AlgorithmConfig, Group, check_algorithm, make_algorithm
from lightning_ray.errors import UserError
from lightning_ray.training.shipping import ship_by_value

GOOD = """
import own_helper

class Good:
    def __init__(self, config):
        self.loss = config.loss

    def score_group(self, group):
        return own_helper.times(2.0, group.rewards - group.rewards.mean())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder where the command is typed; what was imported from it is forgotten after."""
    path, modules = list(sys.path), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_helper.py").write_text("def times(a, b):\n    return a * b\n")
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def make(folder: Path, body: str, name: str, **settings: object):
    (folder / "own_algorithm.py").write_text(body)
    return make_algorithm(AlgorithmConfig(name=f"own_algorithm:{name}", **settings))


def group(*rewards: float) -> Group:
    return Group("g", np.array(rewards), np.ones(len(rewards), np.int64))


def test_the_pages_examples_are_short():
    assert set(examples()) == {"LeaveOneOut", "ImitateBest"}
    assert all(len(text.splitlines()) <= 30 for text in examples().values())


def test_the_first_example_scores_against_the_others_and_brings_its_loss(folder):
    own = make(folder, examples()["LeaveOneOut"], "LeaveOneOut", options={"most": 1.5})
    np.testing.assert_allclose(own.score_group(group(1.0, 0.0, 0.0)), [1.0, -0.5, -0.5])
    new = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss = own.token_loss(new, torch.tensor([-1.0, -3.0]), torch.tensor([2.0, 1.0]))
    loss.sum().backward()
    # The second ratio is e squared, cut to 1.5; no gradient flows through it.
    assert new.grad.tolist() == pytest.approx([-2.0, -1.5])


def test_the_second_example_gives_the_best_a_weight_under_cross_entropy(folder):
    own = make(folder, examples()["ImitateBest"], "ImitateBest", options={"least": 0.5})
    assert own.loss.kind == "cross_entropy"
    assert own.score_group(group(1.0, 0.5, 1.0)).tolist() == [1.0, 0.0, 1.0]
    assert own.score_group(group(0.2, 0.1)).tolist() == [0.0, 0.0]


def test_it_travels_with_what_it_imports_to_a_process_that_has_no_such_file(folder, tmp_path):
    own = make(folder, GOOD, "Good")
    assert set(ship_by_value(own)) >= {"own_algorithm", "own_helper"}
    from ray import cloudpickle

    (tmp_path / "algorithm.pickle").write_bytes(cloudpickle.dumps(own))
    program = (
        "import pickle, sys; import numpy as np; from lightning_ray.algorithms import Group\n"
        f"own = pickle.load(open({str(tmp_path / 'algorithm.pickle')!r}, 'rb'))\n"
        "print(own.score_group(Group('g', np.array([0., 1.]), np.ones(2, int))).tolist())\n"
        "assert 'own_helper' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == "[-1.0, 1.0]", done.stderr


def test_what_is_installed_is_not_sent():
    assert ship_by_value(make_algorithm(AlgorithmConfig())) == []


BASE = GOOD + "\n\nclass Own(Good):\n"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import nothing_like_it", "own_algorithm does not import: ModuleNotFoundError.*py:1"),
        ("x = (", r"does not import: SyntaxError.*own_algorithm.py:1"),
        ("raise SystemExit(3)", "does not import: SystemExit"),
        ("x = 1", r"own_algorithm.py has no class Own"),
        ("Own = len", "not a class"),
        (
            "class Own:\n    def __init__(self, c):\n        c.options['x']",
            r"KeyError: 'x' \(.*py:3\)",
        ),
        ("class Own:\n    def __init__(self, c):\n        self.loss = c.loss", "score_group"),
        (
            "class Own:\n    def __init__(self, c): ...\n    score_group = print",
            "no attribute `loss`",
        ),
        (BASE + "    def score_group(self, group): return [0.0]", "one number per attempt"),
        (
            BASE + "    def score_group(self, group): return group.rewards / group.rewards.std()",
            "finite numbers",
        ),
        (
            BASE + "    def score_group(self, group): return group.nothing",
            "AttributeError.*rewards",
        ),
        (BASE + "    def token_loss(self, new, old, a): return new.sum()", "one loss per token"),
        (BASE + "    def token_loss(self, new, old, a): return a", "does not depend on logprobs"),
        (BASE + "    def token_loss(self, new, old, a): return new - new.mean()", "beside other"),
        (BASE + "    def token_loss(self, new, old, a): return new / 0", "gave .*inf"),
        (BASE + "    def token_loss(self, new, old): return new", "token_loss raised TypeError"),
        (BASE + "    token_loss = 3", "must be a method"),
    ],
)
def test_a_mistake_in_it_is_one_line(folder, body, says):
    with pytest.raises(UserError, match=rf"^algorithm\.name=own_algorithm:Own: .*{says}") as raised:
        make(folder, body, "Own")
    assert len(str(raised.value).splitlines()) == 1


def test_credit_below_zero_is_no_weight(folder):
    body = BASE + (
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n        self.loss.kind = 'cross_entropy'\n"
    )
    with pytest.raises(UserError, match="credit is a weight"):
        make(folder, body, "Own")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "nowhere_at_all:Own"}, "no module nowhere_at_all, neither installed nor in"),
        ({"name": "own_algorithm:"}, "write module:Class"),
        ({"name": "my_algorithm.Own"}, "no algorithm is called 'my_algorithm.Own'; use .*:Class"),
        ({"options": {"most": 1}}, r"algorithm\.options: grpo has no 'most'"),
    ],
)
def test_a_name_that_finds_nothing_is_told(folder, changes, says):
    with pytest.raises(UserError, match=says):
        check_algorithm(AlgorithmConfig(**changes))
