"""Where things are kept that take long to make and are the same for every run of a user."""

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder for them: LIGHTNING_RAY_CACHE, or ~/.cache/lightning-ray."""
    named = os.environ.get("LIGHTNING_RAY_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "lightning-ray"
