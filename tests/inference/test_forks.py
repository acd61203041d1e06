"""Processes that are forked from one that is prepared: what they know, and whom they end with."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from lightning_ray.inference.lifeline import LIFELINE

BEGIN = """
import json, os, sys, time
from lightning_ray.inference import forks
import forks_light
forks.PRELOADED = "forks_light"
forks.prepare()
os.environ["SINCE"] = "the beginning"

def started(target):
    mine, its = forks._context().Pipe()
    process = forks._context().Process(target=target, args=(its,))
    process.start()
    assert mine.poll(60), "it said nothing"
    return mine.recv()
"""


def script(text: str) -> subprocess.Popen[str]:
    environment = os.environ | {LIFELINE: "1", "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + text], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_they_are_of_one_that_has_imported_and_have_the_environment_of_their_start() -> None:
    text = """
found = [started(forks_light.tell)]
os.environ["SINCE"] = "a moment ago"
found.append(started(forks_light.tell))
found.append(started(forks_light.have_told))
print(json.dumps([os.getpid(), os.environ.get("LD_PRELOAD"), *found]))
"""
    output, _ = script(text).communicate(timeout=120)
    here, libraries, *found = json.loads(output)
    assert len(found) == 3
    for forked_from, own, parent, environment in found:
        assert forked_from == parent and len({here, own, parent}) == 3
        assert environment.get("LD_PRELOAD") == libraries
    assert len({forked_from for forked_from, *_ in found}) == 1
    since = [environment["SINCE"] for *_, environment in found]
    assert since == ["the beginning", "a moment ago", "later"]


def test_they_end_with_the_one_that_started_them_however_it_ends() -> None:
    text = """
print(json.dumps([started(forks_light.stay), started(forks_light.stay)]), flush=True)
time.sleep(600)
"""
    process = script(text)
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    family = {pid for pids in said for pid in pids}
    assert len(family) == 3 and all(psutil.pid_exists(pid) for pid in family)
    process.kill()
    process.wait(10)
    deadline = time.monotonic() + 10
    while left := {pid for pid in family if psutil.pid_exists(pid)}:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)
