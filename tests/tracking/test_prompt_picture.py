"""The picture of a prompt search, with and without held-out scores."""

from pathlib import Path

import pytest

from lightning_ray.tracking.prompt_picture import plot_prompt_search

HISTORY = [
    {"version": 0, "part": "minibatch", "score": 0.2, "spent": 12},
    {"version": 0, "part": "validation", "score": 0.3, "spent": 44},
    {"version": 2, "part": "validation", "score": 0.5, "spent": 90},
]


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1]])
@pytest.mark.parametrize(("before", "after"), [(None, None), (0.3, 0.5)])
def test_a_search_becomes_a_picture(tmp_path: Path, history, before, after):
    path = tmp_path / "search.png"
    plot_prompt_search(history, path, before=before, after=after, title="a search")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000
