"""An agent cannot tell a warm start from a cold one."""

import json
from dataclasses import replace

import pytest
from agents_support import ATTEMPT, both, visible, warmed, with_launcher

from lightning_ray.agents import Task
from lightning_ray.agents.config import ResultBy, TaskBy

PROBE = """
import gc, json, locale, logging, os, random, signal, sys, threading, warnings
text = lambda value: repr(value).split(" at 0x")[0]
stream = lambda s: [s.name, s.encoding, s.errors, s.line_buffering, s.write_through, s.isatty(),
                    s.newlines, s.mode, s.fileno(), type(s.buffer).__name__]
own = dict(globals())
told = json.dumps({
    "argv": sys.argv, "orig_argv": sys.orig_argv, "env": dict(os.environ), "cwd": os.getcwd(),
    "path": sys.path, "name": __name__, "file": __file__, "doc": __doc__, "spec": text(__spec__),
    "package": __package__, "loader": [text(__loader__), __loader__.path, __loader__.name],
    "annotations": __annotations__, "builtins": text(__builtins__), "keys": list(own),
    "cached": __cached__, "main": sys.modules["__main__"].__dict__ is globals(),
    "flags": text(sys.flags), "executable": sys.executable, "prefix": sys.prefix,
    "xoptions": sys._xoptions, "warnoptions": sys.warnoptions,
    "stdin": [*stream(sys.stdin), sys.stdin.read()],
    "stdout": stream(sys.stdout), "stderr": stream(sys.stderr),
    "fds": sorted(os.listdir("/proc/self/fd")), "leader": os.getsid(0) == os.getpid(),
    "signals": {int(s): text(signal.getsignal(s)) for s in signal.valid_signals()},
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "wakeup": signal.set_wakeup_fd(-1), "alarm": signal.alarm(0),
    "locale": locale.setlocale(locale.LC_ALL), "fs": sys.getfilesystemencoding(),
    "recursion": sys.getrecursionlimit(), "gc": [gc.isenabled(), gc.get_threshold()],
    "threads": [t.name for t in threading.enumerate()],
    "main thread": threading.current_thread() is threading.main_thread(),
    "hooks": [text(sys.excepthook), text(sys.displayhook), text(threading.excepthook)],
    "filters": text(warnings.filters), "excinfo": sys.exc_info(), "path_hooks": text(sys.meta_path),
    "environ": text(type(os.environ)), "coding": __import__("sys").getdefaultencoding(),
    "snowman": "\\N{SNOWMAN}",
}, default=text, ensure_ascii=False)
print(told)
if "LIGHTNING_RAY_RESULT_FILE" in os.environ:
    open(os.environ["LIGHTNING_RAY_RESULT_FILE"], "w").write(told)
"""


@pytest.mark.parametrize("script", ["agent.py", "./agent.py", "sub/../agent.py", "link.py"])
def test_a_script_finds_the_same_world(agent, tmp_path, script):
    config = agent(PROBE, files={"sub/agent.py": ""}, env={"SETTING": "1"})
    (tmp_path / "agent" / "link.py").symlink_to("sub/../agent.py")
    config.command = ["python", script, "{case}", "a b", "", "$HOME;`id`"]
    ((cold, warm),) = both(config, [Task("1", {"case": "☃"})])
    assert cold.exit_code == 0, cold.stderr
    assert json.loads(warm.stdout) == json.loads(cold.stdout)
    assert visible(warm) == visible(cold)
    assert json.loads(cold.stdout)["argv"] == [script, "☃", "a b", "", "$HOME;`id`"]


