"""The examples of docs/own-algorithm.md, as a user would copy them."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/own-algorithm.md"


def examples() -> dict[str, str]:
    """Class name to the file that the page shows for it."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    return {re.findall(r"^class (\w+)", block, re.M)[0]: block for block in blocks}
