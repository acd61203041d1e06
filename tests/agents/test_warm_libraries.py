"""Which modules a warm start shares, and which it leaves to each run."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

from agents_support import warmed, with_launcher

from lightning_ray.agents import Task, attempt_environment

TASK = Task("1", {})


def attempt(number: int) -> dict[str, str]:
    return attempt_environment(f"http://127.0.0.1:9/attempt{number}", f"key{number}")


def library(agent, source, **files):
    """An agent with a site-packages folder of its own."""
    config = agent(source, files={f"site-packages/{name}.py": text for name, text in files.items()})
    return replace(config, env={"PYTHONPATH": f"{config.cwd}/site-packages"})


def runs(config, count=2):
    """(launcher, results): one run that learns, then some that profit."""

    async def use(launcher):
        first = await warmed(launcher, TASK, attempt(0))
        rest = [await launcher.run(TASK, attempt(n), 30) for n in range(1, count + 1)]
        return launcher, [first, *rest]

    return with_launcher(config, use)


def test_libraries_are_shared_and_the_agents_own_modules_are_not(agent, tmp_path):
    config = library(
        agent,
        "import decimal, helper, shared, sys\nprint(helper.VALUE, shared.VALUE)\n",
        shared="VALUE = 1\n",
    )
    helper = tmp_path / "agent" / "helper.py"
    helper.write_text("VALUE = 'before'\n")

    async def use(launcher):
        await warmed(launcher, TASK, attempt(0))
        helper.write_text("VALUE = 'a change'\n")
        return launcher, await launcher.run(TASK, attempt(1), 30)

    launcher, result = with_launcher(config, use)
    assert {"decimal", "shared"} <= set(launcher.preloaded)
    assert not {"helper", "__main__", "agent"} & set(launcher.preloaded)
    assert (result.stdout, result.warm) == ("a change 1\n", True)


def test_a_library_that_keeps_an_attempts_variable_is_left_to_each_run(agent):
    config = library(
        agent,
        "import eager, importer, plain\nprint(eager.URL, importer.eager.URL)\n",
        eager="import os\nURL = os.environ.get('OPENAI_BASE_URL')\n",
        importer="import eager\n",
        copies="import os\nENV = dict(os.environ)\n",
        plain="import os\nVALUE = os.environ.get('SOMETHING_ELSE')\n",
    )
    launcher, results = runs(config)
    for number, result in enumerate(results):
        url = f"http://127.0.0.1:9/attempt{number}/v1"
        assert result.stdout == f"{url} {url}\n"
    assert results[-1].warm
    assert "plain" in launcher.preloaded
    assert not {"eager", "importer"} & set(launcher.preloaded)


def test_a_library_that_copies_the_environment_is_left_to_each_run(agent):
    config = library(
        agent,
        "import copies\nprint(copies.ENV['OPENAI_API_KEY'])\n",
        copies="import os\nENV = dict(os.environ)\n",
    )
    launcher, results = runs(config)
    assert [r.stdout for r in results] == ["key0\n", "key1\n", "key2\n"]
    assert results[-1].warm and "copies" not in launcher.preloaded


def test_what_a_library_prints_when_imported_is_printed_in_each_run(agent):
    config = library(
        agent,
        "import chatty\nprint('agent')\n",
        chatty="import sys\nprint('out')\nprint('err', file=sys.stderr)\n",
    )
    _, results = runs(config)
    assert results[-1].warm
    assert {(r.stdout, r.stderr) for r in results} == {("out\nagent\n", "err\n")}


def test_a_library_with_a_thread_makes_starts_cold(agent):
    config = library(
        agent,
        "import threaded\nthreaded.jobs.put(1)\nprint(threaded.done.get(timeout=5))\n",
        threaded=(
            "import queue, threading\njobs, done = queue.Queue(), queue.Queue()\n"
            "def work():\n    while True: done.put(jobs.get())\n"
            "threading.Thread(target=work, daemon=True).start()\n"
        ),
    )
    launcher, results = runs(config)
    assert "threads" in launcher.cold_reason
    assert [(r.stdout, r.warm) for r in results] == [("1\n", False)] * 3


def test_random_numbers_differ_between_runs(agent):
    source = "import numpy, random\nprint(random.random(), numpy.random.rand())\n"
    launcher, results = runs(agent(source), count=3)
    assert "numpy.random" in launcher.preloaded, launcher.cold_reason
    columns = list(zip(*(result.stdout.split() for result in results), strict=True))
    assert len(columns) == 2
    for column in columns:
        assert len(set(column)) == len(results)


def test_the_first_wave_waits_for_the_run_that_learns(agent):
    async def use(launcher):
        return await asyncio.gather(*[launcher.run(TASK, attempt(n), 30) for n in range(6)])

    results = with_launcher(agent("import decimal, time\ntime.sleep(0.3)\n"), use)
    assert sorted(result.warm for result in results) == [False, *[True] * 5]


def test_what_the_first_run_did_not_come_to_is_learnt_from_those_after_it(agent):
    source = """
