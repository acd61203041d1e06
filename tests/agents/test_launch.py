"""Launching an agent, cold and warm: how it is bounded, watched and cleared away."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from agents_support import assert_gone, is_running, warmed, with_launcher

from lightning_ray.agents import AgentEnd, Task, WarmLauncher, attempt_environment

ATTEMPT = attempt_environment("http://127.0.0.1:9/attempt", "key")
LEARN = Task("learn", {"case": "learn"})

pytestmark = pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])


def run_case(config, case, warm, timeout_s=30.0):
    """The result of one run of the agent with this case as its argument."""

    async def use(launcher):
        await ready(launcher)
        return await launcher.run(Task(case, {"case": case}), ATTEMPT, timeout_s)

    config.warm_start = warm
    result = with_launcher(config, use)
    assert result.warm == warm
    return result


async def ready(launcher, env=ATTEMPT):
    if isinstance(launcher, WarmLauncher):
        await warmed(launcher, LEARN, env)
        assert not launcher.cold_reason


AGENT = """
import os, signal, subprocess, sys, time
case = sys.argv[1]
def sleepers():
    child = subprocess.Popen(["sleep", "300"])
    shell = subprocess.Popen(["sh", "-c", "sleep 300 & echo $!; wait"], stdout=subprocess.PIPE)
    print(os.getpid(), child.pid, shell.pid, int(shell.stdout.readline()), flush=True)
if case == "leaves": sleepers()
if case == "crashes": sleepers(); os.kill(os.getpid(), signal.SIGKILL)
if case == "hangs": sleepers(); time.sleep(300)
if case == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN); sleepers(); time.sleep(300)
if case == "polite":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bye")); print("hi", flush=True)
    time.sleep(300)
if case == "binary": os.write(1, b"ok \\xff\\xfe end"); os.write(2, b"\\xc3")
if case == "huge": [os.write(fd, b"x" * 65536) for _ in range(300) for fd in (1, 2)]; sys.exit(4)
if case == "escaped":
    print(subprocess.Popen(["sleep", "5"], start_new_session=True).pid)
if case == "to file":
    sys.stdout = open(sys.argv[2], "w"); sleepers(); sys.stdout.flush(); time.sleep(300)
if case.startswith("say"): print(case, os.environ["NUMBER"])
"""


@pytest.mark.parametrize(
    ("case", "end"),
    [
        ("leaves", AgentEnd.EXITED),
        ("crashes", AgentEnd.KILLED),
        ("hangs", AgentEnd.TIMED_OUT),
        ("stubborn", AgentEnd.TIMED_OUT),
    ],
)
def test_nothing_survives_an_attempt(agent, warm, case, end):
    started = time.monotonic()
    result = run_case(agent(AGENT, "{case}"), case, warm, timeout_s=1.5)
    assert result.end is end
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 4
    assert_gone(pids, within_s=1)
    assert time.monotonic() - started < 10
    if case == "stubborn":
        assert result.signal == signal.SIGKILL and result.seconds > 3
    if case == "hangs":
        assert result.signal == signal.SIGTERM and result.seconds < 3


def test_an_agent_is_asked_to_stop_before_it_is_killed(agent, warm):
    result = run_case(agent(AGENT, "{case}"), "polite", warm, timeout_s=1)
    assert (result.end, result.exit_code, result.signal) == (AgentEnd.TIMED_OUT, 1, None)
    assert (result.stdout, result.stderr) == ("hi\n", "bye\n")


def test_a_signal_is_told_from_an_exit_code(agent, warm):
    result = run_case(agent(AGENT, "{case}"), "crashes", warm)
    assert (result.end, result.exit_code, result.signal) == (AgentEnd.KILLED, None, 9)


def test_output_that_is_not_text_is_kept_as_far_as_it_is(agent, warm):
    result = run_case(agent(AGENT, "{case}"), "binary", warm)
    assert (result.stdout, result.stderr) == ("ok \ufffd\ufffd end", "\ufffd")
    assert not result.truncated


def test_too_much_output_is_cut_and_does_not_block_the_agent(agent, warm):
    result = run_case(agent(AGENT, "{case}", max_output_bytes=1000), "huge", warm)
    assert (result.end, result.exit_code) == (AgentEnd.EXITED, 4)
    assert result.stdout == result.stderr == "x" * 1000
    assert result.truncated


def test_a_process_that_left_the_group_does_not_hold_up_the_result(agent, warm):
    started = time.monotonic()
    result = run_case(agent(AGENT, "{case}"), "escaped", warm)
    assert result.end is AgentEnd.EXITED
    assert time.monotonic() - started < 4.5
    os.kill(int(result.stdout), signal.SIGKILL)


def test_many_runs_at_once_keep_apart(agent, warm):
    config = agent(AGENT, "{case}")
    config.warm_start = warm

    def env(number):
        return attempt_environment("http://127.0.0.1:9", "key", {"NUMBER": str(number)})

    async def use(launcher):
        await ready(launcher, env(-1))
        tasks = [Task(str(number), {"case": f"say {number}"}) for number in range(32)]
        runs = [launcher.run(task, env(number), 30) for number, task in enumerate(tasks)]
        return await asyncio.gather(*runs)

    results = with_launcher(config, use)
    assert [r.stdout for r in results] == [f"say {n} {n}\n" for n in range(32)]
    assert {(r.end, r.exit_code, r.stderr, r.warm) for r in results} == {
        (AgentEnd.EXITED, 0, "", warm)
    }


def test_cancelling_a_run_kills_its_group(agent, warm, tmp_path):
    pids_file = tmp_path / "pids"
    config = agent(AGENT, "{case}", str(pids_file))
    config.warm_start = warm

    async def use(launcher):
        await ready(launcher)
        run = asyncio.create_task(launcher.run(Task("1", {"case": "to file"}), ATTEMPT, 60))
        pids = await pids_in(pids_file)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert_gone(pids, within_s=1)
        return await launcher.run(LEARN, ATTEMPT, 30)

    assert with_launcher(config, use).end is AgentEnd.EXITED


def test_closing_cancels_the_runs_in_flight(agent, warm, tmp_path):
    pids_file = tmp_path / "pids"
    config = agent(AGENT, "{case}", str(pids_file))
    config.warm_start = warm

    async def use(launcher):
        await ready(launcher)
        run = asyncio.create_task(launcher.run(Task("1", {"case": "to file"}), ATTEMPT, 60))
        pids = await pids_in(pids_file)
        await launcher.close()
        assert_gone(pids, within_s=1)
        return await run

    assert with_launcher(config, use).end is AgentEnd.CANCELLED


def test_a_lost_helper_is_a_fault_of_the_machinery_and_is_replaced(agent, warm, tmp_path):
    pids_file = tmp_path / "pids"
    config = agent(AGENT, "{case}", str(pids_file))
    config.warm_start = warm

    async def use(launcher):
        await ready(launcher)
        run = asyncio.create_task(launcher.run(Task("1", {"case": "to file"}), ATTEMPT, 60))
        pids = await pids_in(pids_file)
        os.kill(parent_of(pids[0]), signal.SIGKILL)
        lost = await run
        assert_gone(pids, within_s=2)
        return lost, await launcher.run(LEARN, ATTEMPT, 30)

    lost, after = with_launcher(config, use)
    assert lost.end is AgentEnd.LAUNCH_FAILED and "lost" in lost.fault
    assert (after.end, after.exit_code, after.warm) == (AgentEnd.EXITED, 0, warm)


OWNER = """
import asyncio, sys
from lightning_ray.agents import AgentConfig, Task, attempt_environment, make_launcher
async def main():
    config = AgentConfig(name="a", command=["python", "agent.py", "{case}", sys.argv[2]],
                         cwd=sys.argv[1], warm_start=sys.argv[3] == "True", grader="x:y")
    launcher = make_launcher(config)
    await launcher.start()
    env = attempt_environment("http://127.0.0.1:9", "key")
    if config.warm_start:
        await launcher.run(Task("0", {"case": "learn"}), env, 30)
        while not launcher.preloaded: await asyncio.sleep(0.02)
    await launcher.run(Task("1", {"case": "to file"}), env, 300)
