"""A disk that is soon full."""

import subprocess
from pathlib import Path


class SmallDisk:
    """A file system of a few hundred KiB."""

    def __init__(self, folder: Path):
        self.folder = folder

    def resize(self, size: str) -> None:
        """Gives it another size, as `mount` has it."""
        command = ["mount", "-o", f"remount,size={size}", str(self.folder)]
        subprocess.run(command, check=True)
