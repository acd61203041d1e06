"""What a run shows of itself: MLflow runs, the live panel, curves, trajectory pages, summaries.

Owns how a run is recorded and displayed. It is handed numbers, tables and text; it does not know
how a policy learns, and imports nothing of `training`, `learner` or `algorithms`.

Importing this room is cheap: MLflow and matplotlib are imported where they are first used.
"""

from lightning_ray.tracking.comparing import differing, figures
from lightning_ray.tracking.config import TrackingConfig
from lightning_ray.tracking.curve import plot_learning_curve, plot_learning_curves
from lightning_ray.tracking.mlflow_run import TrackedRun, ui_command
from lightning_ray.tracking.panel import Progress
from lightning_ray.tracking.recorded import RecordedRun, find_mlflow_run, read_run
from lightning_ray.tracking.summary import RunSummary, read_summary, write_json, write_summary
from lightning_ray.tracking.trajectory_page import AttemptInfo, render_trajectory_page

__all__ = [
    "AttemptInfo",
    "Progress",
    "RecordedRun",
    "RunSummary",
    "TrackedRun",
    "TrackingConfig",
    "differing",
    "figures",
    "find_mlflow_run",
    "plot_learning_curve",
    "plot_learning_curves",
    "read_run",
    "read_summary",
    "render_trajectory_page",
    "ui_command",
    "write_json",
    "write_summary",
]
