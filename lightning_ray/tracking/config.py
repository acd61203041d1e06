"""The settings of the `tracking` configuration group, as Hydra checks them."""

from dataclasses import dataclass
from enum import StrEnum


class Panel(StrEnum):
    """How progress is shown on the terminal."""

    auto = "auto"
    """The live panel on a terminal, plain lines anywhere else."""
    rich = "rich"
    """The live panel, terminal or not."""
    plain = "plain"
    """One line per step and per slow phase."""


@dataclass
class TrackingConfig:
    """Where a run is recorded and how it is shown."""

    uri: str | None = None
    """MLflow's store: a database URI or a server. None: a sqlite file in the output root."""
    experiment: str = "lightning-ray"
    """The MLflow experiment that holds the runs."""
    panel: Panel = Panel.auto
    """How progress is shown."""
    sample_trajectories: int = 8
    """How many trajectories the HTML page of samples holds."""