asyncio.run(main())
"""


def test_a_killed_owner_takes_everything_with_it(agent, warm, tmp_path):
    pids_file = tmp_path / "pids"
    config = agent(AGENT)
    command = [sys.executable, "-c", OWNER, config.cwd, str(pids_file), str(warm)]
    owner = subprocess.Popen(command)
    try:
        pids = asyncio.run(pids_in(pids_file))
        pids.append(parent_of(pids[0]))
        assert all(is_running(pid) for pid in pids)
    finally:
        owner.kill()
        owner.wait()
    assert_gone(pids, within_s=2)


async def pids_in(path: Path) -> list[int]:
    """The process ids that an agent writes to a file, once they are there."""
    async with asyncio.timeout(20):
        while not path.exists() or not path.read_text().endswith("\n"):
            await asyncio.sleep(0.02)
    return [int(pid) for pid in path.read_text().split()]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_only_listed_variables_reach_the_agent(agent, warm, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setenv("SHARED", "2")
    source = "import json, os\nprint(json.dumps(dict(os.environ)))\n"
    config = agent(source, inherit_env=["PATH", "SHARED", "NOT_SET"], env={"OWN": "3", "LANG": "C"})
    seen = json.loads(run_case(config, "case", warm).stdout)
    seen.pop("LC_CTYPE", None)  # Python's own addition
    assert seen == {**ATTEMPT, "PATH": os.environ["PATH"], "SHARED": "2", "OWN": "3", "LANG": "C"}


def test_variables_have_the_names_and_values_that_are_asked_for(agent, warm):
    source = "import json, os\nprint(json.dumps(dict(os.environ)))\n"
    config = agent(
        source,
        inherit_env=["PATH"],
        env={"OWN": "3", "OPENAI_API_KEY": "not this"},
        env_names={"AGL_KEY": "OPENAI_API_KEY", "AGL_EVENT_URL": "LIGHTNING_RAY_REWARD_URL"},
        task_env={"CASE": "{case}", "ALL": "{{{id}}}"},
    )
    result = run_case(config, "ä \n", warm)
    assert result.exit_code == 0, result.stderr
    seen = json.loads(result.stdout)
    seen.pop("LC_CTYPE", None)  # Python's own addition
    own = {
        "AGL_KEY": "key",
        "AGL_EVENT_URL": "http://127.0.0.1:9/attempt/v1/rewards",
        "CASE": "ä \n",
        "ALL": "{ä \n}",
    }
    assert seen == {**ATTEMPT, "PATH": os.environ["PATH"], "OWN": "3", **own}