@pytest.mark.parametrize(
    "settings",
    [
        {"command": ["python", "-u", "agent.py"]},
        {"env": {"PYTHONIOENCODING": "latin-1:replace", "PYTHONUTF8": "0", "LC_ALL": "C"}},
        {"env": {"PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "error::UserWarning"}},
        {"inherit_env": ["PATH"]},  # no locale: Python sets LC_CTYPE for itself
        {"task_by": TaskBy.stdin},
        {"command": ["python", "agent.py", "{task_file}"], "task_by": TaskBy.file},
        {"result_by": ResultBy.file},
    ],
    ids=["unbuffered", "latin-1", "safe path", "bare", "stdin", "task file", "result file"],
)
def test_the_interpreters_own_settings_are_the_same(agent, settings):
    ((cold, warm),) = both(agent(PROBE, **settings), [Task("1", {})])
    assert cold.exit_code == 0, cold.stderr
    assert visible(warm) == visible(cold)
    assert cold.written is None or json.loads(cold.written)["env"]["LIGHTNING_RAY_RESULT_FILE"]


ENDINGS = """
import atexit, decimal, logging, os, signal, sys, threading, time, warnings, weakref
case = sys.argv[1]
class Noisy:
    def __init__(self, name): self.name = name
    def __del__(self): print("del", self.name, os.path.basename(__file__))
class Code(SystemExit): pass
def hook(kind, error, trace): print("hook", kind.__name__, trace.tb_lineno, file=sys.stderr)
def leave(kind, error, trace): sys.exit(9)
def chain():
    try:
        {}["missing"]
    except KeyError as error:
        raise ValueError("wrong") from error
def work():
    time.sleep(0.2)
    print("thread done")
print("start", end="")
match case:
    case "zero": sys.exit(0)
    case "none": sys.exit()
    case "three": sys.exit(3)
    case "large": sys.exit(300)
    case "negative": sys.exit(-1)
    case "huge": sys.exit(1 << 40)
    case "text": sys.exit("a message")
    case "tuple": sys.exit((1, 2))
    case "true": sys.exit(True)
    case "subclass": raise Code(4)
    case "error": chain()
    case "group": raise ExceptionGroup("several", [ValueError(1), OSError(2, "no")])
    case "interrupt": raise KeyboardInterrupt
    case "sigint": os.kill(os.getpid(), signal.SIGINT); time.sleep(5)
    case "hook": sys.excepthook = hook; chain()
    case "hook exits": sys.excepthook = leave; chain()
    case "hard": os._exit(7)
    case "kill": os.kill(os.getpid(), signal.SIGKILL)
    case "term": os.kill(os.getpid(), signal.SIGTERM)
    case "abort": os.abort()
    case "pipe": signal.signal(signal.SIGPIPE, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGPIPE)
    case "thread": threading.Thread(target=work).start()
    case "daemon": threading.Thread(target=time.sleep, args=[60], daemon=True).start()
    case "thread error": threading.Thread(target=chain).start()
    case "thread exit": threading.Thread(target=work).start(); sys.exit(5)
    case "atexit":
        atexit.register(print, "first"); atexit.register(print, "second"); atexit.register(chain)
    case "atexit exit": atexit.register(sys.exit, 6)
    case "unflushed":
        file = open("out.txt", "w"); file.write("text"); print(os.path.abspath(file.name))
    case "held by a library":
        logging.extra = open("out.txt", "w"); logging.extra.write("text")
    case "finalizers":
        one, two = Noisy("one"), Noisy("two"); two.me = two
        weakref.finalize(Noisy, print, "finalize"); atexit.register(two.__repr__)
    case "held finalizer":
        logging.held = chain; _a, b = Noisy("a"), Noisy("b")
    case "bad finalizer":
        class Bad:
            def __del__(self): raise ValueError("in del")
        bad = Bad()
    case "closed stdout": sys.stdout.close()
    case "closed fd": os.close(1)
    case "no stdout": sys.stdout = None
    case "stderr": print("to stderr", file=sys.stderr); sys.stderr.write("unfinished")
    case "logging": logging.getLogger("x").warning("careful"); warnings.warn("mind", UserWarning)
    case "fork":
        if os.fork() == 0: print(" child", end="")
        else: os.wait(); print(" parent", end="")
    case "context": decimal.getcontext().prec = 3; print(decimal.Decimal(1) / 3)
print("end")
"""
CASES = [line.split('"')[1] for line in ENDINGS.splitlines() if line.startswith('    case "')]


def test_every_ending_is_the_same(agent):
    config = agent(ENDINGS, "{case}")
    results = both(config, [Task(case, {"case": case}) for case in CASES])
    assert len(CASES) > 35
    different = {
        case: (visible(cold), visible(warm))
        for case, (cold, warm) in zip(CASES, results, strict=True)
        if visible(cold) != visible(warm)
    }
    assert not different
    endings = {(cold.exit_code, cold.signal) for cold, _ in results}
    assert {(0, None), (1, None), (7, None), (None, 9), (None, 15), (None, 2), (120, None)} <= (
        endings
    )


@pytest.mark.parametrize("case", ["unflushed", "held by a library"])
def test_a_file_left_open_is_written(agent, tmp_path, case):
    async def run(launcher):
        await warmed(launcher, Task("learn", {"case": "learn"}), ATTEMPT)
        return await launcher.run(Task(case, {"case": case}), ATTEMPT, 30)

    assert with_launcher(agent(ENDINGS, "{case}"), run).warm
    assert (tmp_path / "agent" / "out.txt").read_text() == "text"


@pytest.mark.parametrize(
    "source",
    [
        "print('before'\n",
        "def f():\n\treturn 1\n        return 2\n",
        "# -*- coding: latin-1 -*-\nprint('caf\u00e9', __doc__)\n",
        '"""A docstring."""\nx: int = 1\nprint(__doc__, __annotations__)\n',
        "from __future__ import annotations\nprint(list(globals()))\n",
        "import no_such_module\n",
    ],
    ids=["unclosed", "tabs", "coding", "docstring", "future", "missing import"],
)
def test_every_source_reads_the_same(agent, tmp_path, source):
    # The learning run needs a script that ends well; the tested one takes its place.
    config = agent("import json\n")
    script = tmp_path / "agent" / "agent.py"

    async def cold(launcher):
        return await launcher.run(Task("1", {}), ATTEMPT, 30)

    async def warm(launcher):
        script.write_text("import json\n")
        await warmed(launcher, Task("learn", {}), ATTEMPT)
        script.write_bytes(source.encode("latin-1"))
        return await launcher.run(Task("1", {}), ATTEMPT, 30)

    script.write_bytes(source.encode("latin-1"))
    expected = with_launcher(replace(config, warm_start=False), cold)
    result = with_launcher(config, warm)
    assert result.warm
    assert visible(result) == visible(expected)