import sys
if sys.argv[1] == "fail":
    raise SystemExit(1)
import shared, own
print(shared.VALUE)
if sys.argv[1] == "more":
    import another
if sys.argv[1] == "chat":
    import chatty, quiet
"""
    files = {"shared": "VALUE = 1\n", "another": "", "chatty": "print('hello')\n", "quiet": ""}
    config = library(agent, source, **files)
    config = replace(config, command=["python", "agent.py", "{what}"])
    (Path(config.cwd) / "own.py").write_text("")

    async def learns(launcher, what, module, says="1\n"):
        for number in range(60):
            result = await launcher.run(Task("1", {"what": what}), attempt(number), 30)
            assert (result.exit_code, result.stdout) == (0, says) and result.warm
            if module in launcher.preloaded:
                return result
            await asyncio.sleep(0.1)
        raise AssertionError(f"never learnt: {module}")

    async def use(launcher):
        first = await warmed(launcher, Task("1", {"what": "fail"}), attempt(0))
        assert first.exit_code == 1 and "shared" not in launcher.preloaded
        await learns(launcher, "go", "shared")
        await learns(launcher, "more", "another")
        # One that prints when it is imported is left to the runs that do.
        await learns(launcher, "chat", "quiet", says="1\nhello\n")
        result = await launcher.run(Task("1", {"what": "go"}), attempt(1), 30)
        assert (result.stdout, result.warm) == ("1\n", True)
        return launcher.preloaded

    assert not {"own", "chatty"} & set(with_launcher(config, use))


def test_a_library_of_later_runs_that_cannot_be_shared_is_left_to_them(agent):
    source = """
import sys
if sys.argv[1] == "go":
    import threaded
    threaded.jobs.put(1)
    print(threaded.done.get(timeout=5))
"""
    threaded = """
import queue, threading
jobs, done = queue.Queue(), queue.Queue()
def work():
    while True: done.put(jobs.get())
threading.Thread(target=work, daemon=True).start()
"""
    config = library(agent, source, threaded=threaded)
    config = replace(config, command=["python", "agent.py", "{what}"])

    async def use(launcher):
        await warmed(launcher, Task("1", {"what": "stop"}), attempt(0))
        results = []
        for number in range(8):
            results.append(await launcher.run(Task("1", {"what": "go"}), attempt(number), 30))
            await asyncio.sleep(0.1)
        return launcher, results

    launcher, results = with_launcher(config, use)
    assert [(r.stdout, r.warm) for r in results] == [("1\n", True)] * 8
    assert "threaded" not in launcher.preloaded and not launcher.cold_reason


def test_an_agent_that_exits_abruptly_is_not_waited_for_for_ever(agent):
    async def use(launcher):
        results = [await launcher.run(TASK, attempt(n), 30) for n in range(5)]
        return launcher, results

    launcher, results = with_launcher(agent("import os\nprint(1, flush=True)\nos._exit(3)\n"), use)
    assert [(r.exit_code, r.stdout) for r in results] == [(3, "1\n")] * 5
    assert launcher.preloaded == ()


def test_an_attempt_with_an_unexpected_variable_starts_cold(agent):
    source = "import json, os\nprint(json.dumps([os.environ.get('EXTRA'), os.environ.get('TZ')]))\n"

    async def use(launcher):
        await warmed(launcher, TASK, attempt(0))
        extras = [{}, {"EXTRA": "1"}, {"TZ": "Asia/Tokyo"}]
        return [await launcher.run(TASK, attempt(1) | extra, 30) for extra in extras]

    results = with_launcher(agent(source), use)
    assert [r.warm for r in results] == [True, False, False]
    assert [json.loads(r.stdout) for r in results] == [
        [None, None],
        ["1", None],
        [None, "Asia/Tokyo"],
    ]
