"""Limits on the memory and the processes of an attempt, cold and warm."""

import os
import time

import psutil
import pytest
from agents_support import assert_gone, warmed, with_launcher

from lightning_ray.agents import AgentEnd, Task, WarmLauncher, attempt_environment, check_agent
from lightning_ray.agents.zygote_limits import Watch, held_together
from lightning_ray.errors import UserError

ATTEMPT = attempt_environment("http://127.0.0.1:9/attempt", "key")
LEARN = Task("learn", {"case": "learn"})

pytestmark = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])

AGENT = """
import os, subprocess, sys, time
case = sys.argv[1]
def hold(megabytes):
    held = bytearray(megabytes * 1_000_000)
    held[::4096] = b"x" * len(held[::4096])
    return held
if case == "hoards":
    held = [hold(20) for _ in range(1000)]
if case == "shares its hoard":
    for _ in range(4):
        if os.fork() == 0:
            held = hold(60)
            print(os.getpid(), flush=True)
            time.sleep(300)
    time.sleep(300)
if case == "holds":
    held = hold(60)
    time.sleep(0.5)
if case == "holds one hoard for all":
    held = hold(80)
    for _ in range(4):
        if os.fork() == 0:
            time.sleep(0.5)
            os._exit(0)
    time.sleep(0.5)
if case == "multiplies":
    for _ in range(8):
        print(subprocess.Popen(["sleep", "300"]).pid, flush=True)
    time.sleep(300)
if case == "is one of four":
    started = [subprocess.Popen(["sleep", "0.5"]) for _ in range(3)]
    print([each.wait() for each in started])
if case == "bomb":
    print(os.getpgrp(), flush=True)
    while True: os.fork()
"""


def run_case(config, case, warm):
    async def use(launcher):
        if isinstance(launcher, WarmLauncher):
            await warmed(launcher, LEARN, ATTEMPT)
            assert not launcher.cold_reason
        return await launcher.run(Task(case, {"case": case}), ATTEMPT, 20)

    config.warm_start = warm
    result = with_launcher(config, use)
    assert result.warm == warm
    return result


@pytest.mark.parametrize("case", ["hoards", "shares its hoard"])
def test_an_attempt_that_holds_too_much_memory_is_ended(agent, warm, case):
    result = run_case(agent(AGENT, "{case}", max_memory_mb=200), case, warm)
    assert (result.end, result.signal) == (AgentEnd.OVER_LIMIT, 9)
    assert result.reason.startswith("over agent.max_memory_mb=200: its processes held ")
    held = int(result.reason.split()[-3])
    assert 200 <= held < 2000 and result.fault == ""
    assert_gone([int(pid) for pid in result.stdout.split()], within_s=1)


def test_an_attempt_with_too_many_processes_is_ended(agent, warm):
    result = run_case(agent(AGENT, "{case}", max_processes=4), "multiplies", warm)
    assert result.end is AgentEnd.OVER_LIMIT
    assert result.reason.startswith("over agent.max_processes=4: it had ")
    pids = [int(pid) for pid in result.stdout.split()]
    # The agent itself and these, and one that it had no time to print.
    assert len(pids) >= 3
    assert_gone(pids, within_s=1)


def test_processes_that_multiply_without_end_are_ended_all_together(agent, warm):
    before = time.monotonic()
    result = run_case(agent(AGENT, "{case}", max_processes=16), "bomb", warm)
    assert result.end is AgentEnd.OVER_LIMIT and time.monotonic() - before < 20
    assert_gone(_in_group(int(result.stdout)), within_s=1)


def _in_group(group):
    return [pid for pid in psutil.pids() if _group_of(pid) == group]


def _group_of(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.parametrize("case", ["holds", "holds one hoard for all", "is one of four"])
def test_an_attempt_within_its_limits_is_left_alone(agent, warm, case):
    """Memory that its processes share is counted once."""
    result = run_case(agent(AGENT, "{case}", max_memory_mb=200, max_processes=6), case, warm)
    assert (result.end, result.exit_code, result.reason) == (AgentEnd.EXITED, 0, ""), result


def test_a_process_that_ends_while_it_is_counted_holds_nothing(warm):
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert held_together([(ended, 10**9)]) == 0
    os.waitpid(ended, 0)
    assert held_together([(ended, 10**9)]) == 0


def test_a_limit_must_be_above_zero(agent, tmp_path, warm):
    config = agent("", files={"grader.py": "def grade(*_): return 0\n"})
    config.grader = str(tmp_path / "agent/grader.py:grade")
    for name in ("max_memory_mb", "max_processes"):
        setattr(config, name, 0)
        with pytest.raises(UserError, match=f"agent.{name}=0: must be above 0, or null"):
            check_agent(config, [LEARN])
        setattr(config, name, 100)
        check_agent(config, [LEARN])


def test_nobody_is_looked_at_where_there_is_no_limit(warm):
    watch = Watch()
    watch.add(os.getpgid(0), None, None)
    assert watch.wait_ms(1000) == 1000 and watch.over() == []
    watch.add(os.getpgid(0), 1, None)
    assert watch.wait_ms(1000) == 0
    ((leader, limit, held),) = watch.over()
    assert (leader, limit) == (os.getpgid(0), "memory") and held > 1_000_000
    assert 0 < watch.wait_ms(1000) <= 51 and watch.over() == []
    watch.remove(leader)
    watch.remove(leader)
    assert watch.wait_ms(1000) == 1000
