"""What the examination reads of the machine and of the model's folder."""

import json
import os
import subprocess
from pathlib import Path

from lightning_ray.doctor.examine import chat_template, left_behind

URL = "http://127.0.0.1:4"


def test_a_process_of_an_attempt_that_is_over_is_found_by_its_base_url() -> None:
    def start(variable: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "OPENAI_BASE_URL": variable}
        return subprocess.Popen(["sleep", "60"], env=env)

    ours, other, near = start(f"{URL}/a/cap/v1"), start("http://x/v1"), start(f"{URL}2/a/cap/v1")
    try:
        # Until a fork has become `sleep` it bears the name of its parent.
        while Path(f"/proc/{ours.pid}/comm").read_text() != "sleep\n":
            pass
        assert left_behind(URL) == [f"sleep (pid {ours.pid})"]
    finally:
        for process in (ours, other, near):
            process.kill()
            process.wait(10)
    assert left_behind(URL) == []


def test_the_chat_template_is_the_file_in_force(tmp_path: Path) -> None:
    assert chat_template(tmp_path, None) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert chat_template(tmp_path, None) is None
    config.write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": "tools"}]}))
    assert "tools" in (chat_template(tmp_path, None) or "")
    (tmp_path / "chat_template.jinja").write_text("own")
    (tmp_path / "mine.jinja").write_text("mine")
    assert chat_template(tmp_path, None) == "own"
    assert chat_template(tmp_path, str(tmp_path / "mine.jinja")) == "mine"
