"""The environment of every process of ours: nothing phones home unless the user says so."""

import os

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    # Ray then leaves CUDA_VISIBLE_DEVICES alone where an actor asks for no GPU.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def quiet_environment() -> None:
    """Turns usage statistics off; what the user set stays.

    Called before Ray, MLflow or a model library is imported.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
