"""What is refused before an actor starts."""

import json
import shutil
import subprocess
import sys

import pytest

from lightning_ray.errors import UserError
from lightning_ray.learner import LearnerConfig, check_learner, check_model_dir


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "fp16"},
        {"zero_stage": 4},
        {"num_ranks": 0},
        {"tokens_per_row": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"max_grad_norm": -1.0},
        {"beta2": 1.0},
    ],
)
def test_settings_that_cannot_work_are_named(changes):
    (name,) = changes
    with pytest.raises(UserError, match=rf"^learner\.{name}: "):
        check_learner(LearnerConfig(**changes))


def test_compiled_layers_want_a_gpu_and_whole_weights():
    check_learner(LearnerConfig(compile=True, num_gpus=1.0))
    with pytest.raises(UserError, match=r"^learner\.compile=true .* learner\.zero_stage=3"):
        check_learner(LearnerConfig(compile=True, num_gpus=1.0, zero_stage=3))


def test_a_whole_model_folder_is_accepted(model_dir):
    check_learner(LearnerConfig())
    assert check_model_dir(model_dir) == model_dir.absolute()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(model_dir, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        check_model_dir(folder)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        check_model_dir(tmp_path / "nowhere")


def test_a_missing_shard_and_a_torn_config_are_named(model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00001-of-00002"):
        check_model_dir(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="not JSON"):
        check_model_dir(folder)


@pytest.mark.parametrize(
    "setting",
    [
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"sliding_window": 128},
        {"final_logit_softcapping": 30.0},
    ],
)
def test_a_model_that_the_packed_pass_would_not_reproduce_is_refused(model_dir, tmp_path, setting):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | setting))
    with pytest.raises(UserError, match="be trained"):
        check_model_dir(folder)


def test_checking_imports_neither_torch_nor_deepspeed():
    program = (
        "import sys, lightning_ray.learner as l; l.check_learner(l.LearnerConfig()); "
        "sys.exit(bool({'torch', 'deepspeed', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
